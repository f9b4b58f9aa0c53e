"""Controls that take too long for every run: a LoRA of all tasks, PEFT's Arrow, and X-LoRA.

    python -m tests.benchmarks.controls {multitask,arrow,x-lora} RECIPE BASE OUT [--home HOME]

RECIPE is a path or a shipped name, BASE a folder with its base as safetensors. Each is put to the
recipe's own tasks, by the same harness, and OUT gets a table with intervals, and every answer.
Where HOME holds the recipe's run, each is tested against the fused model on the same rows.

    multitask  one LoRA on all tasks whose rank at each layer is that of all experts there together:
               as many numbers as the experts have, and trained on their rows (arXiv 2405.13053
               compares with rank 8); with `--same-rows` on the rows that the adapters of
               `tests.quickstart.make` or, with its DATA, of `tests.benchmarks.bigbench` were
               trained on, in place of the recipe's examples
    arrow      PEFT's own
    x-lora     PEFT's own; its classifier is trained here, on the rows that gates are fitted to

The last two ask for adapters of one rank and the same layers, and get them filled up by zeros,
which changes no output of an adapter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, get_peft_model

from meteora.adapters import reader
from meteora.artifacts import MeteoraError
from meteora.base.loading import load_folder
from pipelines.admission.sources import local_folder
from pipelines.data.rows import Row
from pipelines.evaluation.evaluate import evaluate_task
from pipelines.evaluation.measurements import FUSED
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.flows.up_to_date import look
from pipelines.scoring import intervals
from pipelines.scoring.outputs import read_outputs, write_outputs
from pipelines.stages.train_adapters import fit, lessons, shuffled_for_ever, training_rows
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext
from tests.benchmarks.bigbench import rows_trained_on
from tests.benchmarks.peers import arrow, of_one_shape, quiet, x_lora

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.evaluation.evaluate import TaskResult

SYSTEMS = ("multitask", "arrow", "x-lora")
BATCH_SIZE = 16


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def folders_of(work: RunContext) -> list[Path]:
    """Of the recipe's adapters, which have to be on this machine."""
    return [local_folder(work, expert) for expert in work.recipe.experts]


def ranks_stored(folders: Sequence[Path]) -> dict[str, int]:
    """The ranks of all adapters together, by module."""
    ranks: dict[str, int] = {}
    for folder in folders:
        for module in reader.read(folder).spec.modules:
            ranks[module.path] = ranks.get(module.path, 0) + module.r
    return ranks


def multitask(base: PreTrainedModel, ranks: Mapping[str, int]) -> torch.nn.Module:
    """One LoRA with as many numbers as all adapters, to be trained on all their tasks."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=2 * max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={path: 2 * r for path, r in ranks.items()},
        task_type="CAUSAL_LM",
    )
    with quiet():
        return get_peft_model(base, config)


def rows_to_learn(asked: argparse.Namespace, work: RunContext) -> dict[str, list[Row]]:
    """What a system is trained on, by expert: each row once."""
    if asked.system == "multitask" and asked.same_rows:
        return {
            expert.name: [
                Row(row["prompt"], row["response"])
                for row in rows_trained_on(expert.name, asked.same_rows)
            ]
            for expert in work.recipe.experts
        }
    limit = work.recipe.gates.examples_per_expert if asked.system == "x-lora" else None
    every = training_rows(work, work.recipe.experts, skip=0)
    return {name: own[:limit] for name, own in every.items()}


def build(
    asked: argparse.Namespace, work: RunContext
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The system, trained where it has to be."""
    loaded, tokenizer = load_folder(asked.base)
    base, folders = on_device(loaded), folders_of(work)
    with quiet(), TemporaryDirectory() as filled_up:
        if asked.system == "multitask":
            made = multitask(base, ranks_stored(folders))
        else:
            mixture = arrow if asked.system == "arrow" else x_lora
            alike = of_one_shape(folders, Path(filled_up))
            made = mixture(base, alike, work.recipe.router.top_k)
        if asked.system != "arrow":
            rows = rows_to_learn(asked, work)
            stream = shuffled_for_ever(list(itertools.chain(*rows.values())))
            made.train()
            batches = lessons(tokenizer, stream)
            fit(made, batches, steps=asked.steps, peak=asked.peak, what=asked.system)
    return cast("PreTrainedModel", made.eval()), tokenizer


def ask(
    work: RunContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[Task, TaskResult]]:
    """Every task of the recipe, put to the system as to all others."""
    tasks = make_tasks(work.recipe.experts, work.recipe.benchmark, work.folder)
    answered = {}
    for name, task in tasks.items():
        with quiet():
            found = evaluate_task(model, tokenizer, task, batch_size=BATCH_SIZE)
        say(f"{name}: {found.values[task.metrics[0]].mean:.3f}")
        answered[name] = task, found
    return answered


def recorded_values(work: RunContext, system: str = FUSED) -> dict[str, list[float]]:
    """What a system's answers were worth by task, row by row, where the recipe was run."""
    values: dict[str, list[float]] = {}
    found = look(work)
    if (planned := found.plan) is None or found.summary is None:
        return values
    recorded = work.ledger.scores_of(one.spec.id for one in planned.measurements)
    for one in planned.measurements:
        is_first = one.spec.metric == planned.tasks[one.spec.task].metrics[0]
        if one.system == system and is_first and one.spec.id in recorded:
            answers = work.ledger.blobs.path_of(recorded[one.spec.id].outputs_sha256)
            rows = read_outputs(answers, [one.spec.metric])
            values[one.spec.task] = [float(row[one.spec.metric]) for row in rows]
    return values


def table(
    system: str, answered: Mapping[str, tuple[Task, TaskResult]], fused: Mapping[str, list[float]]
) -> str:
    """Scores with their intervals; beside them the fused model's, and whether the two differ."""
    values = {
        name: [float(row[task.metrics[0]]) for row in found.outputs]
        for name, (task, found) in answered.items()
    }
    shared = [name for name in answered if len(fused.get(name, ())) == len(values[name])]
    p_values = [intervals.paired_p(fused[name], values[name]) for name in shared]
    p_holm = dict(zip(shared, intervals.holm(p_values), strict=True)) if shared else {}
    lines = [
        f"| task | metric | n | {system} | fused | fused - {system} | p, corrected |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, (task, found) in answered.items():
        score = found.values[task.metrics[0]]
        _, low, high = score.interval()
        cells = [name, task.metrics[0], str(len(found.outputs))]
        cells.append(f"{score.mean:.3f} [{low:.3f}, {high:.3f}]")
        if name in p_holm:
            ours = sum(fused[name]) / len(fused[name])
            cells += [f"{ours:.3f}", f"{ours - score.mean:+.3f}", f"{p_holm[name]:.3f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("recipe")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--home", type=Path, default=Path("~/.meteora"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--peak", type=float, default=5e-4)
    parser.add_argument("--same-rows", type=Path, nargs="?", const=Path(), metavar="DATA")
    asked: Any = parser.parse_args(arguments)
    work = RunContext.open(asked.recipe, asked.home.expanduser().absolute())
    try:
        model, tokenizer = build(asked, work)
        answered = ask(work, model, tokenizer)
    except MeteoraError as error:
        sys.exit(f"error: {error}")
    folder = asked.out / asked.system
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, found) in answered.items():
        write_outputs(found.outputs, folder / f"{name}.parquet")
    written = table(asked.system, answered, recorded_values(work))
    (asked.out / f"{asked.system}.md").write_text(written)
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
