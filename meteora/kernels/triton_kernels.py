"""Four kernels in Triton's language, which `triton_launch` launches: shrink, then expand.

A tile may be larger than the ranks of a choice; the rest is masked, so any rank works. Tiles are
enough for the widest choice, which can be all experts; those of narrower ones end at once. Offsets
have 64 bits, since tokens times OUT, or R times IN, may need more than 32. WIDE is the dtype of
sums, DOT that of the tensor cores' factors; RANKS, TOKENS and COLUMNS are the sizes of a tile.
Triton compiles a kernel again for integers and pointers that are multiples of 16. It must not do so
for arguments that depend on the number of tokens, or many prompts would wait for a compilation.
"""

# ruff: noqa: ANN001, ANN201, N803  (arguments are pointers, and constants in capitals)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shrink_chosen(
    x, a, starts, widths, rank_scaling, factors, weights, experts, shrunk,
    num_in, top_k, max_width,
    WIDE: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """shrunk[t, k, j] = weights[t, k] · factor_c · scaling_j · A_c[j] · x[t] for a few j."""
    pair = tl.program_id(0).to(tl.int64)
    c = tl.load(experts + pair)
    width = tl.load(widths + c)
    if tl.program_id(1) * RANKS >= width:
        return
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    owned = j < width
    rank = tl.load(starts + c) + j
    rows = a + rank[:, None] * num_in
    sums = tl.zeros((RANKS,), dtype=WIDE)
    for start in range(0, num_in, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        token = tl.load(x + pair // top_k * num_in + i, mask=i < num_in, other=0.0).to(WIDE)
        inside = owned[:, None] & (i < num_in)[None, :]
        sums += tl.sum(tl.load(rows + i[None, :], mask=inside, other=0.0).to(WIDE) * token, axis=1)
    factor = tl.load(weights + pair).to(WIDE) * tl.load(factors + c).to(WIDE)
    scaling = tl.load(rank_scaling + rank, mask=owned, other=0.0).to(WIDE)
    tl.store(shrunk + pair * max_width + j, sums * factor * scaling, mask=j < max_width)


@triton.jit
def expand_chosen(
    shrunk, b, starts, widths, experts, out,
    num_out, top_k, max_width, b_rank_stride, b_out_stride,
    WIDE: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] += Σ_k B_c shrunk[t, k] for some columns of one token."""
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    place = out + t * num_out + o
    sums = tl.load(place, mask=o < num_out, other=0.0).to(WIDE)
    for k in range(top_k):
        pair = t * top_k + k
        c = tl.load(experts + pair)
        start, r = tl.load(starts + c), tl.load(widths + c)
        for first in range(0, r, RANKS):
            j = first + tl.arange(0, RANKS)
            left = tl.load(shrunk + pair * max_width + j, mask=j < r, other=0.0)
            rows = b + (start + j)[:, None] * b_rank_stride + o[None, :] * b_out_stride
            inside = (j < r)[:, None] & (o < num_out)[None, :]
            loaded = tl.load(rows, mask=inside, other=0.0).to(WIDE)
            sums += tl.sum(loaded * left[:, None], axis=0)
    tl.store(place, sums.to(out.dtype.element_ty), mask=o < num_out)


@triton.jit(do_not_specialize=["num_tokens", "jobs_per_slot"])
def shrink_grouped(
    x, a, starts, widths, rank_scaling, factors, weights, tokens, jobs, shrunk,
    num_tokens, num_in, top_k, max_width, jobs_per_slot,
    WIDE: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of `shrunk`: tokens whose k-th choice is the same, where k is the slot."""
    job = tl.program_id(0).to(tl.int64)
    slot = job // jobs_per_slot
    row = jobs + job * 3
    c, begin, end = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    width = tl.load(widths + c)
    if (begin >= end) | (tl.program_id(1) * RANKS >= width):
        return
    place = begin + tl.arange(0, TOKENS)
    t = tl.load(tokens + slot * num_tokens + place, mask=place < end, other=0)
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    owned = j < width
    rank = tl.load(starts + c) + j
    rows = a + rank[None, :] * num_in
    sums = tl.zeros((TOKENS, RANKS), dtype=WIDE)
    for start in range(0, num_in, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        inside = (place < end)[:, None] & (i < num_in)[None, :]
        left = tl.load(x + t[:, None] * num_in + i[None, :], mask=inside, other=0.0)
        inside = (i < num_in)[:, None] & owned[None, :]
        right = tl.load(rows + i[:, None], mask=inside, other=0.0)
        left, right = left.to(DOT), right.to(DOT)
        sums = tl.dot(left, right, sums, input_precision="ieee", out_dtype=WIDE)
    factor = tl.load(weights + t * top_k + slot, mask=place < end, other=0.0).to(WIDE)
    factor *= tl.load(factors + c).to(WIDE)
    scaling = tl.load(rank_scaling + rank, mask=owned, other=0.0).to(WIDE)
    sums *= factor[:, None] * scaling[None, :]
    to = shrunk + (slot * num_tokens + place)[:, None] * max_width + j[None, :]
    inside = (place < end)[:, None] & (j < max_width)[None, :]
    tl.store(to, sums.to(shrunk.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["tokens", "jobs"])
def expand_grouped(
    shrunk, b, starts, widths, tokens, jobs, out,
    num_out, max_width, b_rank_stride, b_out_stride,
    WIDE: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] += B_c shrunk[t] for a tile of one slot, which has each token only once."""
    job = tl.program_id(0).to(tl.int64)
    row = jobs + job * 3
    c, begin, end = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if begin >= end:
        return
    place = begin + tl.arange(0, TOKENS)
    t = tl.load(tokens + place, mask=place < end, other=0)
    o = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    start, r = tl.load(starts + c), tl.load(widths + c)
    sums = tl.zeros((TOKENS, COLUMNS), dtype=WIDE)
    for first in range(0, r, RANKS):
        j = first + tl.arange(0, RANKS)
        inside = (place < end)[:, None] & (j < r)[None, :]
        left = tl.load(shrunk + place[:, None] * max_width + j[None, :], mask=inside, other=0.0)
        inside = (j < r)[:, None] & (o < num_out)[None, :]
        rows = b + (start + j)[:, None] * b_rank_stride + o[None, :] * b_out_stride
        right = tl.load(rows, mask=inside, other=0.0)
        left, right = left.to(DOT), right.to(DOT)
        sums = tl.dot(left, right, sums, input_precision="ieee", out_dtype=WIDE)
    to = out + t[:, None] * num_out + o[None, :]
    inside = (place < end)[:, None] & (o < num_out)[None, :]
    sums += tl.load(to, mask=inside, other=0.0).to(WIDE)
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)
