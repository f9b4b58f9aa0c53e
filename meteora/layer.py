"""The routed layer: a frozen projection, a ragged stack of E LoRAs, and a router.

    before   q_proj: Linear(IN, OUT)
    after    q_proj: MoELoRALinear(that Linear, lora_a [R, IN], lora_b [OUT, R], router)

The layer keeps the signature of the projection that it replaces, so the base model's own code
runs unchanged: caches, padding, batches and beams included. What a router decided leaves by hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from meteora import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from meteora.routers import Router


class MoELoRALinear(nn.Module):
    """y = projection(x) + Σ_e w_e · scaling_e · B_e (A_e x), with w from the router.

    The adapters are buffers and never parameters: no optimiser can find them. Without a router
    (`router = None`) the layer is the bare projection.
    """

    lora_a: Tensor
    lora_b: Tensor
    rank_experts: Tensor
    rank_scaling: Tensor

    def __init__(
        self,
        projection: nn.Module,
        lora_a: Tensor,
        lora_b: Tensor,
        ranks: Sequence[int],
        scaling: Sequence[float],
        router: Router | None = None,
    ) -> None:
        """Wrap `projection`.

        Args:
            projection: any module from [..., IN] to [..., OUT]
            lora_a: [R, IN]
            lora_b: [OUT, R]
            ranks: of each expert, summing to R; zero where it lacks this layer
            scaling: of each expert
        """
        super().__init__()
        self.projection = projection
        self.ranks = list(ranks)
        self.scaling = list(scaling)
        self.register_buffer("lora_a", lora_a, persistent=False)
        self.register_buffer("lora_b", lora_b, persistent=False)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        self.register_buffer("rank_experts", owner.to(lora_a.device), persistent=False)
        self.register_buffer("rank_scaling", self._rank_scaling(), persistent=False)
        self.router = router

    def _rank_scaling(self) -> Tensor:
        """[R] float32, beside the experts."""
        per_rank = [s for s, r in zip(self.scaling, self.ranks, strict=True) for _ in range(r)]
        return torch.tensor(per_rank, dtype=torch.float32, device=self.lora_a.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to()` and its kin, but keep the scaling exact where the model narrows."""
        super()._apply(fn, recurse)
        self.rank_scaling = self._rank_scaling()
        return self

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def weight(self) -> Tensor:
        """The projection's own weight: base models ask for its dtype and device."""
        return self.projection.weight  # ty: ignore[invalid-explicit-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.projection(x)
        if self.router is None:
            return y
        tokens = x.reshape(-1, x.shape[-1])  # [T, IN]
        weights, experts = ops.route(
            self.router(tokens), self.router.top_k, self.router.temperature
        )
        delta = ops.lora_delta_dense(
            tokens.to(self.lora_a.dtype),
            self.lora_a,
            self.lora_b,
            self.rank_experts,
            self.rank_scaling,
            self.num_experts,
            weights,
            experts,
        )
        return y + delta.view(y.shape).to(y.dtype)

    def extra_repr(self) -> str:
        return f"E={self.num_experts}, ranks={self.ranks}"
