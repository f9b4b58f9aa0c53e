"""Generate text with a fused model."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from meteora.artifacts import MeteoraError
from meteora.base.chat_template import ConversationError, encode_prompt
from meteora.base.padding import by_length, padded_and_mask, padding_token
from meteora.base.placement import input_device
from meteora.model.shared_prefix import share_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers._typing import GenerativePreTrainedModel

Texts = TypeVar("Texts", str, list[str])
"""One text, or several."""
PROMPTS_PER_BATCH = 16
PLACED_WITH_PADDING = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
    "pegasus", "plbart", "prophetnet", "trocr", "whisper",
}  # fmt: skip
"""Decoders of encoder-decoder models, in which padding moves the positions of a prompt's tokens."""
ONE_BY_ONE = {"minimax", "recurrent_gemma", "rwkv", "xlstm"} | PLACED_WITH_PADDING
"""Architectures in which, in transformers, a batch's prompts or padding change its answers."""
ONE_ANSWER: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None, "stop_strings": None, "max_time": None,
}  # fmt: skip
"""Arguments of `generate` that give ids of one answer to each prompt, up to an end token or the
limit, whatever a base's own config says."""
ONE_CACHE: dict[str, Any] = {"use_cache": True, "cache_implementation": None, **ONE_ANSWER}
"""Arguments of `generate` with which each token is also read once. The cache is the usual one: a
static one has no room for the last token, which a trace reads too."""


class EmptyPromptError(MeteoraError):
    """A prompt has no tokens."""


def batch_of(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    """The token ids of one prompt as a batch [1, L], on the device of the model's input.

    Raises:
        EmptyPromptError: the prompt has no tokens.
    """
    _require_tokens(prompt)
    return torch.tensor([list(prompt)], device=input_device(model))


def _require_tokens(prompt: Sequence[int], which: str = "the prompt") -> None:
    if len(prompt) == 0:
        raise EmptyPromptError(
            f"{which} has no tokens: it is empty, and the base's tokenizer puts none in front of"
            " it; ask something"
        )


def prompts_at_once(model: PreTrainedModel, number: Any) -> Any:  # noqa: ANN401  (lm-eval: `auto`)
    """The number of prompts to answer together: the given one, or 1 if a batch mixes them."""
    return 1 if model.config.model_type in ONE_BY_ONE else number


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends or []
    own = tokenizer.eos_token_id
    return sorted({*ends, *([] if own is None else [own])})


def most_new_tokens(
    model: PreTrainedModel, num_prompt: int, wanted: int, which: str = "the prompt"
) -> int:
    """The tokens that an answer may have: as many as are wanted, if the model takes so many.

    Raises:
        ConversationError: the prompt, with `num_prompt` tokens, leaves no room for an answer.
    """
    config = model.config.get_text_config()
    longest: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if num_prompt >= longest:
        raise ConversationError(
            f"{which}, with what precedes it, has {num_prompt} tokens, and the model takes"
            f" {longest} with its answer; shorten it, or begin a new conversation"
        )
    return min(wanted, longest - num_prompt)


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    max_new_tokens: int,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401  (one of transformers' many outputs)
    """Run transformers' `generate`, by default greedily and on one cache.

    Args:
        input_ids: of the prompts, [B, L]
        max_new_tokens: answers are cut at this many tokens, or at the model's longest text
        options: further arguments of `generate`; without a mask, no token is padding

    Raises:
        ConversationError: a prompt leaves no room for an answer.
    """
    max_new_tokens = most_new_tokens(model, input_ids.shape[1], max_new_tokens)
    if options.get("past_key_values", ...) is None:  # with None, Mamba returns no state
        del options["past_key_values"]
    defaults = {
        "attention_mask": torch.ones_like(input_ids),
        "do_sample": False,
        **ONE_CACHE,
        "pad_token_id": padding_token(tokenizer),
        "eos_token_id": end_tokens(model, tokenizer) or None,
    }
    return cast("GenerativePreTrainedModel", model).generate(
        input_ids, max_new_tokens=max_new_tokens, **(defaults | options)
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Texts,
    *,
    max_new_tokens: int = 256,
) -> Texts:
    """Answer a prompt, or each of several, greedily; returns the text of the answer or answers.

    Args:
        model: fused, or any causal language model of transformers
        prompt: text; it is put into the tokenizer's chat template, if there is one. Several are
            answered in batches
        max_new_tokens: an answer is cut at this many tokens, or at the model's longest text

    Raises:
        EmptyPromptError: a prompt has no tokens.
        ConversationError: a prompt is no text, or no Unicode, or leaves no room for an answer.
    """
    is_one = isinstance(prompt, str)
    prompts = [encode_prompt(tokenizer, one) for one in ([prompt] if is_one else prompt)]
    for number, one in enumerate(prompts, 1):
        which = "the prompt" if is_one else f"prompt {number}"
        _require_tokens(one, which)
        most_new_tokens(model, len(one), max_new_tokens, which)
    answers = answer_all(model, tokenizer, prompts, max_new_tokens)
    texts = [str(tokenizer.decode(one, skip_special_tokens=True)) for one in answers]
    return cast("Texts", texts[0] if is_one else texts)


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _prompts: None,
) -> list[list[int]]:
    """Answer prompts, given as token ids, greedily; returns token ids, end tokens included.

    Args:
        advance: called with the number of prompts that were just answered
    """
    pad, ends = padding_token(tokenizer), end_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    rooms = [most_new_tokens(model, len(prompt), max_new_tokens) for prompt in prompts]
    waiting = deque(by_length(prompts, prompts_at_once(model, PROMPTS_PER_BATCH)))
    while waiting:
        chosen = waiting.popleft()
        rows = padded_and_mask([prompts[i] for i in chosen], pad or 0, "left")
        ids, mask = (row.to(input_device(model)) for row in rows)
        with torch.inference_mode():
            started = share_prefix(model, ids, mask, asked=ONE_CACHE).to_generate()
            out = generate_ids(model, tokenizer, **started, max_new_tokens=max_new_tokens)
        for row, i in enumerate(chosen):
            tokens = out[row, ids.shape[1] :].tolist()
            end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            answers[i] = tokens[: end + 1]
        room = min(rooms[i] for i in chosen)
        # the longest prompt has cut answers that have more room of their own
        cut = [
            i for i in chosen if rooms[i] > room == len(answers[i]) and answers[i][-1] not in ends
        ]
        if cut:
            waiting.append(cut)
        advance(len(chosen) - len(cut))
    return answers
