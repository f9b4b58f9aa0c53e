"""Text to token ids, the same way wherever a prompt is fitted, measured or answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the model expects it: in the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return prompt
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a prompt; a chat template brings its own special tokens."""
    text = open_prompt(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """The token ids of a prompt with its answer and, where there is one, the end of sequence."""
    answer = tokenizer(response, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*encode_prompt(tokenizer, prompt), *answer, *end]


def opening_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens every prompt begins with: the template's opening, which tells nothing."""
    one, other = encode_prompt(tokenizer, "one"), encode_prompt(tokenizer, "7")
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
