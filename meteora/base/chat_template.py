"""Text to token ids, the same way wherever a prompt is fitted, measured or answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from meteora.artifacts.identity import Noun

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


@dataclass(frozen=True)
class Template(Noun):
    """What every prompt begins and ends with; empty tuples where a tokenizer has no template."""

    opening: tuple[int, ...] = ()
    """Token ids in front of the prompt's own."""
    closing: tuple[int, ...] = ()
    """Token ids behind the prompt's own: the answer follows them."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The template of a tokenizer, as two prompts without a common letter show it."""
        one, other = encode_prompt(tokenizer, "one"), encode_prompt(tokenizer, "7")
        opening = _common(one, other)
        closing = _common(one[len(opening) :][::-1], other[len(opening) :][::-1])
        return cls(opening, closing[::-1])


def _common(one: list[int], other: list[int]) -> tuple[int, ...]:
    """The longest common beginning."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return tuple(one[:length])
