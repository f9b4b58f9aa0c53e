"""Tasks of lm-eval's own: it makes the prompts and computes the value of each row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import set_seed
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from meteora.untrusted.findings import brief
from pipelines.evaluation.harness import HARNESS, BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.evaluation.harness import Harness


@dataclass(frozen=True)
class LmEvalRun:
    """What lm-eval reports of one task."""

    samples: list[dict[str, Any]]
    """One for each row, in order, in lm-eval's own form."""
    higher_is_better: dict[str, bool]
    """By metric."""

    def values(self, name: str, metric: str) -> list[float]:
        """The metric's value of every row.

        Raises:
            BenchmarkError: lm-eval computes no such metric for each row; the message lists others.
        """
        kept = [sample.get(metric) for sample in self.samples]
        if not kept or not all(isinstance(value, int | float) for value in kept):
            given = {
                key
                for sample in self.samples[:1]
                for key, value in sample.items()
                if key in sample["metrics"] and isinstance(value, int | float)
            }
            raise BenchmarkError(
                f"task {name}: {HARNESS} gives no {metric} for every row of it; it gives"
                f" {', '.join(sorted(given)) or 'none'}"
            )
        return [float(cast("float", value)) for value in kept]

    def outputs(self) -> list[dict[str, Any]]:
        """Prompt, reference and output of every row; the output is JSON of all replies."""
        return [
            {
                "prompt": str(sample["arguments"][0][0]),
                "reference": str(sample["target"]),
                "output": json.dumps(sample["filtered_resps"], default=str),
            }
            for sample in self.samples
        ]


def run_lm_eval_task(harness: Harness, name: str, folder: Path | None, limit: int) -> LmEvalRun:
    """Ask the first rows of one task.

    Args:
        folder: with tasks in lm-eval's YAML form; None for the tasks that come with lm-eval
        limit: number of rows

    Raises:
        BenchmarkError: there is no such task, or its rows cannot be downloaded or read.
    """
    # indexing lm-eval's own 10,000 tasks takes 10 s, so it is left out where a folder is given
    manager = TaskManager(
        include_path=str(folder) if folder else None, include_defaults=folder is None
    )
    if name not in manager.all_tasks:
        where = f"in {folder}" if folder else f"in {HARNESS}"
        raise BenchmarkError(f"there is no task {name!r} {where}; `lm-eval ls tasks` lists them")
    try:
        report = _evaluate(harness, name, manager, limit)
    except (OSError, ConnectionError, ValueError) as error:
        raise BenchmarkError(
            f"task {name}: {HARNESS} cannot get or read its rows ({brief(error)}); they come from"
            " the Hub, so check that the Hub can be reached and run again; a private data set needs"
            " HF_HUB_DISABLE_IMPLICIT_TOKEN=0, with which the saved token goes to every owner"
        ) from error
    samples = report["samples"].get(name, [])
    first_filter = samples[0]["filter"] if samples else ""
    samples = [sample for sample in samples if sample["filter"] == first_filter]
    return LmEvalRun(
        sorted(samples, key=lambda sample: sample["doc_id"]),
        report["higher_is_better"].get(name, {}),
    )


def _evaluate(harness: Harness, name: str, manager: TaskManager, limit: int) -> Any:  # noqa: ANN401
    """As lm-eval's `simple_evaluate`, without the second that it takes to describe the machine."""
    set_seed(harness.seed)
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(harness.seed)
    return evaluate(
        lm=harness.model,
        task_dict=loaded,
        limit=limit,
        apply_chat_template=harness.templated,
        system_instruction=harness.system_prompt or None,
        bootstrap_iters=0,
    )
