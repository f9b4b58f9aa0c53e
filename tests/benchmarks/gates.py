"""Gates by one sweep and by gradient descent on the paper's loss, in equal and in ten-fold time.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.gates BASE FOLDER OUT.json

BASE is a folder with SmolLM2-135M-Instruct as safetensors; the adapters are the quickstart's six.
What is measured goes into OUT.json at once, and is not measured again; FOLDER is for what is
written meanwhile. Seconds are of processor time, with one thread.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meteora.artifacts import JointSettings, RouterOptions
from meteora.artifacts.routers import POINT_GATES
from meteora.fitting.calibrate import calibrate
from meteora.fitting.joint import train_jointly
from meteora.model.fused import force_expert
from meteora.model.fused import make_router as untrained
from meteora.routing.layer import routed_by
from tests.benchmarks.gate_world import Results, World, timed
from tests.benchmarks.paired import difference, mean_score
from tests.benchmarks.timing import machine
from tests.quickstart.make import TRAININGS as QUICKSTART

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

OPTIONS = replace(POINT_GATES, opening="shared")
COUNTS = (8, 16, 32, 64)
"""Examples an expert."""
LEARNT = {16: (1, 10), 32: (1,), 64: (1,)}
"""How many times as long as the sweep gradient descent takes, by examples an expert."""
JOINT = JointSettings(
    steps=1, batch_size=8, accumulate=1, learning_rate=5e-3, warmup_ratio=0.05,
    gate_loss_weight=50.0, max_grad_norm=0.3, start="zeros",
)  # fmt: skip


def judged(world: World, model: PreTrainedModel, found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "routing": world.routing(model), "scores": world.scores(model)}


def untrained_ones(world: World, results: Results) -> None:
    model = world.model()
    scores: dict[str, list[float]] = {}
    for name in world.names:
        with force_expert(model, name):
            scores |= world.scores(model, [name])
    results.keep("oracle", {"scores": scores})
    for kind in ("uniform", "arrow", "norm"):
        options = RouterOptions(kind, 1, 1.0)
        with routed_by(model, lambda layer, options=options: untrained(options, layer)):
            results.keep(kind, judged(world, model, {}))


def swept(world: World, count: int) -> dict[str, Any]:
    model, sequences = world.model(opening="shared"), world.conversations(count)
    with timed() as clock:
        made = calibrate(model, sequences, OPTIONS)
    found = {"seconds": clock["seconds"], "tokens": made.num_tokens, "examples": count}
    return judged(world, model, found)


def learnt(world: World, count: int, seconds: float, *, offsets: bool) -> dict[str, Any]:
    """Gates by gradient descent that takes so long, and what they are worth."""
    sequences = world.conversations(count)
    beside, a_step = costs(world, count, offsets=offsets)
    steps = max(1, round((seconds - beside) / a_step))
    model = world.model(opening="shared")
    with timed() as clock:
        train_jointly(model, sequences, with_steps(steps), OPTIONS, offsets=offsets)
    a_sequence = sum(len(s.input_ids) for s in sequences) / len(sequences)
    tokens = round(steps * JOINT.batch_size * a_sequence)
    found = {"seconds": clock["seconds"], "steps": steps, "tokens": tokens, "examples": count}
    return judged(world, model, found)


def costs(world: World, count: int, *, offsets: bool, steps: int = 16) -> tuple[float, float]:
    """Seconds of what gradient descent does beside its steps, and of one step."""
    at: list[float] = []
    model, sequences = world.model(opening="shared"), world.conversations(count)
    with timed() as clock:
        train_jointly(
            model, sequences, with_steps(steps), OPTIONS, offsets=offsets,
            progress=lambda _done, _total: at.append(time.process_time()),
        )  # fmt: skip
    a_step = (at[-1] - at[0]) / (steps - 1)
    return clock["seconds"] - steps * a_step, a_step


def with_steps(steps: int) -> JointSettings:
    return JointSettings.from_dict({**JOINT.to_dict(), "steps": steps})


def print_table(found: Mapping[str, Any]) -> None:
    print("\n" + "; ".join(machine().values()) + "\n")
    head = "gates", "seconds", "steps", "tokens read", "routing", "score", "against the oracle"
    print("| " + " | ".join(head) + " |\n|" + "-|" * len(head))
    for name, one in found.items():
        cells = [
            f"{one['seconds']:.0f}" if "seconds" in one else "",
            f"{one['steps']:,}" if "steps" in one else "",
            f"{one['tokens']:,}" if "tokens" in one else "",
            f"{one['routing']['after']:.3f}" if "routing" in one else "",
        ]
        print("| " + " | ".join([name, *cells, *against(one, found["oracle"])]) + " |")


def against(one: Mapping[str, Any], oracle: Mapping[str, Any]) -> list[str]:
    """The mean score over the tasks, and its difference from the oracle's with its interval."""
    mean = f"{mean_score(one['scores'].values()):.3f}"
    if one is oracle:
        return [mean, ""]
    pairs = [(one["scores"][task], oracle["scores"][task]) for task in one["scores"]]
    return [mean, difference(pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=60, help="test rows a task")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(asked.out)
    asked.folder.mkdir(parents=True, exist_ok=True)
    world = World.open(asked.base, asked.folder, list(QUICKSTART), asked.rows)
    if "norm" not in results:
        untrained_ones(world, results)
    for count in COUNTS:
        if (key := f"sweep, {count} examples") not in results:
            results.keep(key, swept(world, count))
        for times in LEARNT.get(count, ()):
            for offsets in (True, False):
                key = f"gradient descent, {count} examples, {times} × the time"
                key += "" if offsets else ", no offsets"
                if key not in results:
                    seconds = times * results[f"sweep, {count} examples"]["seconds"]
                    results.keep(key, learnt(world, count, seconds, offsets=offsets))
    print_table(results.found)


if __name__ == "__main__":
    main()
