"""Join the first matmul of layers that read one input and follow one gate.

    q_proj ─┐ A of q          x ─▶ [A of q; A of k; A of v] ─▶ q's ranks │ k's ranks │ v's ranks
    k_proj ─┤ A of k                 one matmul, at q_proj        └ each layer's B, at that layer
    v_proj ─┘ A of v

The model's own code calls the layers one by one and passes nothing of ours between them. So they
share one `SharedMatmul`: the first layer computes for all, and each of the others takes its part,
if it is called with the same input and decision (the same objects). No memory is doubled: each
layer's A becomes a view of the joined one. Up to 64 tokens this saves 1 to 6 % of the time of q, k
and v with the kernel `gather`, and between -2 and 6 % with `dense`.
"""

import threading
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from meteora.kernels import gather_grouped, onednn, reference
from meteora.kernels.dispatch import KernelName
from meteora.kernels.stack import ExpertStack, RankTable


class Member(Protocol):
    """The part of a routed layer that a shared matmul uses."""

    stack: ExpertStack
    kernel: KernelName | None


class Product(NamedTuple):
    """A x of one layer, weighted; B is not applied yet."""

    factors: Tensor
    """[T, R], or [T, N] with an index"""
    index: Tensor | None
    """[T, N]: the rank of each factor; None: all ranks in order"""

    def expand(self, b: Tensor, add_to: Tensor | None) -> Tensor:
        """Apply B [OUT, R]: [T, OUT]; it is added to `add_to` in place, if given."""
        if self.index is None:
            if add_to is None:
                return onednn.linear(self.factors, b)
            return reference.add_expanded(self.factors, b, add_to)
        return gather_grouped.add_sums(b.T, self.index, self.factors, add_to)


class Share(NamedTuple):
    """A layer's share in a matmul."""

    matmul: "SharedMatmul"
    place: int
    """The place of the layer in the order of calls; the first computes."""


class _Handover(NamedTuple):
    """The results of the first layer for all layers."""

    x: weakref.ref[Tensor]
    """The input; a weak reference, so that it lives no longer than in the model."""
    experts: Tensor
    kernel: KernelName
    products: dict[int, Product]
    """Of each layer that has not taken its own, by its place."""


_JOINING = threading.Lock()
"""One thread at a time joins the A of layers that were moved."""


class SharedMatmul:
    """The first matmul of layers that read one input; the gate of the first decides for all."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._clear()
        self._join()

    def __getstate__(self) -> dict[str, list[Member]]:
        """Only the layers: results and the joined A belong to this process, and are made anew."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, list[Member]]) -> None:
        self.members = state["members"]
        self._clear()

    def _clear(self) -> None:
        """Drop everything but the layers."""
        self._addresses: list[int] = []
        self._a = self._choice_scaling = torch.empty(0)
        self._table: RankTable | None = None
        self._now = threading.local()  # each thread has a handover of its own

    def compute(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor, kernel: KernelName
    ) -> None:
        """Compute A x of all layers, in the call of the first one, if this kernel can be shared.

        Args:
            x: the input of the layer, which identifies the calls of the others
            tokens: the same as [T, IN], in the experts' dtype
            weights, experts: [T, K], for all layers
        """
        self._now.handover = None
        joined, can_share = self._is_joined(), kernel in {"dense", "gather"}
        if not joined:
            with _JOINING:
                if not (joined := self._is_joined()):  # else another thread has joined them
                    self._clear()  # the layers were moved: free the old memory, whatever the kernel
                    joined = can_share and self._join()
        if not (joined and can_share):
            return
        multiply = self._dense if kernel == "dense" else self._gather
        products = dict(enumerate(multiply(tokens, weights, experts)))
        self._now.handover = _Handover(weakref.ref(x), experts, kernel, products)

    def _is_joined(self) -> bool:
        """Whether each layer's A still is a view of the joined one: moving a layer ends that."""
        return [member.stack.a.data_ptr() for member in self.members] == self._addresses

    def take(self, place: int, x: Tensor, experts: Tensor) -> Product | None:
        """A x of one layer; None if it was computed for another input or decision."""
        ready: _Handover | None = getattr(self._now, "handover", None)
        if ready is None or ready.x() is not x or ready.experts is not experts:
            return None
        product = ready.products.pop(place, None)
        if not ready.products:
            self._now.handover = None
        return product if self.members[place].kernel in {None, ready.kernel} else None

    def _dense(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> list[Product]:
        factors = reference.rank_weights(weights, experts, self._choice_scaling)
        shrunk = (onednn.linear(tokens, self._a) * factors).to(tokens.dtype)
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
        """Join all A in one matrix, if they are on one device; returns whether they are."""
        stacks = [member.stack for member in self.members]
        if len({(stack.a.device, stack.a.dtype) for stack in stacks}) > 1:
            return False
        # a model that is loaded or moved in inference mode may be trained later
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
            # a layer without ranks has no first row, so it uses row 0, at scaling 0
            ends = accumulate(self._sizes)
            starts = [
                end - size if size else 0 for end, size in zip(ends, self._sizes, strict=True)
            ]
            self._starts = tables[0].index.new_tensor(starts).view(-1, 1, 1)
            index, scaling = (  # rows are filled up with rank 0 at scaling 0
                torch.stack([pad(part, (0, width - part.shape[1])) for part in parts])
                for parts in zip(*tables, strict=True)
            )
            return RankTable(index, scaling)
