"""What a forward pass of a model is called with, as far as routes depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class PassInput:
    """The tokens of a pass, and whether others came before them."""

    ids: Tensor | None
    """[B, L]; None where only embeddings are known."""
    there: Tensor
    """[B, L] bool: the tokens that are no padding."""
    goes_on: bool
    """Whether a cache holds what precedes."""

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Self:
        """Read the arguments of a causal language model's `forward`."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        states = ids if ids is not None else kwargs["inputs_embeds"]
        num_rows, length = states.shape[:2]
        there = torch.ones(num_rows, length, dtype=torch.bool, device=states.device)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            there = mask[:, mask.shape[1] - length :].bool()
        if kwargs.get("cache_params") is not None:  # a state-space model's has no length
            return cls(ids, there, length == 1)
        past = kwargs.get("past_key_values")
        return cls(ids, there, past is not None and past.get_seq_length() > 0)


def watch(model: nn.Module, see: Callable[[PassInput], None]) -> RemovableHandle:
    """Call `see` before each pass of a causal language model.

    Its `base_model` is not watched, since some models do not call theirs, such as OPT.
    """

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(PassInput.of(args, kwargs))

    return model.register_forward_pre_hook(before, with_kwargs=True)
