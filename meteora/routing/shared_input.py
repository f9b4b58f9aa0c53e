"""Layers that read one input and follow one gate: their first matmul is one.

    q_proj ─┐ A of q          x ─▶ [A of q; A of k; A of v] ─▶ q's ranks │ k's ranks │ v's ranks
    k_proj ─┤ A of k                 one matmul, at q_proj        └ each layer's B, at that layer
    v_proj ─┘ A of v

The model's own code calls the layers one by one and hands nothing of ours from one to the next. So
they hold one `SharedMatmul`: the first layer computes for all, and each of the others takes its
part, if it is called with that very input and that very decision. Nothing is held twice: each
layer's A becomes rows of the joined one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from meteora.kernels import gather_grouped, reference
from meteora.kernels.stack import ExpertStack, RankTable

if TYPE_CHECKING:
    from meteora.kernels.dispatch import KernelName


class Member(Protocol):
    """What a shared matmul needs of a routed layer."""

    stack: ExpertStack
    kernel: KernelName | None


class Product(NamedTuple):
    """A x of one layer, weighted; B is not applied yet."""

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


class Share(NamedTuple):
    """What one layer holds of a matmul that it shares."""

    matmul: SharedMatmul
    place: int
    """Of the layer, in the order of their calls; the first computes."""


class _Handover(NamedTuple):
    """What the first layer computed for all."""

    x: weakref.ref[Tensor]
    """The input, which is kept no longer than the model keeps it."""
    experts: Tensor
    kernel: KernelName
    products: list[Product]


class SharedMatmul:
    """The first matmul of layers that read one input, the first of which decides for all."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._clear()
        self._join()

    def __getstate__(self) -> dict[str, list[Member]]:
        """What a pass left, and what was joined, is of this process: both come again by use."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, list[Member]]) -> None:
        self.members = state["members"]
        self._clear()

    def _clear(self) -> None:
        """Hold nothing but the layers."""
        self._addresses: list[int] = []
        self._a = self._choice_scaling = torch.empty(0)
        self._table: RankTable | None = None
        self._handover: _Handover | None = None
        self._num_taken = 0

    def compute(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor, kernel: KernelName
    ) -> None:
        """Compute A x of all layers, at the first of them, where this kernel can be shared.

        Args:
            x: what the layer was called with, by which the others' calls are known
            tokens: the same as [T, IN], in the experts' dtype
            weights, experts: [T, K], which hold for all
        """
        self._handover = None
        joined = [member.stack.a.data_ptr() for member in self.members] == self._addresses
        if not joined:
            self._clear()  # what the layers were moved from is not held, whatever the kernel
        if kernel not in {"dense", "gather"} or not (joined or self._join()):
            return
        multiply = self._dense if kernel == "dense" else self._gather
        self._num_taken = 0
        self._handover = _Handover(
            weakref.ref(x), experts, kernel, multiply(tokens, weights, experts)
        )

    def take(self, place: int, x: Tensor, experts: Tensor) -> Product | None:
        """A x of one layer; None where it was computed for another input or decision."""
        found = self._handover
        if found is None or found.x() is not x or found.experts is not experts:
            return None
        self._num_taken += 1
        if self._num_taken == len(self.members):
            self._handover = None
        return found.products[place] if self.members[place].kernel in {None, found.kernel} else None

    def _dense(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> list[Product]:
        factors = reference.rank_weights(weights, experts, self._choice_scaling)
        shrunk = ((tokens @ self._a.T) * factors).to(tokens.dtype)
        return [Product(own, None) for own in shrunk.split(self._sizes, dim=1)]

    def _gather(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> list[Product]:
        if self._table is None:
            self._table = self._join_tables()
        table, scaling = self._table
        owners, (num_layers, _, width) = experts.flatten(), table.shape
        size = num_layers, len(tokens), experts.shape[1] * width
        index = table.index_select(1, owners)  # [layers, T · K, W]
        factors = scaling.index_select(1, owners) * weights.reshape(-1, 1)
        dots = gather_grouped.chosen_dots(tokens, self._a, (index + self._starts).view(size), width)
        factors = (dots * factors.view(size)).to(tokens.dtype)
        return [Product(*own) for own in zip(factors, index.view(size), strict=True)]

    def _join(self) -> bool:
        """Make the A's rows of one matrix, if they lie on one device; whether they do."""
        stacks = [member.stack for member in self.members]
        if len({(stack.a.device, stack.a.dtype) for stack in stacks}) > 1:
            return False
        # who loads or moves a model in inference mode may still want to train it
        with torch.inference_mode(mode=False), torch.no_grad():
            self._sizes = [len(stack.a) for stack in stacks]
            self._a = torch.cat([stack.a for stack in stacks])  # [R of all, IN]
            for stack, own in zip(stacks, self._a.split(self._sizes), strict=True):
                stack.a = own
            self._choice_scaling = torch.cat([stack.choice_scaling() for stack in stacks], dim=1)
        self._addresses = [stack.a.data_ptr() for stack in stacks]
        return True

    def _join_tables(self) -> RankTable:
        """The rank tables of all layers, [layers, C, W] each."""
        with torch.inference_mode(mode=False):
            tables = [member.stack.rank_table() for member in self.members]
            width = max(table.index.shape[1] for table in tables)
            # a layer without ranks has no first row: it names another's, at scaling 0
            ends = accumulate(self._sizes)
            starts = [
                end - size if size else 0 for end, size in zip(ends, self._sizes, strict=True)
            ]
            self._starts = tables[0].index.new_tensor(starts).view(-1, 1, 1)
            return RankTable(
                *(
                    torch.stack([_filled(part, width) for part in parts])
                    for parts in zip(*tables, strict=True)
                )
            )


def _filled(table: Tensor, width: int) -> Tensor:
    """Its rows filled up with zeros: rank 0, or no choice, at scaling 0."""
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))
