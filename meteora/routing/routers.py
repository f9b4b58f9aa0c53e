"""Router kinds: what gives a layer its expert logits. One engine, several ways to get them.

Every router is a module that takes tokens [T, IN] and returns logits [T, E], and carries the
`top_k`, `temperature` and `margin` with which `ops.route` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from meteora.kernels import reference

if TYPE_CHECKING:
    from torch import Tensor

    from meteora.routing.prompt_opening import Prefill


class Router(nn.Module):
    """Abstract: `forward` takes tokens [T, IN] and returns logits [T, E]."""

    def __init__(
        self, num_experts: int, top_k: int, temperature: float, margin: float | None = None
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.temperature = temperature
        self.margin = margin

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, both [T, K], of tokens [T, IN]."""
        return reference.route(self(tokens), self.top_k, self.temperature, self.margin)

    @property
    def leads(self) -> bool:
        """Whether other layers follow what is decided here."""
        return False

    def extra_repr(self) -> str:
        return f"E={self.num_experts}, top_k={self.top_k}, temperature={self.temperature}"


class Gate(Router):
    """The trained kind: logits = G x + c, in the precision of the gate (MeteoRA, section 3)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        margin: float | None = None,
        prefill: Prefill | None = None,
        followed: Followed | None = None,
    ) -> None:
        """Take G [E, IN] and c [E] as parameters.

        Args:
            prefill: decides for the opening of a prompt; without it each token for itself
            followed: where to leave the logits for the layers that follow this one
        """
        super().__init__(len(weight), top_k, temperature, margin)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.prefill = prefill
        self.followed = followed

    def logits(self, tokens: Tensor) -> Tensor:
        """Of each token by itself, [T, E]."""
        return nn.functional.linear(tokens.to(self.weight.dtype), self.weight, self.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits(tokens)
        if self.prefill is not None:
            logits = self.prefill.decide(logits)
        if self.followed is not None:
            self.followed.hold(logits)
        return logits

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        routes = super().choose(tokens)
        if self.followed is not None:
            self.followed.routes = (self.top_k, self.temperature, self.margin), routes
        return routes

    @property
    def leads(self) -> bool:
        return self.followed is not None


@dataclass
class Followed:
    """What one gate found in the present forward pass, for all that follow it."""

    logits: Tensor | None = None
    """[T, E]"""
    routes: tuple[tuple[int, float, float | None], tuple[Tensor, Tensor]] | None = None
    """The gate's `top_k`, `temperature` and `margin`, and its weights and experts [T, K]."""

    def hold(self, logits: Tensor) -> None:
        """Take new logits [T, E]; the routes of earlier ones hold no longer."""
        self.logits, self.routes = logits, None


class Follower(Router):
    """Takes over what a gate before it decided for the same tokens: one decision, many layers."""

    def __init__(
        self,
        followed: Followed,
        num_experts: int,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        margin: float | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, temperature, margin)
        self.followed = followed

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.followed.logits
        if logits is None or logits.shape[0] != tokens.shape[0]:
            raise RuntimeError(
                f"a layer with {len(tokens)} tokens follows a gate that saw"
                f" {0 if logits is None else len(logits)}; run the model from its first layer"
            )
        return logits

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, routes = self(tokens), self.followed.routes
        if routes is not None and routes[0] == (self.top_k, self.temperature, self.margin):
            return routes[1]
        return reference.route(logits, self.top_k, self.temperature, self.margin)


class Fixed(Router):
    """Given weights, the same for every token; one expert at weight 1 is plain PEFT."""

    def __init__(self, weights: Tensor) -> None:
        """Take weights [E] that are not negative and sum to one."""
        chosen = int((weights > 0).sum())
        super().__init__(len(weights), chosen, temperature=1.0)
        # the softmax of the logarithms gives the weights back, and exactly 1 for a single one
        self.register_buffer("logits", weights.float().log(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logits  # ty: ignore[invalid-assignment]
        return logits.expand(len(tokens), -1)


class Random(Router):
    """Logits drawn anew for every token: a control, to see what choosing well is worth.

    Seeded: two routers of one seed that are asked the same batches draw the same.
    """

    def __init__(
        self, num_experts: int, seed: int, *, top_k: int = 1, temperature: float = 1.0
    ) -> None:
        super().__init__(num_experts, top_k, temperature)
        self._generator = torch.Generator().manual_seed(seed)  # the same draws on every device

    def forward(self, tokens: Tensor) -> Tensor:
        drawn = torch.rand(len(tokens), self.num_experts, generator=self._generator)
        return drawn.to(tokens.device)


class Arrow(Router):
    """Logits |v_e · x|, v_e the direction that B_e A_e stretches most (arXiv 2405.11157).

    Needs no data; an expert that lacks the layer has logit 0.
    """

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        ranks: list[int],
        *,
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """Find v_e from A [R, IN] and B [OUT, R] by a singular value decomposition of r × r."""
        super().__init__(len(ranks), top_k, temperature)
        prototypes = torch.zeros(len(ranks), lora_a.shape[1], device=lora_a.device)
        for e, (a, b) in enumerate(_experts(lora_a, lora_b, ranks)):
            if len(a):
                # B A = Q_b (R_b R_aᵀ) Q_aᵀ: the right singular vectors are Q_a times those inside
                q_a, r_a = torch.linalg.qr(a.T)
                _, r_b = torch.linalg.qr(b)
                _, singular, right = torch.linalg.svd(r_b @ r_a.T)
                if singular[0] > 0:  # an expert that does nothing here has no direction
                    prototypes[e] = q_a @ right[0]
        self.register_buffer("prototypes", prototypes, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        prototypes: Tensor = self.prototypes  # ty: ignore[invalid-assignment]
        return (tokens.to(prototypes.dtype) @ prototypes.T).abs()


class Norm(Router):
    """Logits ‖scaling_e B_e A_e x‖, computed in rank space (arXiv 2504.03454, 2509.18093).

    Needs no data; an expert that lacks the layer has logit 0.
    """

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        ranks: list[int],
        scaling: Tensor,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """Fold scaling_e R_e A_e once, with B_e = Q_e R_e: ‖B_e A_e x‖ = ‖R_e A_e x‖."""
        super().__init__(len(ranks), top_k, temperature)
        folded = [
            scale * torch.linalg.qr(b).R @ a
            for (a, b), scale in zip(_experts(lora_a, lora_b, ranks), scaling.tolist(), strict=True)
        ]
        owner = torch.repeat_interleave(
            torch.arange(len(ranks)), torch.tensor([len(rows) for rows in folded])
        )
        self.register_buffer("folded", torch.cat(folded), persistent=False)  # [R, IN]
        self.register_buffer("owner", owner.to(lora_a.device), persistent=False)  # [R]

    def forward(self, tokens: Tensor) -> Tensor:
        folded: Tensor = self.folded  # ty: ignore[invalid-assignment]
        owner: Tensor = self.owner  # ty: ignore[invalid-assignment]
        squares = (tokens.to(folded.dtype) @ folded.T).square()  # [T, R]
        sums = squares.new_zeros(len(tokens), self.num_experts).index_add(1, owner, squares)
        return sums.sqrt()


def _experts(lora_a: Tensor, lora_b: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Each expert's A [r, IN] and B [OUT, r], in float32 at least."""
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    parts_a, parts_b = lora_a.to(wide).split(ranks), lora_b.to(wide).split(ranks, dim=1)
    return list(zip(parts_a, parts_b, strict=True))
