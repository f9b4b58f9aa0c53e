"""Faster twins of `ops.lora_delta_loop`, and which of them is fastest where.

    dense     in `ops`: every rank for every token, two plain matmuls, static shapes
    gather    only the chosen ranks of each token, read where they lie
    grouped   tokens sorted by expert, then two matmuls an expert

None makes a private copy of A or B for a token, and none needs memory of IN or OUT times the tokens
beyond its result: with `add_to` they add to the projection's own output, a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Twin = Literal["dense", "gather", "grouped"]

ROWS_AT_ONCE = 256
"""Rows [·, IN] or [·, OUT] that are held beside the result: their number does not grow with T."""

SUM = 0
"""The mode of torch's embedding bags that adds rows up."""


@dataclass(frozen=True)
class _Costs:
    """Of one token, in units of what one rank costs it in a large matmul."""

    gather: float
    """A chosen rank, where there are many tokens."""
    gather_half: float
    """With this many tokens it costs half of that: few tokens wait for memory in any twin."""
    gather_call: float
    """A call, times (IN + OUT) and divided by T."""
    grouped: float
    """A chosen rank."""
    grouped_row: float
    """Copying one row in and one out, for each of K experts."""
    grouped_call: float
    """The matmuls of one expert, times (IN + OUT) and divided by T."""


_WIDE = _Costs(
    gather=3.5,
    gather_half=2,
    gather_call=4e5,
    grouped=1.3,
    grouped_row=30,
    grouped_call=1e6,
)
_NARROW = _Costs(
    gather=12,
    gather_half=12,
    gather_call=0,
    grouped=1.4,
    grouped_row=70,
    grouped_call=1.2e7,
)


class Sizes(NamedTuple):
    """What of a layer decides which twin is fastest."""

    num_in: int
    num_out: int
    num_experts: int
    num_ranks: int
    """R, of all experts together"""
    max_rank: int


def choose_twin(
    num_tokens: int, top_k: int, sizes: Sizes, dtype: torch.dtype, device_type: str
) -> Twin:
    """The fastest twin by the costs above, which were fitted to measurements.

    Time of a routed layer, gate and routing included, over that of the bare one: 2048 → 2048,
    top-2, random routes, one AMD EPYC core with AVX-512, torch 2.13; what is chosen is starred.

        E × r      tokens     32 bits: dense  gather  grouped     16 bits: dense  gather  grouped
        4 × 8           1              1.20*   1.46     1.43                1.34   1.33*     1.57
        4 × 8         256              1.03*   1.11     1.18                1.12*  1.28      1.28
        28 × 8          1              1.59    1.51*    1.65                1.70   1.44*     1.78
        28 × 8        256              1.28    1.11*    1.13                1.42   1.37*     1.63
        28 × 16       256              1.51    1.18*    1.15                1.63   1.48*     1.52
        28 × 16      2048              1.48    1.12     1.12*               1.59   1.46      1.30*
        28 × 64       256              2.82    1.45     1.32*               3.23   2.74      1.98*
        28 × 64      2048              2.95    1.42     1.21*               3.82   2.54      1.40*
        512 × 8         1              5.91    1.71*    2.76                9.40   2.35*     3.85
        512 × 8       256              5.34    1.40*    1.67                6.20   1.89*     4.54

    All twins are linear in IN + OUT, so the sizes of a layer matter only for small ones, where the
    calls themselves show. On accelerators nothing has been measured yet: there it is `dense`, which
    never waits for the host. `python -m tests.benchmarks.twins` measures again.
    """
    if device_type != "cpu":
        return "dense"
    cost = _WIDE if dtype.itemsize >= 4 else _NARROW
    chosen = top_k * sizes.max_rank
    num_tokens = max(num_tokens, 1)
    size = num_tokens * (sizes.num_in + sizes.num_out)
    saturation = num_tokens / (num_tokens + cost.gather_half)
    num_calls = min(sizes.num_experts, num_tokens * top_k)
    costs: dict[Twin, float] = {
        "dense": sizes.num_ranks,
        "gather": cost.gather * saturation * chosen + cost.gather_call / size,
        "grouped": (
            cost.grouped * chosen + cost.grouped_row * top_k + cost.grouped_call * num_calls / size
        ),
    }
    return min(costs, key=costs.__getitem__)


