"""Each kernel of one routed layer against the bare layer: `python -m tests.benchmarks.twins`.

The measurements behind `dispatch.choose_kernel`: the ratio of the whole routed layer, its gate and
routing included, to the bare projection, over experts, ranks, tokens, sizes and dtypes. Beside it
stands its floor, the arithmetic of the gate and of the chosen experts alone. The table has what the
function chooses, and the kernel that was better where another was; `--json` has all.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from meteora.artifacts import RouterOptions
from meteora.kernels import dispatch, gather_grouped
from meteora.kernels.dispatch import IN_TORCH, KernelName
from meteora.kernels.stack import ExpertStack, Sizes
from meteora.routing.layer import MoELoRALinear
from meteora.routing.routers import Gate
from tests.benchmarks import timing

TOP_K = 2
MIXED = [4, 8, 16, 64]
"""Ranks that take turns where the rank is `mixed`."""
MOST_RANKS = 8192
"""More than that is left out: its dense kernel alone would take minutes."""
BETTER = 0.95
"""Another kernel is shown where it took less than this part of the time of the chosen one."""


def kernels_of(device: str) -> list[KernelName]:
    if torch.device(device).type == "cuda" and gather_grouped.has_triton():
        return [*get_args(KernelName)]
    return [*IN_TORCH]


def routed(size: int, ranks: list[int], dtype: torch.dtype) -> MoELoRALinear:
    num_experts = len(ranks)
    return MoELoRALinear(
        nn.Linear(size, size, bias=False, dtype=dtype),
        ExpertStack(
            torch.randn(sum(ranks), size).to(dtype),
            torch.randn(size, sum(ranks)).to(dtype),
            ranks,
            [1.0] * num_experts,
        ),
        Gate(
            torch.randn(num_experts, size, dtype=dtype),
            torch.zeros(num_experts, dtype=dtype),
            RouterOptions("gate", TOP_K, 1.0),
        ),
    ).requires_grad_(requires_grad=False)


def floor(size: int, ranks: list[int]) -> float:
    """Multiplications of a routed layer over those of the bare one, each expert being as likely."""
    top_k = min(TOP_K, len(ranks))
    gate, chosen = len(ranks) * size, 2 * size * top_k * sum(ranks) / len(ranks)
    return 1 + (gate + chosen) / size**2


def measure(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each setting, as soon as it is measured."""
    for dtype, size, num_experts, r in itertools.product(
        asked.dtypes, asked.hidden, asked.experts, asked.ranks
    ):
        ranks = [MIXED[e % 4] if r == "mixed" else int(r) for e in range(num_experts)]
        if sum(ranks) > MOST_RANKS:
            continue
        torch.manual_seed(0)
        layer = routed(size, ranks, getattr(torch, dtype)).to(asked.device)
        for num_tokens in asked.tokens:
            x = torch.randn(num_tokens, size, device=asked.device).to(getattr(torch, dtype))
            names = kernels_of(asked.device)
            seconds = timing.best_of(
                {"bare": lambda x=x, layer=layer: layer.projection(x)}
                | {
                    kernel: lambda x=x, kernel=kernel, layer=layer: run(layer, kernel, x)
                    for kernel in names
                },
                asked.rounds,
                asked.device,
                limit_seconds=asked.seconds,
            )
            yield {
                "dtype": dtype,
                "hidden": size,
                "experts": num_experts,
                "r": r,
                "R": sum(ranks),
                "max_r": max(ranks),
                "tokens": num_tokens,
                "floor": floor(size, ranks),
                "bare_us": 1e6 * seconds["bare"],
                **{kernel: seconds[kernel] / seconds["bare"] for kernel in names},
            }


def run(layer: MoELoRALinear, kernel: KernelName, x: torch.Tensor) -> torch.Tensor:
    layer.kernel = kernel
    return layer(x)


def as_tables(rows: Sequence[dict[str, Any]], device: str) -> str:
    """One table for each dtype and size: experts and ranks down, tokens across."""
    text = ""
    for (dtype, size), some in itertools.groupby(rows, lambda row: (row["dtype"], row["hidden"])):
        layers = [list(own) for _, own in itertools.groupby(some, lambda r: (r["experts"], r["r"]))]
        names = ["E × r", "R", "floor", *(f"{row['tokens']:,} tokens" for row in layers[0])]
        lines = [
            [
                f"{own[0]['experts']} × {own[0]['r']}",
                own[0]["R"],
                f"{own[0]['floor']:.2f}",
                *(cell(row, device) for row in own),
            ]
            for own in layers
        ]
        bare = ", ".join(f"{row['bare_us']:,.0f}" for row in layers[0])
        text += f"## {dtype}, {size} → {size}\n\nBare layer, µs: {bare}\n\n"
        text += timing.table(names, lines) + "\n"
    return text


def cell(row: dict[str, Any], device: str) -> str:
    size, num_experts = row["hidden"], row["experts"]
    sizes = Sizes(size, size, num_experts, row["R"], row["max_r"], row["max_r"])
    top_k, dtype = min(TOP_K, num_experts), getattr(torch, row["dtype"])
    chosen = dispatch.choose_kernel(row["tokens"], top_k, sizes, dtype, torch.device(device).type)
    best = min(kernels_of(device), key=row.__getitem__)
    text = f"{row[chosen]:.2f} {chosen}"
    if row[best] < BETTER * row[chosen]:
        text += f" ({best} {row[best]:.2f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[576, 2048, 4096])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 28, 128, 512])
    parser.add_argument("--ranks", nargs="+", default=["4", "8", "16", "64", "mixed"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256, 2048])
    parser.add_argument("--rounds", type=int, default=50, help="at most")
    parser.add_argument("--seconds", type=float, default=1.0, help="about, for one setting")
    parser.add_argument("--read", type=Path, help="tables from JSON written before")
    timing.ask(parser)
    asked = parser.parse_args()
    if asked.read is not None:
        sys.stdout.write(
            as_tables(
                [json.loads(line) for line in asked.read.read_text().splitlines()], asked.device
            )
        )
        return
    rows = []
    for row in measure(asked):
        rows.append(row)
        if asked.json:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    if not asked.json:
        timing.tell(as_tables(rows, asked.device), asked.device)


if __name__ == "__main__":
    main()
