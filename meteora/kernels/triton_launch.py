"""Launch Triton's kernels for `gather` and `grouped`, on GPUs.

    gather    [token, choice] ─shrink▶ [T, K, W] ─expand▶ added to the output
    grouped   the same in tiles of tokens that made one choice, on tensor cores

W is the number of ranks of the widest choice. Any rank works: a tile masks places beyond the ranks
of its choice. Sums are in float32 at least. Shapes do not depend on the choices, so nothing waits
for the host. Import this module by `gather_grouped.triton_launch`, since it imports Triton.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from meteora.kernels import reference, triton_kernels
from meteora.kernels.stack import ExpertStack

BLOCK_IN = 128
BLOCK_OUT = 128
BLOCK_TOKENS = 32


TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _gather(x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, out: Tensor) -> None:
    a, b, (starts, widths) = stack.a.contiguous(), stack.b, stack.segments
    max_width = stack.sizes.max_width
    num_tokens, top_k = experts.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shrunk = x.new_empty(num_tokens, top_k, max_width, dtype=wide)
    # few tokens have few pairs: two ranks for each program spread them over the device
    few = 2 if num_tokens <= 16 else 8
    triton_kernels.shrink_chosen[(experts.numel(), triton.cdiv(max_width, few))](
        x, a, starts, widths, stack.rank_scaling, stack.factors, weights, experts, shrunk,
        x.shape[1], top_k, max_width,
        WIDE=TYPES[wide], RANKS=few, COLUMNS=4 * BLOCK_IN,
    )  # fmt: skip
    triton_kernels.expand_chosen[(num_tokens, triton.cdiv(out.shape[1], BLOCK_OUT))](
        shrunk, b, starts, widths, experts, out,
        out.shape[1], top_k, max_width, b.stride(1), b.stride(0),
        WIDE=TYPES[wide], RANKS=8, COLUMNS=BLOCK_OUT,
    )  # fmt: skip


def _jobs(experts: Tensor, num_choices: int) -> tuple[Tensor, Tensor]:
    """The tokens of each slot sorted by choice, [K, T], and tiles of them, [K, jobs, 3].

    A tile is (choice, begin, end) within the slot. The number of tiles is an upper bound that the
    host knows; surplus tiles are empty.
    """
    num_tokens = len(experts)
    owners, tokens = experts.T.contiguous().sort(dim=1, stable=True)
    top_k = len(owners)
    every = torch.arange(num_choices + 1, device=experts.device).expand(top_k, -1).contiguous()
    bounds = torch.searchsorted(owners, every)  # [K, E + 1]
    tiles = (bounds.diff(dim=1) + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tiles.cumsum(1)
    most = triton.cdiv(num_tokens, BLOCK_TOKENS) + min(num_choices, num_tokens)
    numbers = torch.arange(most, device=experts.device).expand(top_k, -1).contiguous()
    choice = torch.searchsorted(ends, numbers, right=True)
    owner = choice.clamp_max(num_choices - 1)
    begin = bounds.gather(1, owner) + (numbers - (ends - tiles).gather(1, owner)) * BLOCK_TOKENS
    end = torch.where(choice < num_choices, bounds.gather(1, owner + 1), begin)
    return tokens, torch.stack([owner, begin, end], dim=2)


def _grouped(x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, out: Tensor) -> None:
    a, b, (starts, widths) = stack.a.contiguous(), stack.b, stack.segments
    max_width = stack.sizes.max_width
    num_tokens, top_k = experts.shape
    tokens, jobs = _jobs(experts, stack.num_choices)
    shrunk = x.new_empty(top_k, num_tokens, max_width)
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks = min(64, max(16, triton.next_power_of_2(max_width)))
    constants = {
        "WIDE": TYPES[wide],
        # numpy, which interprets kernels, has no bfloat16 to multiply
        "DOT": TYPES[wide if knobs.runtime.interpret else x.dtype],
        "TOKENS": BLOCK_TOKENS,
        "RANKS": ranks,
    }
    num_jobs = jobs.shape[1]
    triton_kernels.shrink_grouped[(top_k * num_jobs, triton.cdiv(max_width, ranks))](
        x, a, starts, widths, stack.rank_scaling, stack.factors, weights, tokens, jobs, shrunk,
        num_tokens, x.shape[1], top_k, max_width, num_jobs,
        COLUMNS=BLOCK_IN // 2, **constants,
    )  # fmt: skip
    for slot in range(top_k):  # one after the other, so that only one tile adds to a token
        triton_kernels.expand_grouped[(num_jobs, triton.cdiv(out.shape[1], BLOCK_OUT))](
            shrunk[slot], b, starts, widths, tokens[slot], jobs[slot], out,
            out.shape[1], max_width, b.stride(1), b.stride(0),
            COLUMNS=BLOCK_OUT, **constants,
        )  # fmt: skip


class _Differentiable(torch.autograd.Function):
    """Forward by kernels; backward through the dense kernel, which is computed again.

    A and B are arguments beside their stack, so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        run: Callable[..., None],
        x: Tensor,
        a: Tensor,
        b: Tensor,
        stack: ExpertStack,
        weights: Tensor,
        experts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, weights, experts)
        ctx.stack = stack
        return _launch(run, x, stack, weights, experts, x.new_zeros(len(x), len(b)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        stack, experts = ctx.stack, ctx.saved_tensors[-1]
        x, a, b, weights = (tensor.detach() for tensor in ctx.saved_tensors[:-1])
        leaves = {1: x, 2: a, 3: b, 5: weights}
        inputs = {n: t.requires_grad_() for n, t in leaves.items() if ctx.needs_input_grad[n]}
        with torch.enable_grad():
            factors = reference.rank_weights(weights, experts, stack.choice_scaling())
            delta = ((x @ a.T) * factors).to(x.dtype) @ b.T
        grads = dict(
            zip(inputs, torch.autograd.grad(delta, list(inputs.values()), grad), strict=True)
        )
        return tuple(grads.get(n) for n in range(7))


def _launch(
    run: Callable[..., None],
    x: Tensor,
    stack: ExpertStack,
    weights: Tensor,
    experts: Tensor,
    out: Tensor,
) -> Tensor:
    """Run kernels on the device of the tensors: Triton itself uses the current device."""
    if len(x) and stack.sizes.max_width:
        with torch.cuda.device_of(x):
            run(x, stack, weights, experts, out)
    return out


def _add(
    run: Callable[..., None],
    x: Tensor,
    stack: ExpertStack,
    weights: Tensor,
    experts: Tensor,
    add_to: Tensor | None,
) -> Tensor:
    x, weights, experts = (tensor.contiguous() for tensor in (x, weights, experts))
    a, b = stack.a, stack.b
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, b, weights)):
        delta = _Differentiable.apply(run, x, a, b, stack, weights, experts)
        return delta if add_to is None else add_to.add_(delta)
    start = x.new_zeros(len(x), len(b)) if add_to is None else add_to
    out = _launch(run, x, stack, weights, experts, start.contiguous())
    return start if out is start else start.copy_(out)  # kernels need contiguous rows


def lora_delta_gather(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """`reference.lora_delta_loop`, one token at a time: for decoding."""
    return _add(_gather, x, stack, weights, experts, add_to)


def lora_delta_grouped(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """`reference.lora_delta_loop`, one tile of tokens of one choice at a time: for prefills."""
    return _add(_grouped, x, stack, weights, experts, add_to)
