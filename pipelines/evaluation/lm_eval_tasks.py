"""Tasks of lm-eval's own: it makes the prompts and computes the value of each row."""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from accelerate.utils import set_seed
from lm_eval.api.metrics import mean
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, get_metric_aggregation
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from meteora.untrusted.findings import brief, did_you_mean, listed, shortened
from pipelines.evaluation.harness import HARNESS, BenchmarkError, Harness
from pipelines.evaluation.tasks import Task
from pipelines.scoring.intervals import are_graded
from pipelines.scoring.outputs import RowValues


@cache
def _own_tasks() -> TaskManager:
    """The index of lm-eval's 10,000 tasks; it takes 10 s to build."""
    return TaskManager()


def find_lm_eval_task(task: Task) -> TaskManager:
    """Find a task of lm-eval, without its rows, and run none of its code.

    Raises:
        BenchmarkError: there is none of this name, or its YAML does not have the metrics.
    """
    name, folder = task.lm_eval, task.folder
    if folder is None:
        manager = _own_tasks()
    elif not folder.is_dir():
        raise BenchmarkError(
            f"there is no folder {folder}, where the task {name!r} should be; `folder` names the"
            " folder with its YAML"
        )
    else:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if name not in manager.all_subtasks:
        where = f"in {folder}" if folder else f"in {HARNESS}"
        if name in manager.all_tasks:
            raise BenchmarkError(
                f"{name!r} is no task but a group of tasks {where}; name the ones that you mean:"
                f" {shortened(', '.join(_members(manager, name)), 300)}"
            )
        meant = did_you_mean(name, manager.all_subtasks)
        those = listed(manager.all_subtasks, 8) or "none that lm-eval can read"
        there = f"it has {those}" if folder else "`lm-eval ls tasks` lists them"
        raise BenchmarkError(f"there is no task {name!r} {where}{meant}; {there}")
    if (aggregations := _declared(manager.task_index[name].cfg or {})) is not None:
        _check_metrics(task, aggregations)
    return manager


def _declared(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The aggregation of each metric that a task's YAML names; None if its code decides that."""
    default = DEFAULT_METRIC_REGISTRY.get(config.get("output_type", ""), ())
    entries = config.get("metric_list") or [{"metric": name} for name in default]
    aggregations = {}
    for entry in entries:
        metric = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(metric, str) or "/" in metric:  # a function's file, or not lm-eval's form
            return None
        if "aggregation" in entry:
            aggregations[metric] = mean if entry["aggregation"] == "mean" else None
        else:
            aggregations[metric] = get_metric_aggregation(metric)
    return aggregations or None


def ask_lm_eval_task(
    harness: Harness, task: Task
) -> tuple[dict[str, RowValues], list[dict[str, Any]]]:
    """Lm-eval's values, by metric, and outputs for the first `task.limit` rows of one task.

    An output is JSON of all replies to a row.

    Raises:
        BenchmarkError: there is no such task, it does not have the metrics, its rows cannot be
            downloaded or read, or lm-eval does not compute a number for each of them.
    """
    name, manager = task.lm_eval, find_lm_eval_task(task)
    try:
        report = _evaluate(harness, task, manager)
    except (OSError, ConnectionError, ValueError, AssertionError) as error:
        raise BenchmarkError(
            f"task {name}: {HARNESS} cannot get or read its rows ({brief(error)}); they come from"
            " the Hub, so check that the Hub can be reached and run again; a private data set needs"
            " HF_HUB_DISABLE_IMPLICIT_TOKEN=0, with which the saved token goes to every owner"
        ) from error
    samples = report["samples"].get(name, [])
    first_filter = samples[0]["filter"] if samples else ""
    samples = [sample for sample in samples if sample["filter"] == first_filter]
    samples.sort(key=lambda sample: sample["doc_id"])
    higher_is_better = report["higher_is_better"].get(name, {})
    values = {}
    for metric in task.metrics:
        results = [sample.get(metric) for sample in samples]
        numbers = [value for value in results if isinstance(value, int | float)]
        if not results or len(numbers) < len(results) or not all(map(math.isfinite, numbers)):
            raise BenchmarkError(
                f"task {task.name}: {HARNESS} gives no {metric} for every row of it"
            )
        of_rows = tuple(map(float, numbers))
        values[metric] = RowValues(
            of_rows,
            graded=are_graded(of_rows),
            higher_is_better=higher_is_better.get(metric, True),
        )
    outputs = [
        {
            "prompt": str(sample["arguments"][0][0]),
            "reference": str(sample["target"]),
            "output": json.dumps(sample["filtered_resps"], default=str),
        }
        for sample in samples
    ]
    return values, outputs


def _members(manager: TaskManager, name: str) -> list[str]:
    """The names in a group, or of the tasks with a tag."""
    entry = manager.task_index[name]
    members = (entry.cfg or {}).get("task", sorted(entry.tags))
    return [
        str(one.get("task") or one.get("group")) if isinstance(one, dict) else str(one)
        for one in ([members] if isinstance(members, str) else members)
    ]


def _evaluate(harness: Harness, task: Task, manager: TaskManager) -> Any:  # noqa: ANN401
    """Lm-eval's `simple_evaluate`, without its description of the machine, which takes 1 s."""
    set_seed(harness.seed)
    loaded = manager.load([task.lm_eval])
    for lm_eval_task in loaded["tasks"].values():
        _check_metrics(task, lm_eval_task.aggregation())
        if task.own_length is not None and lm_eval_task.OUTPUT_TYPE == "generate_until":
            if task.own_length >= harness.max_length:
                raise BenchmarkError(
                    f"task {task.name}: `max_new_tokens` is {task.own_length}, and the base has"
                    f" room for {harness.max_length} tokens with the prompt; lower it"
                )
            length = {"max_gen_toks": task.own_length}
            lm_eval_task.set_config("generation_kwargs", length, update=True)
        lm_eval_task.set_config("num_fewshot", task.num_fewshot)
        lm_eval_task.set_fewshot_seed(harness.seed)
    return evaluate(
        lm=harness,
        task_dict=loaded,
        limit=task.limit,
        apply_chat_template=harness.templated,
        system_instruction=harness.system_prompt or None,
        bootstrap_iters=0,
    )


def _check_metrics(task: Task, aggregations: Mapping[str, Any]) -> None:
    """Refuse a metric that is not a mean over rows: intervals and tests need means."""
    means = [metric for metric, aggregation in aggregations.items() if aggregation is mean]
    for metric in task.metrics:
        if metric not in means:
            why = "is no mean over rows" if metric in aggregations else "is none of its metrics"
            raise BenchmarkError(
                f"task {task.name}: {metric} {why} in {HARNESS}; those that are:"
                f" {', '.join(means) or 'none'}"
            )
