"""The arithmetic, as pure functions of tensors.

Axes, everywhere in `meteora`:
    T    tokens (batch × sequence)     IN   in_features of the layer
    E    experts: stacked adapters     OUT  out_features of the layer
    K    experts chosen per token      R    ranks of all experts together

Expert e owns the ranks offsets[e]:offsets[e + 1] of A [R, IN] and B [OUT, R]; none, if it lacks
the layer. `lora_delta_loop` is the definition; every other `lora_delta_…` is a faster twin of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def route(
    logits: Tensor, top_k: int, temperature: float = 1.0, margin: float | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token, and weigh them.

    Semantics:
        experts[t] = topk(logits[t])
        weights[t] = softmax(logits[t, experts[t]] / temperature), in float32 at least, over those
                     that are at most `margin` below the best

    Args:
        logits: [T, E]
        margin: without it all K experts have a weight

    Returns:
        weights [T, K], which sum to one over K, and experts [T, K]. K is at most E.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    top, experts = logits.to(wide).topk(min(top_k, logits.shape[-1]), dim=-1)
    if margin is not None:
        top = top.masked_fill(top < top[:, :1] - margin, -torch.inf)
    if temperature != 1.0:
        top = top / temperature
    return torch.softmax(top, dim=-1), experts


def lora_delta_loop(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: list[int],
    scaling: Tensor,
    weights: Tensor,
    experts: Tensor,
) -> Tensor:
    """What the chosen experts add to a layer's output: the definition.

    Semantics:
        delta[t] = Σ_k weights[t, k] · scaling[e] · B_e (A_e x[t])     with e = experts[t, k]

    Args:
        x: [T, IN]
        a: [R, IN]
        b: [OUT, R]
        ranks: E numbers that sum to R; zero where an expert lacks the layer
        scaling: [E]
        weights: [T, K]
        experts: [T, K]

    Returns:
        [T, OUT] in the dtype of `x`; sums are taken in float32 where that is wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = x.new_zeros((len(x), len(b)), dtype=wide)
    start = 0
    for e, r in enumerate(ranks):
        own_a, own_b = a[start : start + r].to(wide), b[:, start : start + r].to(wide)
        share = (weights * (experts == e)).sum(-1, keepdim=True) * scaling[e]  # [T, 1]
        delta += share.to(wide) * (x.to(wide) @ own_a.T @ own_b.T)  # an empty segment adds 0
        start += r
    return delta.to(x.dtype)


def rank_weights(
    weights: Tensor, experts: Tensor, rank_experts: Tensor, rank_scaling: Tensor, num_experts: int
) -> Tensor:
    """The factor of every rank for every token: its expert's weight times its scaling.

    Args:
        weights, experts: [T, K], from `route`
        rank_experts: [R], the expert that owns each rank
        rank_scaling: [R], that expert's scaling

    Returns:
        [T, R]; zero for the ranks of experts that were not chosen.
    """
    shares = weights.new_zeros((len(weights), num_experts))
    shares = shares.scatter_add(1, experts, weights)  # [T, E]
    return shares[:, rank_experts] * rank_scaling


def lora_delta_dense(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    rank_experts: Tensor,
    rank_scaling: Tensor,
    num_experts: int,
    weights: Tensor,
    experts: Tensor,
    *,
    add_to: Tensor | None = None,
) -> Tensor:
    """`lora_delta_loop` as two matmuls over all ranks and one mask between them.

    Static shapes, no loop over experts, no gather of weights; the extra memory is [T, R]. Best
    while R is small against IN, since the ranks of experts that were not chosen are computed too.

    Args:
        add_to: [T, OUT] to add to, in place
    """
    shrunk = shrink_dense(x, a, rank_experts, rank_scaling, num_experts, weights, experts)
    return shrunk @ b.T if add_to is None else add_expanded(shrunk, b, add_to)


def shrink_dense(
    x: Tensor,
    a: Tensor,
    rank_experts: Tensor,
    rank_scaling: Tensor,
    num_experts: int,
    weights: Tensor,
    experts: Tensor,
) -> Tensor:
    """The first half of `lora_delta_dense`: [T, R], zero for experts that were not chosen."""
    shrunk = (x @ a.T) * rank_weights(weights, experts, rank_experts, rank_scaling, num_experts)
    return shrunk.to(x.dtype)


def add_expanded(shrunk: Tensor, b: Tensor, add_to: Tensor, *, share: float = 1.0) -> Tensor:
    """The second half: `share` times B [OUT, R] of shrunk [T, R], added to [T, OUT] in place."""
    if add_to.dtype == shrunk.dtype:
        return add_to.addmm_(shrunk, b.T, alpha=share)
    return add_to.add_(shrunk @ b.T, alpha=share)


def add_projected(addend: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The sum addend + x W of x [T, IN] and W [IN, OUT]; in place where no gradient is due.

    In 16 bits a matmul keeps its sums in float32 and rounds them once at the end, and an addend
    [T, OUT] is the first term of each. To add it to a product that is rounded already would round
    the result twice.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (addend, x, weight)):
        return torch.addmm(addend, x, weight)
    return addend.addmm_(x, weight)
