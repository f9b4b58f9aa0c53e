"""Products of float32 matrices on this CPU: by torch itself, and by oneDNN.

    python -m tests.benchmarks.products [--rounds 30] [--gradients] [--on-any]

Microseconds of x [T, IN] times W [OUT, IN], the best of the rounds, and their ratio. The sizes are
those of SmolLM2-135M, its output head and a gate of seven choices included. With `--gradients` the
gradient of x, too, as in a training of adapters, which leaves W as it is. With `--on-any` oneDNN is
asked on processors of other makers, too, where `onednn.linear` leaves the product to torch.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from meteora.kernels import onednn
from tests.benchmarks.timing import seconds, table, tell

SIZES = [(576, 7), (576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152)]
TOKENS = [1, 4, 16, 64, 256, 1024]


@torch.inference_mode(mode=False)
@torch.enable_grad()
def with_gradient(multiply: Callable[..., Tensor], x: Tensor, weight: Tensor) -> None:
    y = multiply(x.detach().requires_grad_(), weight)
    y.backward(torch.ones_like(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--on-any", action="store_true")
    asked = parser.parse_args()
    if asked.on_any:
        onednn._has_wide_kernels = cache(lambda: True)
    rows = []
    for num_in, num_out in SIZES:
        weight = torch.randn(num_out, num_in)
        row = [f"{num_in} → {num_out}"]
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, num_in)
            best = []
            for multiply in (functional.linear, onednn.linear):
                run = partial(multiply, x, weight)
                if asked.gradients:
                    run = partial(with_gradient, multiply, x, weight)
                seconds(run)
                repeats = max(1, 4_000_000 // (num_tokens * num_in * num_out))
                best.append(
                    min(
                        seconds(lambda run=run, repeats=repeats: [run() for _ in range(repeats)])
                        / repeats
                        for _ in range(asked.rounds)
                    )
                )
            theirs, ours = (1e6 * one for one in best)
            row.append(f"{theirs:,.0f} → {ours:,.0f} ({ours / theirs:.2f})")
        rows.append(row)
    tell(table(["IN → OUT", *(f"T = {n}" for n in TOKENS)], rows), "cpu")


if __name__ == "__main__":
    main()
