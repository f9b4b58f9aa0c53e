"""Read the common beginning of a batch's prompts once.

    prompts   S S S a b   S S S c       S: a system prompt, a template's header, solved examples
    cache     S S S, computed once, repeated for each prompt
    batch     S S S a b   S S S · c     ·: padding, which is masked and has no position

Its keys and values equal those in each whole prompt, if they do not depend on later tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from meteora.routing.layer import routed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHORTEST = 8
"""The least tokens of a shared prefix: fewer are not worth a pass of their own."""
ROTATIONS = {"dynamic", "longrope"}
"""Kinds of rotary position embeddings that depend on the length of the whole text."""
PLAIN = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "use_cache": (None, True),
    "cache_implementation": (None,),
}
"""Settings of `generate`, each with the values that allow a shared prefix: one answer to each
prompt, on the usual cache, without effects of padding."""


def whole_layers(cache: object) -> list[DynamicLayer] | None:
    """The layers of a cache that holds every token that the model has read.

    None if a layer forgets tokens, such as one with a sliding window, or if the cache holds more
    than its layers, as MiniMax's does.
    """
    layers = cache.layers if type(cache) is DynamicCache else [None]
    whole = [layer for layer in layers if type(layer) is DynamicLayer]
    return whole if len(whole) == len(layers) else None


class Started(NamedTuple):
    """A batch whose common prefix is read, if it has one."""

    ids: Tensor
    """[B, L]; if a prefix is read, padding comes right after it."""
    mask: Tensor
    """[B, L]: 1 for a token and 0 for padding."""
    cache: DynamicCache | None
    """The keys and values of the prefix, for each prompt."""

    @property
    def num_read(self) -> int:
        """The length of the prefix."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def to_generate(self) -> dict[str, Any]:
        """The arguments with which `model.generate` continues."""
        batch = {"input_ids": self.ids, "attention_mask": self.mask}
        return batch if self.cache is None else batch | {"past_key_values": self.cache}

    def to_read(self) -> dict[str, Any]:
        """The arguments of a pass over the rest of the prompts."""
        if self.cache is None:
            return self.to_generate()
        positions = self.mask.cumsum(1) - 1
        rest = {"input_ids": self.ids, "position_ids": positions}
        left = {name: rows[:, self.num_read :] for name, rows in rest.items()}
        return self.to_generate() | left


def share_prefix(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    *,
    at_most: int | None = None,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> Started:
    """Read the common beginning of a batch's prompts once.

    The answers begin at the same place as without it. If nothing can be shared, such as with a
    router that looks ahead or a sliding window, the batch is returned as it is.

    Args:
        ids: of the prompts [B, L], padded at the left, or at the right if none is answered
        mask: 1 for a token and 0 for padding [B, L]
        at_most: the most tokens to share
        asked: further arguments that `generate` gets later
    """
    length = _num_shared(ids, mask)
    length = length if at_most is None else min(length, at_most)
    if len(ids) == 1 or length < SHORTEST or not _may_share(model, asked):
        return Started(ids, mask, None)
    there = mask.bool()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if whole_layers(cache) is None:
        return Started(ids, mask, None)
    prefix = ids[:1, there[0]][:, :length]
    with torch.inference_mode():
        model.base_model(input_ids=prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    is_prefix = there & (there.cumsum(1) <= length)
    order = torch.where(is_prefix, 0, there.long() + 1).argsort(dim=1, stable=True)
    return Started(ids.gather(1, order), mask.gather(1, order), cache)


def _num_shared(ids: Tensor, mask: Tensor) -> int:
    """The number of tokens with which all prompts begin; at least one of each is left to read."""
    left = ids.gather(1, mask.argsort(dim=1, descending=True, stable=True))
    left = left[:, : max(0, int(mask.sum(1).min()) - 1)]
    return int((left == left[:1]).all(0).long().cumprod(0).sum())


def _may_share(model: PreTrainedModel, asked: Mapping[str, Any]) -> bool:
    """Whether answers may continue from a cache with gaps, and no router looks ahead."""
    takes = inspect.signature(model.base_model.forward).parameters
    if not {"past_key_values", "position_ids"} <= takes.keys():
        return False
    config = model.config.get_text_config(decoder=True)
    # a window of GPT-Neo's counts gaps
    if getattr(config, "window_size", 0) or rotates_by_length(config):
        return False
    own = model.generation_config.to_dict() if model.can_generate() else {}
    if any((own | dict(asked)).get(name) not in plain for name, plain in PLAIN.items()):
        return False
    return not any(layer.looks_ahead for layer in routed_layers(model).values())


def rotates_by_length(config: PreTrainedConfig) -> bool:
    """Whether rotary embeddings make the keys of a text depend on its whole length."""
    settings = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in settings.values() if isinstance(value, dict)]
    return any(one.get("rope_type") in ROTATIONS for one in (settings, *by_layer))
