"""The tasks that lm-eval brings: asked its way and judged by itself; we take its values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import set_seed
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from pipelines.evaluation.harness import HARNESS, BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.evaluation.harness import Harness


@dataclass(frozen=True)
class OwnTask:
    samples: list[dict[str, Any]]
    higher_is_better: dict[str, bool]

    def values(self, name: str, metric: str) -> list[float]:
        """The metric's value of every row."""
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
        """What is kept of every row: the question and the replies as the harness holds them."""
        return [
            {
                "prompt": str(sample["arguments"][0][0]),
                "reference": str(sample["target"]),
                "output": json.dumps(sample["filtered_resps"], default=str),
            }
            for sample in self.samples
        ]


def own_task(harness: Harness, name: str, folder: Path | None, limit: int) -> OwnTask:
    """Ask one of lm-eval's tasks, or one of a folder of its form.

    Raises:
        BenchmarkError: it knows no such task, or cannot get its rows.
    """
    # its own 10,000 tasks take 10 s to index: not beside a folder's
    manager = TaskManager(
        include_path=str(folder) if folder else None, include_defaults=folder is None
    )
    if name not in manager.all_tasks:
        where = f"in {folder}" if folder else f"in {HARNESS}"
        raise BenchmarkError(f"there is no task {name!r} {where}; `lm-eval ls tasks` lists them")
    try:
        report = _evaluate(harness, name, manager, limit)
    except (OSError, ConnectionError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise BenchmarkError(
            f"task {name}: {HARNESS} cannot get or read its rows ({first}); they come from the"
            " Hub, which has to be reached once"
        ) from error
    samples = report["samples"].get(name, [])
    first_filter = samples[0]["filter"] if samples else ""
    samples = [sample for sample in samples if sample["filter"] == first_filter]
    return OwnTask(
        sorted(samples, key=lambda sample: sample["doc_id"]),
        report["higher_is_better"].get(name, {}),
    )


def _evaluate(harness: Harness, name: str, manager: TaskManager, limit: int) -> Any:  # noqa: ANN401
    """What its `simple_evaluate` does, but for a second of questions about the machine."""
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
        bootstrap_iters=0,
    )
