"""The routed layer: a frozen projection, a ragged stack of E LoRAs, and a router.

    before   q_proj: Linear(IN, OUT)
    after    q_proj: MoELoRALinear(that Linear, lora_a [R, IN], lora_b [OUT, R], router)

The layer keeps the signature of the projection that it replaces, so the base model's own code
runs unchanged: caches, padding, batches and beams included. What a router decided leaves by hooks.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from meteora.kernels import dispatch, gather_grouped, reference
from meteora.kernels.addmm import Plain
from meteora.routing.shared_input import Point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from meteora.kernels.dispatch import Twin
    from meteora.routing.expert_cache import ExpertCache
    from meteora.routing.routers import Router
    from meteora.routing.shared_input import Shrunk


ALIGNMENT = 64
"""Bytes of a cache line; torch's own memory begins at one, that of a mapped file anywhere."""


class MoELoRALinear(nn.Module):
    """y = projection(x) + Σ_e w_e · scaling_e · B_e (A_e x), with w from the router.

    The adapters are buffers and never parameters: no optimiser can find them. Without a router
    (`router = None`) the layer is the bare projection. `plain` says how exact 16 bits are.
    """

    lora_a: Tensor
    lora_b: Tensor
    segments: Tensor
    scales: Tensor
    rank_experts: Tensor
    rank_scaling: Tensor
    table: Tensor
    table_owned: Tensor
    table_scaling: Tensor

    def __init__(
        self,
        projection: nn.Module,
        lora_a: Tensor,
        lora_b: Tensor,
        ranks: Sequence[int],
        scaling: Sequence[float],
        router: Router | None = None,
        *,
        twin: Twin | None = None,
        cache: ExpertCache | None = None,
    ) -> None:
        """Wrap `projection`.

        Args:
            projection: any module from [..., IN] to [..., OUT]
            lora_a: [R, IN]
            lora_b: [OUT, R]
            ranks: of each expert, summing to R; zero where it lacks this layer
            scaling: of each expert
            twin: how what the experts add is computed; without it, what is fastest for the tokens
            cache: leave A and B where they are, and compute from what it copies to the device
        """
        super().__init__()
        self.projection = projection
        self.ranks = list(ranks)
        self.scaling = list(scaling)
        self.cache = cache
        self._key = object()
        """Names this layer's experts in the cache, which may serve others too."""
        device = lora_a.device
        if cache is None:
            self.register_buffer("lora_a", _aligned(lora_a), persistent=False)
            # the columns of B lie one after the other in memory: a rank's is read in one piece
            self.register_buffer("lora_b", lora_b.T.contiguous().T, persistent=False)
        else:
            # no buffers: they stay in host memory when the model moves
            self.lora_a, self.lora_b = lora_a, lora_b
            device = self.weight.device
        widths = torch.tensor(self.ranks)
        segments = torch.stack([widths.cumsum(0) - widths, widths])
        self.register_buffer("segments", segments.to(device), persistent=False)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), widths)
        self.register_buffer("rank_experts", owner.to(device), persistent=False)
        table, owned = gather_grouped.rank_table(self.ranks)
        self.register_buffer("table", table.to(device), persistent=False)
        self.register_buffer("table_owned", owned.to(device), persistent=False)
        self._scale()
        self._sizes = dispatch.Sizes(
            num_in=lora_a.shape[1],
            num_out=lora_b.shape[0],
            num_experts=len(self.ranks),
            num_ranks=len(lora_a),
            max_rank=max(self.ranks),
        )
        self.router = router
        self.twin = twin
        self.point: tuple[Point, int] | None = None
        """Layers that share their input and their gate with this one, and its place there."""

    def _scale(self) -> None:
        """Lay each expert's scaling beside its ranks, in float32: [E], [R] and [E, max r]."""
        # whoever moves a model in inference mode may still want to train it
        with torch.inference_mode(mode=False):
            device = self.rank_experts.device
            scales = torch.tensor(self.scaling, dtype=torch.float32, device=device)
            by_rank, by_table = scales[self.rank_experts], scales[:, None] * self.table_owned
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("rank_scaling", by_rank, persistent=False)
        self.register_buffer("table_scaling", by_table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to()` and its kin, but keep the scaling exact where the model narrows."""
        super()._apply(fn, recurse)
        self._scale()
        return self

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def weight(self) -> Tensor:
        """The projection's own weight: base models ask for its dtype and device."""
        return self.projection.weight  # ty: ignore[invalid-explicit-return]

    def forward(self, x: Tensor) -> Tensor:
        projection, router = self.projection, self.router
        if router is None:
            return projection(x)
        plain = Plain.of(projection, x)
        tokens = x.reshape(-1, x.shape[-1])  # [T, IN]
        weights, experts = router.choose(tokens)
        if plain is not None:
            said = self._said(x, tokens, weights, experts, self._start(tokens, plain))
            out = reference.add_projected(said, tokens, plain.weight)
            return out.view(*x.shape[:-1], out.shape[-1])
        y = projection(x)
        rows = y.reshape(-1, y.shape[-1])
        if y.requires_grad:
            out = rows + self._said(x, tokens, weights, experts, None).to(y.dtype)
        else:
            out = self._said(x, tokens, weights, experts, rows)
        return out.view(y.shape)

    def _start(self, tokens: Tensor, plain: Plain) -> Tensor | None:
        """What the experts add to before the projection does; None where that is nothing."""
        if plain.bias is not None:
            return plain.bias.expand(len(tokens), -1).clone()
        if self._dtype != tokens.dtype:  # what they say is rounded to 16 bits as it comes
            return tokens.new_zeros(len(tokens), self.lora_b.shape[0])
        return None

    def _said(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor, add_to: Tensor | None
    ) -> Tensor:
        """What the experts say, [T, OUT]; added to what is there, in place.

        Args:
            x: what the layer was called with
            tokens: the same as [T, IN]
        """
        tokens = tokens.to(self._dtype)
        if self.cache is not None:
            return self._said_from_cache(self.cache, tokens, weights, experts, add_to)
        if (shrunk := self._shrunk_at_point(x, tokens, weights, experts)) is not None:
            return shrunk.expand(self.lora_b, add_to)
        return self._said_by_twin(tokens, weights, experts, add_to)

    def _shrunk_at_point(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor
    ) -> Shrunk | None:
        """A x as the first layer of the point found it; None where this one is on its own."""
        if self.point is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        point, place = self.point
        if place == 0:
            if self.router is None or not self.router.leads:
                return None
            twin = self.twin or self._fastest_twin(tokens.dtype, experts)
            point.shrink(x, tokens, weights, experts, twin)
        return point.taken(place, x, experts)

    def _said_by_twin(
        self, x: Tensor, weights: Tensor, experts: Tensor, add_to: Tensor | None
    ) -> Tensor:
        twin = self.twin or self._fastest_twin(x.dtype, experts)
        factors = x, self.lora_a, self.lora_b
        if twin == "dense":
            index = self.rank_experts, self.rank_scaling, self.num_experts
            return reference.lora_delta_dense(*factors, *index, weights, experts, add_to=add_to)
        if twin == "gather":
            table = self.table, self.table_scaling
            return gather_grouped.lora_delta_gather(
                *factors, *table, weights, experts, add_to=add_to
            )
        if twin == "grouped":
            lists = self.ranks, self.scaling
            return gather_grouped.lora_delta_grouped(
                *factors, *lists, weights, experts, add_to=add_to
            )
        found = gather_grouped.triton_twins()
        own = found.Segments(*self.segments, self.scales, self._sizes.max_rank)
        run = found.lora_delta_gather if twin == "gather_triton" else found.lora_delta_grouped
        return run(*factors, own, weights, experts, add_to=add_to)

    @property
    def _dtype(self) -> torch.dtype:
        """What the experts compute in."""
        if self.cache is None:
            return self.lora_a.dtype
        return torch.promote_types(self.lora_a.dtype, self.weight.dtype)

    def _said_from_cache(
        self,
        cache: ExpertCache,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        add_to: Tensor | None,
    ) -> Tensor:
        """By the grouped twin, with each chosen expert copied to the device when missed."""
        starts = list(accumulate(self.ranks, initial=0))

        def own(e: int) -> tuple[Tensor, Tensor]:
            ranks = slice(starts[e], starts[e + 1])

            def load() -> tuple[Tensor, Tensor]:
                with torch.inference_mode(mode=False):  # gates may learn from them later
                    b = self.lora_b[:, ranks].T.to(x.device, x.dtype, copy=True).contiguous()
                    return self.lora_a[ranks].to(x.device, x.dtype, copy=True), b.T

            return cache.fetch((self._key, e, x.device, x.dtype), load)

        out = x.new_zeros(len(x), self.lora_b.shape[0]) if add_to is None else add_to
        return gather_grouped.add_grouped(x, own, self.ranks, self.scaling, weights, experts, out)

    def _fastest_twin(self, dtype: torch.dtype, experts: Tensor) -> Twin:
        if torch.compiler.is_compiling():
            return "dense"  # one graph, whatever was chosen
        num_tokens, top_k = experts.shape
        device = experts.device.type
        num_chosen = None
        if device == "cpu" and num_tokens > 1:
            counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
            num_chosen = int(counts.count_nonzero())
        return dispatch.choose_twin(num_tokens, top_k, self._sizes, dtype, device, num_chosen)

    def extra_repr(self) -> str:
        return f"E={self.num_experts}, ranks={self.ranks}"


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where a cache line begins: dot products are six times slower off 16 bytes."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def share_first_matmul(layers: Sequence[MoELoRALinear]) -> None:
    """Let layers compute A x together where they are called with one input, and no gradient is due.

    Args:
        layers: in the order of their calls; those behind the first follow its gate
    """
    if any(layer.cache is not None for layer in layers):
        return
    point = Point(layers)
    for place, layer in enumerate(layers):
        layer.point = point, place


def routed_layers(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Every routed layer by its module path, in the order of the model."""
    return {p: m for p, m in model.named_modules() if isinstance(m, MoELoRALinear)}
