"""Choose the fastest kernel for a layer, by a cost model that is fitted to measurements."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from meteora.kernels import gather_grouped, reference
from meteora.kernels.stack import Sizes

KernelName = Literal["dense", "gather", "grouped", "gather_triton", "grouped_triton"]
IN_TORCH: dict[KernelName, Callable[..., Tensor]] = {
    "dense": reference.lora_delta_dense,
    "gather": gather_grouped.lora_delta_gather,
    "grouped": gather_grouped.lora_delta_grouped,
}
"""The kernels for every device; those of Triton are in `triton_launch`."""


def find_kernel(name: KernelName) -> Callable[..., Tensor]:
    """The function of that name, which takes what `reference.lora_delta_loop` takes.

    Raises:
        MissingTritonError: it needs Triton, which is not installed.
    """
    if name in IN_TORCH:
        return IN_TORCH[name]
    launch = gather_grouped.triton_launch()
    return launch.lora_delta_gather if name == "gather_triton" else launch.lora_delta_grouped


FEW_TOKENS = 16
"""Tokens of the smallest tile that a GPU's tensor cores multiply."""


@dataclass(frozen=True)
class _Costs:
    """Costs per token; the unit is the cost of one rank in a large matmul."""

    gather: float
    """A chosen rank, with many tokens."""
    gather_half: float
    """The number of tokens with which it costs half: few tokens wait for memory in any kernel."""
    gather_call: float
    """A call, times (IN + OUT) and divided by T."""
    grouped: float
    """A chosen rank."""
    grouped_row: float
    """Copying one row in and one out, for each of K experts. In a model, whose other layers had the
    cache before, it costs more than in a layer alone: 20 would suit the table below better."""
    grouped_call: float
    """The matmuls of one expert, times (IN + OUT) and divided by T."""
    grouped_one: float
    """The same for a single token, each expert beyond its first: nothing is sorted there."""
    outside: float = 1e7
    """Leaving a compiled graph for a call, times (IN + OUT) and divided by T; not fitted: with it
    vLLM decodes eight requests to fourteen experts in 0.93 of the time."""


_WIDE = _Costs(
    gather=4,
    gather_half=8,
    gather_call=2e6,
    grouped=2,
    grouped_row=25,
    grouped_call=4.9e5,
    grouped_one=1.5e4,
)
_NARROW = _Costs(
    gather=23,
    gather_half=29,
    gather_call=2.9e5,
    grouped=1.9,
    grouped_row=110,
    grouped_call=1.4e7,
    grouped_one=1.6e5,
)


def choose_kernel(
    num_tokens: int,
    top_k: int,
    sizes: Sizes,
    dtype: torch.dtype,
    device_type: str,
    num_chosen: int | None = None,
    *,
    in_graph: bool = False,
) -> KernelName:
    """The fastest kernel by the costs above, which were fitted to measurements.

    Args:
        num_chosen: the number of experts that any token chose; None: the most possible
        in_graph: whether `dense` is a part of a compiled graph, which the others have to leave

    Time of a routed layer, gate and routing included, over that of the bare one: 2048 → 2048,
    top-2, random routes, one Intel Xeon core with AVX-512 and AMX, torch 2.13; the
    chosen kernel is starred.

        E × r     tokens     32 bits: dense    gather   grouped   16 bits: dense  gather   grouped
        4 × 8          1        1.36      1.38      1.24*       1.50*     1.54      1.53
        4 × 8        256        1.17*     1.22      1.30        1.43*     2.05      2.12
        28 × 8         1        1.60      1.46      1.27*       1.71      1.52      1.46*
        28 × 8       256        1.40      1.28*     1.35        1.80*     2.20      3.05
        28 × 16      256        1.62      1.42*     1.39        1.96*     2.72      2.91
        28 × 16     2048        1.47      1.40      1.31*       1.72      2.66      2.08*
        28 × 64      256        3.04      2.65      1.84*       4.29      7.64      3.75*
        28 × 64     2048        3.04      2.71      1.49*       5.32      8.59      2.32*
        512 × 8        1        9.52      1.92      1.74*       8.15      2.02      1.93*
        512 × 8      256        6.04      2.01*     2.88        7.06      3.04*     9.11

    Over the 540 settings of `tests/benchmarks/results/twins.md` the choice takes 0.8 % longer than
    the best kernel in 32 bits and 0.7 % in 16, in the mean; the costs are fitted to those. Layers
    of one input that follow one gate share A x where the kernel is dense or gather
    (`meteora.routing.shared_input`): of q, k and v, up to 64 tokens, that saves 1 to 6 % with
    gather, and between -2 and 6 % with dense.

    If all tokens chose the same experts, as those of one task do, `grouped` copies no rows and is
    chosen sooner; on a CPU the layer counts the chosen experts.

    All kernels are linear in IN + OUT, so the sizes of a layer matter only for small layers, where
    the calls themselves take time. `python -m tests.benchmarks.twins` measures again.

    On accelerators nothing has been measured yet, and the choice is by arithmetic. On CUDA it is a
    Triton kernel, which reads only the chosen ranks, one token at a time or in tiles. It is `dense`
    on other devices, without Triton, and if single experts have every rank anyway. None of these
    waits for the host.

    The mean of all experts, to which the tokens of an opening go, is as wide as all ranks. For
    Triton's kernels each choice has its own width, and for `grouped` too. `gather` fills each one
    up to the widest, and is not chosen beside such a mean: with 28 experts of rank 16 (1024 → 1024,
    top-1, 32 bits, one of ten tokens in the opening) it takes 3.2 times the bare layer for 64
    tokens and 4.2 for 256, where `grouped` takes 1.7 and 1.4.
    """
    if device_type != "cpu":
        every = top_k * sizes.max_rank >= sizes.num_ranks or dtype.itemsize > 4
        if device_type != "cuda" or every or not gather_grouped.has_triton():
            return "dense"
        return "gather_triton" if num_tokens <= FEW_TOKENS else "grouped_triton"
    wide = dtype.itemsize >= 4
    return _cheapest(num_tokens, top_k, sizes, num_chosen, wide=wide, in_graph=in_graph)


@lru_cache(maxsize=4096)
def _cheapest(
    num_tokens: int,
    top_k: int,
    sizes: Sizes,
    num_chosen: int | None,
    *,
    wide: bool,
    in_graph: bool,
) -> KernelName:
    cost = _WIDE if wide else _NARROW
    chosen, width = top_k * sizes.max_rank, top_k * sizes.max_width
    num_tokens = max(num_tokens, 1)
    size = num_tokens * (sizes.num_in + sizes.num_out)
    saturation = num_tokens / (num_tokens + cost.gather_half)
    if num_chosen is None:
        num_chosen = min(sizes.num_choices, num_tokens * top_k)
    if num_tokens == 1:
        # the mean rank of the experts: which one is chosen is not known
        own = top_k * sizes.num_ranks / sizes.num_choices
        grouped = own + cost.grouped_one * (num_chosen - 1) / size
    else:
        # if all tokens chose the same experts, no row is copied
        rows = cost.grouped_row * top_k if num_chosen > top_k else 0
        grouped = cost.grouped * chosen + rows + cost.grouped_call * num_chosen / size
    outside = cost.outside / size if in_graph else 0.0
    costs: dict[KernelName, float] = {
        "dense": sizes.num_ranks,
        "gather": cost.gather * saturation * width + cost.gather_call / size + outside,
        "grouped": grouped + outside,
    }
    return min(costs, key=costs.__getitem__)
