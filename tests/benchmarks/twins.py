"""Each twin of one routed layer against the bare layer: `python -m tests.benchmarks.twins`.

The measurements behind `twins.choose_twin`: the ratio of the whole routed layer, its gate and
routing included, to the bare projection, best of all rounds, over experts, ranks, tokens, sizes and
dtypes. The twin that the function chooses is starred.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora.layer import MoELoRALinear
from meteora.routers import Gate
from tests.benchmarks.layer import best_of, machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meteora.twins import Twin

TWINS: tuple[Twin, ...] = ("dense", "gather", "grouped")
TOP_K = 2
MIXED = [4, 8, 16, 64]
"""Ranks that take turns where the rank is `mixed`."""
MOST_RANKS = 8192
"""More than that is left out: its dense twin alone would take minutes."""


def routed(size: int, ranks: list[int], dtype: torch.dtype) -> MoELoRALinear:
    return MoELoRALinear(
        nn.Linear(size, size, bias=False, dtype=dtype),
        torch.randn(sum(ranks), size).to(dtype),
        torch.randn(size, sum(ranks)).to(dtype),
        ranks,
        [1.0] * len(ranks),
        Gate(
            torch.randn(len(ranks), size, dtype=dtype), torch.zeros(len(ranks)).to(dtype), top_k=2
        ),
    ).requires_grad_(requires_grad=False)


def measure(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each setting, as soon as it is measured."""
    for dtype, size, num_experts, r in itertools.product(
        asked.dtypes, asked.hidden, asked.experts, asked.ranks
    ):
        ranks = [MIXED[e % 4] if r == "mixed" else int(r) for e in range(num_experts)]
        if sum(ranks) > MOST_RANKS:
            continue
        torch.manual_seed(0)
        layer = routed(size, ranks, getattr(torch, dtype))
        for num_tokens in asked.tokens:
            x = torch.randn(num_tokens, size).to(getattr(torch, dtype))
            layer.twin = None
            chosen = layer._fastest_twin(x, torch.empty(num_tokens, min(TOP_K, num_experts)))
            seconds = best_of(
                {"bare": lambda x=x, layer=layer: layer.projection(x)}
                | {twin: lambda x=x, twin=twin, layer=layer: run(layer, twin, x) for twin in TWINS},
                asked.rounds,
            )
            yield {
                "dtype": dtype,
                "hidden": size,
                "experts": num_experts,
                "r": r,
                "R": sum(ranks),
                "tokens": num_tokens,
                "bare_us": 1e6 * seconds["bare"],
                **{twin: seconds[twin] / seconds["bare"] for twin in TWINS},
                "chosen": chosen,
            }


def run(layer: MoELoRALinear, twin: Twin, x: torch.Tensor) -> torch.Tensor:
    layer.twin = twin
    return layer(x)


def as_line(row: dict[str, Any]) -> str:
    figures = [f"{row[twin]:.2f}{'*' * (twin == row['chosen'])}" for twin in TWINS]
    first = [row[name] for name in ("dtype", "hidden", "experts", "r", "R", "tokens")]
    return "| " + " | ".join(map(str, [*first, f"{row['bare_us']:.0f}", *figures])) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[576, 2048, 4096])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 28, 128, 512])
    parser.add_argument("--ranks", nargs="+", default=["4", "8", "16", "64", "mixed"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256, 2048])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    asked = parser.parse_args()
    if not asked.json:
        names = ["dtype", "hidden", "experts", "r", "R", "tokens", "bare, µs", *TWINS]
        sys.stdout.write("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|\n")
    with torch.inference_mode():
        for row in measure(asked):
            sys.stdout.write(json.dumps(row) + "\n" if asked.json else as_line(row))
            sys.stdout.flush()
    if not asked.json:
        sys.stdout.write("\n" + "".join(f"- {k}: {v}\n" for k, v in machine().items()))


if __name__ == "__main__":
    main()
