"""Which twin is fastest where: a model of their costs, fitted to measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from meteora import kernels

if TYPE_CHECKING:
    import torch

Twin = Literal["dense", "gather", "grouped", "gather_triton", "grouped_triton"]
"""How what the experts add is computed: `ops.lora_delta_dense`, or a function of `kernels`."""

FEW_TOKENS = 16
"""On a GPU a tile of that many is the least that tensor cores multiply."""


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
    calls themselves show. `python -m tests.benchmarks.twins` measures again.

    On accelerators nothing has been measured yet, and the choice is by arithmetic: on CUDA Triton's
    kernels, which read the chosen ranks alone, one token at a time or in tiles; `dense` elsewhere,
    and where every rank is chosen anyway. None of these waits for the host.
    """
    if device_type != "cpu":
        every = top_k * sizes.max_rank >= sizes.num_ranks or dtype.itemsize > 4
        if device_type != "cuda" or every or not kernels.has_triton():
            return "dense"
        return "gather_triton" if num_tokens <= FEW_TOKENS else "grouped_triton"
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
