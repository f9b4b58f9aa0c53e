"""What one closed-form gate costs where layers are large: `python -m tests.benchmarks.calibrate`.

Made-up tokens of many experts, with spreads that fall off as those of hidden states do, go through
everything that calibrating does at one input point but running the model. Each size has a process
of its own, whose peak memory is told beyond what it had before. `forward` is the arithmetic of
running the same tokens once through the projection that reads that input, in the same process: what
the sweep does anyway.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from meteora.fitting import calibrate
from meteora.fitting.lda import choose_shrinkage, gate_from
from meteora.fitting.sequences import LabelledSequence, batched, hold_out, sampled, token_weights
from meteora.fitting.statistics import PointStatistics
from tests.benchmarks.timing import machine

EXPERTS, TOKENS_EACH = 28, 32
SIZES = (
    (576, 576, False),
    (1536, 576, False),
    (4096, 4096, False),
    (4096, 4096, True),
    (14336, 4096, False),
)
"""(inputs, outputs) of projections of SmolLM2-135M and Llama-3-8B; and whether a sample of rows is
kept where moments would be: what the sample costs in accuracy."""


@dataclass(frozen=True)
class Cost:
    inputs: int
    examples: int
    """An expert."""
    tokens: int
    form: str
    """In which the covariance was kept."""
    gather_seconds: float
    solve_seconds: float
    """Seven shrinkages judged on held-out tokens, and the gate."""
    keep_seconds: float
    """The directions from which experts can be added."""
    kept_megabytes: float
    """Of these and the means; a file of statistics has fewer directions."""
    forward_seconds: float
    peak_megabytes: float
    heldout_accuracy: float


def made_up(inputs: int, means: Tensor, labels: Tensor, seed: int) -> Tensor:
    """[B, L, IN] tokens: an expert's mean, and noise that falls off."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*labels.shape, inputs)
    spread = torch.arange(1, inputs + 1).float().pow(-0.5)
    x = torch.randn(shape, generator=generator) * spread
    return x.add_(means[labels.clamp_min(0)], alpha=0.08)


def cost(inputs: int, outputs: int, rows_only: bool, examples: int) -> Cost:
    torch.set_num_threads(1)
    sequences = [
        LabelledSequence((1,) * TOKENS_EACH, (e,) * TOKENS_EACH)
        for e in range(EXPERTS)
        for _ in range(examples)
    ]
    heldout = hold_out(sequences, [str(e) for e in range(EXPERTS)], 0)
    batches = sampled(list(batched(sequences, heldout, torch.device("cpu"))), EXPERTS)
    tokens = EXPERTS * TOKENS_EACH * examples
    spread = torch.arange(1, inputs + 1).float().pow(-0.5)
    means = torch.randn(EXPERTS, inputs, generator=torch.Generator().manual_seed(1)) * spread
    weights = token_weights(batches, EXPERTS)
    making = forward = 0.0
    weight = torch.randn(outputs, inputs)

    def stream() -> Iterator[Tensor]:
        nonlocal making, forward
        for seed, batch in enumerate(batches):
            started = time.process_time()
            x = made_up(inputs, means, batch.labels, seed)
            made = time.process_time()
            x @ weight.T
            forward += time.process_time() - made
            making += time.process_time() - started
            yield x

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [time.process_time()]
    if rows_only:
        setattr(calibrate, "MAX_ROWS", 0)  # noqa: B010  (the type of a constant is its value)
    to_fit, held, every = calibrate._parts_of(stream(), batches, weights, EXPERTS)
    marks.append(time.process_time())
    shrinkage = choose_shrinkage(to_fit.sums, held.tokens.accuracy).shrinkage
    gate, bias = gate_from(every.sums, shrinkage)
    marks.append(time.process_time())
    statistics = PointStatistics.of(every.sums, shrinkage)
    marks.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unseen = torch.arange(EXPERTS).repeat_interleave(64)[None]
    x = made_up(inputs, means, unseen, 10_000_000)
    right = ((x @ gate.T + bias).argmax(-1) == unseen).float().mean().item()
    stored = sum(getattr(statistics, f.name).nbytes for f in fields(statistics))
    gathered, solved, kept = (b - a for a, b in pairwise(marks))
    return Cost(
        inputs, examples, tokens, type(every.sums).__name__, gathered - making, solved, kept,
        stored / 1e6, forward, peak / 1024, right,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for inputs, outputs, rows_only in SIZES:
        for examples in asked.examples:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(cost, (inputs, outputs, rows_only, examples)))
    if asked.json:
        print(json.dumps({"machine": machine(), "costs": [asdict(one) for one in found]}))
        return
    print(as_table(found))
    print("\n".join(f"- {name}: {value}" for name, value in machine().items()))


def as_table(found: list[Cost]) -> str:
    lines = [
        "| inputs | tokens | covariance kept as | gather, s | solve, s | keep, s | together"
        " | kept, MB | forward, s | peak, MB | right on unseen tokens |",
        "|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for one in found:
        form = "moments" if one.form == "Scatter" else "rows"
        together = one.gather_seconds + one.solve_seconds + one.keep_seconds
        lines.append(
            f"| {one.inputs} | {one.tokens:,} | {form} | {one.gather_seconds:.1f}"
            f" | {one.solve_seconds:.1f} | {one.keep_seconds:.1f} | {together:.1f}"
            f" | {one.kept_megabytes:.1f} | {one.forward_seconds:.1f} | {one.peak_megabytes:.0f}"
            f" | {one.heldout_accuracy:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
