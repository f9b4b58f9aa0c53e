"""Tasks whose adapter is gone: what the rest of a fused model is worth on them.

    python -m tests.benchmarks.unseen BASE TRAINED OUT.json CHECKPOINT... [--rows 30] [--tasks T...]

One expert at a time is dropped from each CHECKPOINT, as `meteora drop` does it, and its task is
asked of what is left; beside it of the base, of each other adapter alone, and of the task's own.
BASE is SmolLM2-135M-Instruct as safetensors, TRAINED what `tests.benchmarks.twenty_eight` left.
Every figure goes into OUT.json when it is there, and is not made again.

The best other adapter is chosen by these very rows, so it is worth a little less than it looks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import meteora
from meteora.checkpoint.manifest import read_manifest
from meteora.model.fused import force_expert, without_experts
from pipelines.stages import edit
from store.ledger import Ledger
from tests.benchmarks.gate_world import Results, World
from tests.benchmarks.timing import machine, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

BASE = "base"


def ask(world: World, model: PreTrainedModel, task: str, key: str, results: Results) -> None:
    """Exact match of each row of a task, if it is not there."""
    if key not in results:
        results.keep(key, {"scores": world.scores(model, [task])[task]})


def ask_without(world: World, folder: Path, task: str, key: str, results: Results) -> None:
    """The same of a checkpoint from which the task's expert is dropped."""
    if key in results:
        return
    with tempfile.TemporaryDirectory() as home:
        smaller = edit.drop(Ledger(Path(home)), folder, task)
        loaded: Any = meteora.load(smaller, base_folder=world.base, dtype="float32")
        ask(world, loaded[0], task, key, results)


def show(
    names: Sequence[str], tasks: Sequence[str], routers: Sequence[str], results: Results
) -> None:
    def mean(key: str) -> float:
        return float(np.mean(results[key]["scores"]))

    rows, columns = [], []
    for task in tasks:
        others = {other: mean(f"{other} on {task}") for other in names if other != task}
        best = max(others, key=lambda other: others[other])
        figures = [mean(f"{task} on {task}"), mean(f"{BASE} on {task}"), others[best]]
        figures += [mean(f"{router} on {task}") for router in routers]
        columns.append(figures)
        cells = [f"{figure:.2f}" for figure in figures]
        cells[2] += f" {best}"
        rows.append([task, *cells])
    rows.append(["**mean**", *(f"{mean:.3f}" for mean in np.mean(columns, axis=0))])
    heads = ["task", "its own adapter", "base", "best other adapter"]
    print(f"{machine()}\n")
    print(table([*heads, *(f"the rest, {router}" for router in routers)], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--tasks", nargs="+", help="by default those of all experts")
    asked = parser.parse_args()
    names = read_manifest(asked.checkpoints[0]).names
    world = World.open(asked.base, asked.trained, names, asked.rows)
    tasks, results = asked.tasks or names, Results(asked.out)
    model = world.model()
    routers = {f"share: {read_manifest(one).router.share}": one for one in asked.checkpoints}
    for task in tasks:
        contexts: dict[str, AbstractContextManager[None]] = {BASE: without_experts(model)}
        contexts |= {name: force_expert(model, name) for name in names}
        for system, context in contexts.items():
            with context:
                ask(world, model, task, f"{system} on {task}", results)
        for router, folder in routers.items():
            ask_without(world, folder, task, f"{router} on {task}", results)
    show(names, tasks, list(routers), results)


if __name__ == "__main__":
    main()
