"""Layers that read one input and follow one gate: their first matmul is one.

    q_proj ─┐ A of q          x ─▶ [A of q; A of k; A of v] ─▶ q's ranks │ k's ranks │ v's ranks
    k_proj ─┤ A of k                 one matmul, at q_proj        └ each layer's B, at that layer
    v_proj ─┘ A of v

The model's own code calls the layers one by one and knows nothing of it: the first computes for all
and the others take what it left, if they are called with that very input and that very decision.
Nothing is held twice: each layer's A becomes rows of the point's.
"""

from __future__ import annotations

import weakref
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from meteora.kernels import gather_grouped, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from meteora.kernels.dispatch import Twin


class Member(Protocol):
    """What of a routed layer its point asks for."""

    ranks: list[int]
    lora_a: Tensor
    rank_experts: Tensor
    rank_scaling: Tensor
    table: Tensor
    table_scaling: Tensor
    twin: Twin | None


class Shrunk(NamedTuple):
    """A x of one layer, weighted; its B is to follow."""

    factors: Tensor
    """[T, R], or [T, N] where there is an index"""
    index: Tensor | None
    """[T, N]: the rank that each belongs to"""

    def expand(self, b: Tensor, add_to: Tensor | None) -> Tensor:
        """B [OUT, R] of it, [T, OUT]; added to what is there, in place."""
        if self.index is None:
            if add_to is None:
                return self.factors @ b.T
            return reference.add_expanded(self.factors, b, add_to)
        if add_to is None:
            return gather_grouped.chosen_sums(b.T, self.index, self.factors)
        return gather_grouped.add_sums(b.T, self.index, self.factors, add_to)


class _Left(NamedTuple):
    """What the first layer left for the others."""

    x: weakref.ref[Tensor]
    experts: Tensor
    twin: Twin
    shrunk: list[Shrunk]


class Point:
    """Layers of one input, the first of which decides and computes for all."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._addresses: list[int] = []
        self._left: _Left | None = None
        self._num_taken = 0
        self._join()

    def __getstate__(self) -> dict[str, list[Member]]:
        """What a pass left, and what was joined, is of this process: both come again by use."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, list[Member]]) -> None:
        self.members = state["members"]
        self._addresses, self._left, self._num_taken = [], None, 0

    def shrink(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor, twin: Twin
    ) -> None:
        """For the first layer: compute for all, where this twin can be shared.

        Args:
            x: what the layer was called with, by which the others' calls are known
            tokens: the same as [T, IN], in the experts' dtype
            weights, experts: [T, K], which hold for all
        """
        self._left = None
        if twin not in {"dense", "gather"} or not self._join():
            return
        compute = self._dense if twin == "dense" else self._gather
        self._num_taken = 0
        self._left = _Left(weakref.ref(x), experts, twin, compute(tokens, weights, experts))

    def taken(self, place: int, x: Tensor, experts: Tensor) -> Shrunk | None:
        """What was left for a layer, if for this input and this decision."""
        left = self._left
        if left is None or left.x() is not x or left.experts is not experts:
            return None
        self._num_taken += 1
        if self._num_taken == len(self.members):
            self._left = None
        return left.shrunk[place] if self.members[place].twin in {None, left.twin} else None

    def _dense(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> list[Shrunk]:
        index = self._rank_experts, self._rank_scaling, len(self.members[0].ranks)
        factors = reference.shrink_dense(tokens, self._a, *index, weights, experts)
        return [Shrunk(own, None) for own in factors.split(self._sizes, dim=1)]

    def _gather(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> list[Shrunk]:
        owners, (num_layers, _, width) = experts.flatten(), self._table.shape
        size = num_layers, len(tokens), experts.shape[1] * width
        index = self._table.index_select(1, owners)  # [layers, T · K, max r]
        factors = self._table_scaling.index_select(1, owners) * weights.reshape(-1, 1)
        dots = gather_grouped.chosen_dots(tokens, self._a, (index + self._starts).view(size), width)
        factors = (dots * factors.view(size)).to(tokens.dtype)
        return [Shrunk(*own) for own in zip(factors, index.view(size), strict=True)]

    def _join(self) -> bool:
        """Whether the A's are rows of one matrix; makes them so again after they were moved."""
        members = self.members
        if [member.lora_a.data_ptr() for member in members] == self._addresses:
            return True
        if len({(member.lora_a.device, member.lora_a.dtype) for member in members}) > 1:
            return False
        # whoever loads or moves a model in inference mode may still want to train it
        with torch.inference_mode(mode=False), torch.no_grad():
            self._sizes = [len(member.lora_a) for member in members]
            self._a = torch.cat([member.lora_a for member in members])  # [R of all, IN]
            for member, own in zip(members, self._a.split(self._sizes), strict=True):
                member.lora_a = own
            self._rank_experts = torch.cat([member.rank_experts for member in members])
            self._rank_scaling = torch.cat([member.rank_scaling for member in members])
            width = max(member.table.shape[1] for member in members)
            self._table, self._table_scaling = (
                torch.stack([_widened(table, width) for table in tables])  # [layers, E, max r]
                for tables in (
                    [member.table for member in members],
                    [member.table_scaling for member in members],
                )
            )
            # a layer without ranks has no first row: it names another's, at scaling 0
            ends = accumulate(self._sizes)
            starts = [
                end - size if size else 0 for end, size in zip(ends, self._sizes, strict=True)
            ]
            self._starts = self._table.new_tensor(starts).view(-1, 1, 1)
        self._addresses = [member.lora_a.data_ptr() for member in members]
        return True


def _widened(table: Tensor, width: int) -> Tensor:
    """Filled up with rank 0 at scaling 0."""
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))
