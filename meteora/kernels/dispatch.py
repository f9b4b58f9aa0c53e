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
    """The function of that name, which takes what `reference.lora_delta_loop` takes."""
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
    cache before, it costs more than in a layer alone: 20 would suit the latter better."""
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
    """The fastest kernel by the costs above: `tests/benchmarks/results/twins.md` has measurements.

    Args:
        num_chosen: the number of experts that any token chose; None: the most possible
        in_graph: whether `dense` is a part of a compiled graph, which the others have to leave

    On CUDA nothing has been measured, and the choice is by arithmetic: a Triton kernel, which reads
    only the chosen ranks, one token at a time or in tiles. It is `dense` on other accelerators,
    without Triton, and if single experts have every rank anyway. None of these waits for the host.

    On a CPU `grouped` copies no rows if all tokens chose the same experts, as those of one task do.
    Layers' sizes matter only for small ones, where the calls themselves take time. `gather` fills
    each choice up to the widest, so it loses beside the mean of all experts, to which the tokens of
    an opening go.
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
