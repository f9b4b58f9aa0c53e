"""Measure a model on a task: what it answers, what that is worth, and how sure that is."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.harness import HARNESS, Harness
from pipelines.evaluation.resume import Nowhere, in_portions
from pipelines.scoring import intervals
from pipelines.scoring.metrics import METRICS
from pipelines.scoring.row_scores import Judged, judge, judge_composites

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import ScorePart
    from pipelines.evaluation.resume import Keeping
    from pipelines.evaluation.tasks import Task


@dataclass(frozen=True)
class Measured:
    """A score of one model on one task."""

    value: float
    stderr: float
    low: float
    high: float
    interval: str
    higher_is_better: bool
    parts: tuple[ScorePart, ...]


@dataclass(frozen=True)
class Answered:
    """What a model made of a task: every metric's score, and every row that they are made of."""

    scores: dict[str, Measured]
    outputs: tuple[dict[str, Any], ...]
    """Of each row in order: prompt, reference, output, and each metric's value."""
    templated: bool
    num_empty: int
    num_truncated: int
    prompt_tokens: tuple[int, ...]
    """Of each row; empty for tasks of the harness."""
    harness: str
    wall_seconds: float

    @property
    def num_samples(self) -> int:
        return len(self.outputs)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int,
    seed: int = 0,
    kept: Keeping | None = None,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Answered:
    """Ask a live model, as it is routed now, every question of a task.

    Args:
        kept: where answers of the same asking are found that was stopped, and left as they come
        advance: called with the number of prompts, or pairs of prompt and choice, just done

    Raises:
        BenchmarkError: the task cannot be asked as it is.
    """
    started = time.perf_counter()
    harness = Harness(
        model,
        tokenizer,
        batch_size=batch_size,
        template=task.template,
        seed=seed,
        advance=advance,
    )
    if task.lm_eval:
        return _by_itself(harness, task, seed, started)
    prompts = [asked.prompt for asked in task.composites or task.rows]
    lengths = harness.prompt_tokens(prompts)
    columns: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_tokens": n} for prompt, n in zip(prompts, lengths, strict=True)
    ]
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "kept": kept or Nowhere(),
        "advance": advance,
    }
    replies: list[tuple[str, bool]] = []
    if task.composites or any(not METRICS[metric].of_choices for metric in task.metrics):
        harness.check_room(task.name, lengths, task.max_new_tokens)
        ask = partial(harness.generate, max_new_tokens=task.max_new_tokens)
        replies = in_portions(prompts, ask, phase="generate", **how)
        for column, (text, truncated) in zip(columns, replies, strict=True):
            column |= {"output": text, "truncated": truncated}
    if not task.composites and any(METRICS[metric].of_choices for metric in task.metrics):
        harness.check_choices(task.name, task.rows)
        weighed = in_portions(
            task.rows, harness.weigh, phase="weigh", parts_of=lambda row: len(row.choices), **how
        )
        for column, values in zip(columns, weighed, strict=True):
            column["log_likelihoods"] = values
    judged = _judge(task, columns)
    for metric, found in judged.items():
        for column, value in zip(columns, found.values, strict=True):
            column[metric] = value
    return Answered(
        scores={metric: _score(found, seed) for metric, found in judged.items()},
        outputs=tuple(columns),
        templated=harness.templated,
        num_empty=sum(not text.strip() for text, _ in replies),
        num_truncated=sum(truncated for _, truncated in replies),
        prompt_tokens=tuple(lengths),
        harness=HARNESS,
        wall_seconds=time.perf_counter() - started,
    )


def _judge(task: Task, columns: Sequence[dict[str, Any]]) -> dict[str, Judged]:
    """Every metric's values, from what is kept; and beside it all that judging it again needs."""
    for column, asked in zip(columns, task.composites or task.rows, strict=True):
        column["reference"] = asked.response
        column["asked"] = json.dumps(asked.to_dict(), ensure_ascii=False)
        if task.composites:
            column["judged_by"] = json.dumps(dict(task.part_metrics), sort_keys=True)
    if task.composites:
        return judge_composites(columns)
    return {metric: judge(columns, metric) for metric in task.metrics}


def _score(found: Judged, seed: int, *, higher_is_better: bool = True) -> Measured:
    values = found.values
    bounded = min(values) >= 0 and max(values) <= 1
    if not found.graded:
        method, (low, high) = "wilson", intervals.wilson(sum(values), len(values))
    elif bounded or min(values) != max(values):
        method, (low, high) = "bootstrap", intervals.bootstrap(values, seed)
    else:
        method, low, high = "bootstrap", values[0], values[0]
    return Measured(
        value=sum(values) / len(values),
        stderr=intervals.standard_error(values),
        low=low,
        high=high,
        interval=method,
        higher_is_better=higher_is_better,
        parts=found.parts,
    )


def _by_itself(harness: Harness, task: Task, seed: int, started: float) -> Answered:
    """A task that the harness brings: its rows, its prompts, and its own values of every row."""
    from pipelines.evaluation.lm_eval_tasks import own_task  # noqa: PLC0415  (seconds, for most recipes in vain)

    own = own_task(harness, task.lm_eval, task.folder, task.limit)
    outputs = own.outputs()
    scores = {}
    for metric in task.metrics:
        values = own.values(task.name, metric)
        for row, value in zip(outputs, values, strict=True):
            row[metric] = value
        graded = not set(values) <= {0.0, 1.0}
        scores[metric] = _score(
            Judged(tuple(values), graded=graded),
            seed,
            higher_is_better=own.higher_is_better.get(metric, True),
        )
    return Answered(
        scores=scores,
        outputs=tuple(outputs),
        templated=harness.templated,
        num_empty=0,
        num_truncated=0,
        prompt_tokens=(),
        harness=HARNESS,
        wall_seconds=time.perf_counter() - started,
    )