def rank_table(ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which ranks each expert owns, [E, max r], and where that is so; elsewhere it says rank 0."""
    widths = torch.tensor(ranks)
    starts = widths.cumsum(0) - widths
    columns = torch.arange(int(widths.max()))
    owned = columns < widths[:, None]
    return (starts[:, None] + columns) * owned, owned


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


def chosen_dots(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """dots[t, n] = x[t] · rows[index[t, n]] of x [T, D], rows [R, D] and index [T, N]: [T, N]."""
    if torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad):
        return _ChosenDots.apply(x, rows, index)
    return _dots(x, rows, index)


def _dots(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """No copy of the rows: it is the gradient of an embedding bag for its per-sample weights."""
    num_tokens, num_chosen = index.shape
    bags = torch.arange(num_tokens, device=x.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(),
        rows,
        index.reshape(-1),
        bags * num_chosen,
        bags.repeat_interleave(num_chosen, output_size=index.numel()),
        SUM,
    )
    return dots.view(num_tokens, num_chosen)


def chosen_sums(rows: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """sums[t] = Σ_n factors[t, n] · rows[index[t, n]] of rows [R, D], index and factors [T, N]."""
    return torch.nn.functional.embedding_bag(
        index, rows, mode="sum", per_sample_weights=factors.contiguous()
    )


def lora_delta_gather(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    table: Tensor,
    table_scaling: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    add_to: Tensor | None = None,
) -> Tensor:
    """`lora_delta_loop` over the chosen ranks alone, K · max r a token.

    Static shapes and no waiting for the host. Experts of fewer ranks are filled up with rank 0 at
    scaling 0. Fastest where `b.T` is contiguous.

    Args:
        table: [E, max r], from `rank_table`
        table_scaling: [E, max r], the scaling of the expert; 0 where the table fills up
        add_to: [T, OUT] to add to, in place
    """
    owners = experts.flatten()
    index = table.index_select(0, owners).view(len(x), experts.shape[1] * table.shape[1])
    factors = table_scaling.index_select(0, owners) * weights.reshape(-1, 1)
    shrunk = (chosen_dots(x, a, index) * factors.view(index.shape)).to(x.dtype)
    if add_to is None:
        return chosen_sums(b.T, index, shrunk)
    if len(x) <= ROWS_AT_ONCE:
        return add_to.add_(chosen_sums(b.T, index, shrunk))
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        add_to[rows].add_(chosen_sums(b.T, index[rows], shrunk[rows]))
    return add_to


def lora_delta_grouped(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    weights: Tensor,
    experts: Tensor,
    *,
    add_to: Tensor | None = None,
) -> Tensor:
    """`lora_delta_loop` as two matmuls for each expert that was chosen, over its own tokens.

    How many tokens an expert has decides the shapes, so an accelerator waits for the host.

    Args:
        add_to: [T, OUT] to add to, in place
    """
    out = x.new_zeros(len(x), len(b)) if add_to is None else add_to
    owners = experts.flatten()
    order = owners.argsort(stable=True)
    tokens = order.div(experts.shape[1], rounding_mode="floor")
    shares = weights.flatten()[order, None]  # [T · K, 1]
    counts = torch.bincount(owners, minlength=len(ranks)).tolist()
    rank = pair = 0
    for r, scale, count in zip(ranks, scaling, counts, strict=True):
        own_a, own_b = a[rank : rank + r], b[:, rank : rank + r]
        for start in range(pair, pair + count if r else pair, ROWS_AT_ONCE):
            pairs = slice(start, min(start + ROWS_AT_ONCE, pair + count))
            shrunk = x.index_select(0, tokens[pairs]) @ own_a.T * (shares[pairs] * scale)
            added = shrunk.to(x.dtype) @ own_b.T
            out.index_add_(0, tokens[pairs], added.to(out.dtype))
        rank, pair = rank + r, pair + count
    return out
