"""Faster kernels than `reference.lora_delta_loop`; `dispatch` chooses among them.

    gather    only the chosen ranks of each token, without copying them
    grouped   tokens sorted by choice, then two matmuls for each choice
    gather_triton, grouped_triton   the same for GPUs, in `triton_launch`

None copies A or B for each token, and none needs [T, IN] or [T, OUT] beside its result: with
`add_to` they add to the projection's own output, a few rows at a time.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora.kernels import onednn, reference
from meteora.kernels.stack import ExpertStack

ROWS_AT_ONCE = 256
"""Rows [·, IN] or [·, OUT] that are in memory beside the result, whatever T is."""

NEAR_BYTES = 2 << 20
"""The size of one core's cache. If the rows are larger, and several tokens read each of them, the
tokens are sorted by expert: up to two fifths less time in 32 bits."""

SPARSE_NUMBERS = 1 << 17
"""A result of more numbers is summed up by a sparse matmul, if there is one: it adds in place, and
takes up to half less time. For fewer numbers its set-up takes longer."""

SUM = 0
"""The mode of torch's embedding bags that adds rows up."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed; warns once if it is not."""
    if find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is not installed, so every expert is computed for every token; install it with"
        " `pip install triton`",
        stacklevel=2,
    )
    return False


def triton_launch() -> ModuleType:
    """The module `triton_launch`, imported when it is first needed."""
    from meteora.kernels import triton_launch as launch  # noqa: PLC0415  (Triton is optional, and slow to import)

    return launch


class _ChosenDots(torch.autograd.Function):
    """`_dots` with gradients for the tokens and for the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, index: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, rows, index)
        return _dots(x, rows, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
        x, rows, index = ctx.saved_tensors
        for_x = for_rows = None
        if ctx.needs_input_grad[0]:
            for_x = chosen_sums(rows, index, grad)
        if ctx.needs_input_grad[1]:
            shares = grad.new_zeros(len(x), len(rows)).scatter_add_(1, index, grad)
            for_rows = shares.T @ x
        return for_x, for_rows, None


def chosen_dots(x: Tensor, rows: Tensor, index: Tensor, width: int) -> Tensor:
    """dots[t, n] = x[t] · rows[index[t, n]] of x [T, D], rows [R, D] and index [T, N]: [T, N].

    If nothing needs a gradient, several indices may be stacked: [L, T, N].

    Args:
        width: the N indices are groups of so many neighbouring rows, those of one expert
    """
    if torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad):
        return _ChosenDots.apply(x, rows, index)
    return _dots(x, rows, index, width)


def _dots(x: Tensor, rows: Tensor, index: Tensor, width: int = 1) -> Tensor:
    """As `chosen_dots`; the gradient of an embedding bag computes this without copying rows."""
    if not len(rows):
        return x.new_zeros(index.shape)
    num_tokens, num_chosen = index.shape[-2:]
    bags = torch.arange(num_tokens, device=x.device)
    owners = bags.repeat_interleave(num_chosen, output_size=num_tokens * num_chosen)
    if index.dim() == 3:
        owners = owners.repeat(len(index))
    groups, owners, order = index.reshape(-1, width), owners.view(-1, width), None
    if rows.nbytes > NEAR_BYTES and index.numel() >= 2 * len(rows):
        order = groups[:, 0].argsort()
        groups, owners = groups[order], owners[order]
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, groups.flatten(), bags * num_chosen, owners.flatten(), SUM
    ).view(groups.shape)
    if order is not None:
        dots = torch.empty_like(dots).index_copy_(0, order, dots)
    return dots.view(index.shape)


def chosen_sums(rows: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """sums[t] = Σ_n factors[t, n] · rows[index[t, n]] of rows [R, D], index and factors [T, N]."""
    if not len(rows):  # a layer without experts, whose gate decides for others
        return factors.new_zeros(len(factors), rows.shape[1])
    return torch.nn.functional.embedding_bag(
        index, rows, mode="sum", per_sample_weights=factors.contiguous()
    )


def lora_delta_gather(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """`lora_delta_loop` over the chosen ranks alone: K · W for a token, W of the widest choice.

    Static shapes, and no waiting for the host. Choices of fewer ranks are filled up with rank 0 at
    scaling 0. Fastest if `b.T` is contiguous.
    """
    table, scaling = stack.rank_table()
    owners, rows = experts.flatten(), stack.b.T
    index = table.index_select(0, owners).view(len(x), experts.shape[1] * table.shape[1])
    factors = scaling.index_select(0, owners) * weights.reshape(-1, 1)
    dots = chosen_dots(x, stack.a, index, table.shape[1])
    shrunk = (dots * factors.view(index.shape)).to(x.dtype)
    return add_sums(rows, index, shrunk, add_to)


def add_sums(rows: Tensor, index: Tensor, factors: Tensor, add_to: Tensor | None) -> Tensor:
    """Add `chosen_sums` to `add_to` [T, D] in place, a few tokens at a time; None: a new tensor."""
    if add_to is None:
        return chosen_sums(rows, index, factors)
    if not len(rows):
        return add_to
    if add_to.numel() > SPARSE_NUMBERS and _has_sparse_sums(rows, factors, add_to):
        ends = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
        chosen = torch.sparse_csr_tensor(
            ends,
            index.reshape(-1).int(),
            factors.reshape(-1),
            (len(index), len(rows)),
            check_invariants=False,
        )
        return torch.addmm(add_to, chosen, rows, out=add_to)
    if len(add_to) <= ROWS_AT_ONCE:
        return add_to.add_(chosen_sums(rows, index, factors))
    for start in range(0, len(add_to), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        add_to[part].add_(chosen_sums(rows, index[part], factors[part]))
    return add_to


def _has_sparse_sums(*factors: Tensor) -> bool:
    """Whether torch multiplies such sparse matrices fast, by Intel's library."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in factors):
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in factors) and _has_mkl()


