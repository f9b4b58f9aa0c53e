"""The arithmetic of routing and of the experts' update, as pure functions of tensors.

Axes, everywhere in `meteora`:
    T    tokens (batch × sequence)     IN   in_features of the layer
    E    experts: stacked adapters     OUT  out_features of the layer
    K    choices for one token         R    ranks of all experts together
    C    choices of a router: each expert, and others such as the base alone

`stack.ExpertStack` says which ranks of A [R, IN] and B [OUT, R] a choice has. `lora_delta_loop` is
the definition; every other `lora_delta_…` is a faster kernel of the same signature.
"""

import torch
from torch import Tensor

from meteora.kernels import onednn
from meteora.kernels.stack import ExpertStack


def route(
    logits: Tensor, top_k: int, temperature: float = 1.0, margin: float | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token, and weigh them.

    Semantics:
        experts[t] = topk(logits[t])
        weights[t] = softmax(logits[t, experts[t]] / temperature), in float32 at least, over logits
                     at most `margin` below the best

    Args:
        logits: [T, C]
        margin: None: all K experts have a weight

    Returns:
        weights [T, K], which sum to one over K, and experts [T, K]. K is at most C.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if top_k == 1:  # less work, and a compiler can fuse it with its neighbours
        experts = logits.argmax(dim=-1, keepdim=True)
        return torch.ones_like(experts, dtype=wide), experts
    top, experts = logits.to(wide).topk(min(top_k, logits.shape[-1]), dim=-1)
    if margin is not None:
        top = top.masked_fill(top < top[:, :1] - margin, -torch.inf)
    if temperature != 1.0:
        top = top / temperature
    return torch.softmax(top, dim=-1), experts


def lora_delta_loop(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """The update of the chosen experts, which is added to a layer's output: the definition.

    Semantics:
        delta[t] = Σ_k weights[t, k] · factor_c · Σ_j scaling_j · B[:, j] (A[j] · x[t])
                   with c = experts[t, k], and j over the ranks of choice c

    Args:
        x: [T, IN]
        stack: of C choices
        weights: [T, K]
        experts: [T, K], numbers of choices
        add_to: [T, OUT] to add to, in place

    Returns:
        [T, OUT] in the dtype of `x`, or `add_to`; sums are in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = x.new_zeros((len(x), len(stack.b)), dtype=wide)
    for c, (start, end, factor, _) in enumerate(stack.choices):
        a, b = (tensor.to(wide) for tensor in stack.pair(c))
        share = (weights * (experts == c)).sum(-1, keepdim=True) * factor  # [T, 1]
        scaling = stack.rank_scaling[start:end] * share  # an empty segment adds 0
        delta += scaling.to(wide) * (x.to(wide) @ a.T) @ b.T
    return delta.to(x.dtype) if add_to is None else add_to.add_(delta)


def rank_weights(weights: Tensor, experts: Tensor, choice_scaling: Tensor) -> Tensor:
    """The factor of every rank for every token: the weight of its choices times its scaling.

    Args:
        weights, experts: [T, K], from `route`
        choice_scaling: [C, R], from `ExpertStack.choice_scaling`

    Returns:
        [T, R]; zero for the ranks that no choice of the token holds.
    """
    if experts.shape[1] == 1:
        return choice_scaling.index_select(0, experts[:, 0]) * weights
    shares = weights.new_zeros((len(weights), len(choice_scaling)))
    shares = shares.scatter_add(1, experts, weights)  # [T, C]
    return shares @ choice_scaling.to(shares.dtype)


def lora_delta_dense(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """`lora_delta_loop` as two matmuls over all ranks, with factors between them.

    Static shapes, no loop over experts, no gather of weights; the extra memory is [T, R]. Best
    while R is small against IN, since the ranks of all experts are computed.
    """
    factors = rank_weights(weights, experts, stack.choice_scaling())
    shrunk = (onednn.linear(x, stack.a) * factors).to(x.dtype)
    if add_to is None:
        return onednn.linear(shrunk, stack.b)
    return add_expanded(shrunk, stack.b, add_to)


def add_expanded(shrunk: Tensor, b: Tensor, add_to: Tensor, *, share: float = 1.0) -> Tensor:
    """Add `share` · shrunk [T, R] · Bᵀ, with B [OUT, R], to `add_to` [T, OUT] in place."""
    if add_to.dtype == shrunk.dtype:
        return add_to.addmm_(shrunk, b.T, alpha=share)
    return add_to.add_(shrunk @ b.T, alpha=share)


def add_projected(addend: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The sum addend + x W of x [T, IN] and W [IN, OUT]; in place if nothing needs a gradient.

    In 16 bits a matmul keeps its sums in float32 and rounds them once at the end, and the addend
    [T, OUT] is the first term of each sum. Adding it to a rounded product would round twice.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (addend, x, weight)):
        return torch.addmm(addend, x, weight)
    return addend.addmm_(x, weight)
