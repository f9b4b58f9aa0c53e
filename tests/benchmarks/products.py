"""Products of float32 matrices on this CPU: by torch itself, and by oneDNN.

    python -m tests.benchmarks.products [--rounds 30]

Microseconds of x [T, IN] times W [OUT, IN], the best of the rounds, and their ratio. The sizes are
those of SmolLM2-135M, its output head and a gate of seven choices included.
"""

import argparse
from functools import partial

import torch
from torch.nn import functional

from meteora.kernels import onednn
from tests.benchmarks.timing import seconds, table, tell

SIZES = [(576, 7), (576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152)]
TOKENS = [1, 4, 16, 64, 256, 1024]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    rows = []
    for num_in, num_out in SIZES:
        weight = torch.randn(num_out, num_in)
        row = [f"{num_in} → {num_out}"]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, num_in)
            best = []
            for multiply in (functional.linear, onednn.linear):
                run = partial(multiply, x, weight)
                run()
                repeats = max(1, 4_000_000 // (num_tokens * num_in * num_out))
                best.append(
                    min(
                        seconds(lambda run=run, repeats=repeats: [run() for _ in range(repeats)])
                        / repeats
                        for _ in range(rounds)
                    )
                )
            theirs, ours = (1e6 * one for one in best)
            row.append(f"{theirs:,.0f} → {ours:,.0f} ({ours / theirs:.2f})")
        rows.append(row)
    tell(table(["IN → OUT", *(f"T = {n}" for n in TOKENS)], rows), "cpu")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