@cache
def _has_mkl() -> bool:
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():
        # the first matrix of a process warns that torch may change this interface
        warnings.filterwarnings("ignore", message="Sparse CSR")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
    return True


def lora_delta_grouped(
    x: Tensor, stack: ExpertStack, weights: Tensor, experts: Tensor, *, add_to: Tensor | None = None
) -> Tensor:
    """`lora_delta_loop` as two matmuls for each choice that was made, over its own tokens.

    The shapes depend on the number of tokens of a choice, so an accelerator waits for the host.

    Args:
        experts: [T, K], K different ones for each token, as `route` gives them
    """
    return add_grouped(x, stack, weights, experts, add_to, stack.pair)


def add_grouped(
    x: Tensor,
    stack: ExpertStack,
    weights: Tensor,
    experts: Tensor,
    add_to: Tensor | None,
    pair: Callable[[int], tuple[Tensor, Tensor]],
) -> Tensor:
    """`lora_delta_grouped` with A and B from `pair`, which is called once for each choice.

    Args:
        pair: A [r, IN] and B [OUT, r] of a choice; only for one that was made and has ranks
    """
    widths = stack.widths
    out = x.new_zeros(len(x), len(stack.b)) if add_to is None else add_to
    if x.shape[0] == 1 and not (weights.requires_grad and torch.is_grad_enabled()):
        # one token needs no sorting, and its weights can be numbers: a third of the calls
        for c, weight in zip(experts.tolist()[0], weights.tolist()[0], strict=True):
            if not widths[c]:
                continue
            (a, b), scale = pair(c), stack.scale(c)
            shrunk = onednn.linear(x, a)
            if isinstance(scale, float):
                reference.add_expanded(shrunk, b, out, share=weight * scale)
            else:
                reference.add_expanded((shrunk * scale).to(x.dtype), b, out, share=weight)
        return out
    owners = experts.flatten()
    order = owners.argsort(stable=True)
    tokens = order.div(experts.shape[1], rounding_mode="floor")
    shares = weights.flatten()[order, None]  # [T · K, 1]
    counts = torch.bincount(owners, minlength=len(widths)).tolist()
    every: list[tuple[Tensor, Tensor, Tensor]] = []
    end = 0
    for c, count in enumerate(counts):
        first, end = end, end + count
        if not (count and widths[c]):
            continue
        (a, b), scale = pair(c), stack.scale(c)
        if count == x.shape[0]:  # every token, in order: no rows to look up
            every.append((a, b, (shares[first:end] * scale).expand(-1, len(a))))
            continue
        for start in range(first, end, ROWS_AT_ONCE):
            pairs = slice(start, min(start + ROWS_AT_ONCE, end))
            rows = x.index_select(0, tokens[pairs])
            shrunk = onednn.linear(rows, a) * (shares[pairs] * scale)
            added = onednn.linear(shrunk.to(x.dtype), b)
            out.index_add_(0, tokens[pairs], added.to(out.dtype))
    if every:
        a, b, factors = (
            torch.cat(parts, dim) if len(parts) > 1 else parts[0]
            for parts, dim in zip(zip(*every, strict=True), (0, 1, 1), strict=True)
        )
        reference.add_expanded((onednn.linear(x, a) * factors).to(x.dtype), b, out)
    return out
