"""From what is kept of each row to its values: the first time, and whenever somebody checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meteora.artifacts import ScorePart
from pipelines.data.composites import split_answers
from pipelines.data.rows import Row
from pipelines.scoring.metrics import ATTEMPTED, METRICS, RIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Judged:
    values: tuple[float, ...]
    """Of each row."""
    graded: bool
    parts: tuple[ScorePart, ...] = ()


def judge(rows: Sequence[Mapping[str, Any]], metric: str) -> Judged:
    """The metric's value of each row.

    Args:
        rows: each with what was `asked`, as JSON, and the `output` or the `log_likelihoods`
    """
    how = METRICS[metric]
    said = "log_likelihoods" if how.of_choices else "output"
    values = (how.judge(row[said], Row.from_dict(json.loads(row["asked"]))) for row in rows)
    return Judged(tuple(values), graded=how.graded)


def judge_composites(rows: Sequence[Mapping[str, Any]]) -> dict[str, Judged]:
    """The shares of each composite's questions that were answered rightly, and at all.

    Args:
        rows: each with what was `asked`, what every task is `judged_by`, and the `output`
    """
    right: list[float] = []
    attempted: list[float] = []
    by_task: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        judged_by = json.loads(row["judged_by"])
        questions = json.loads(row["asked"])["questions"]
        answers = split_answers(row["output"], len(questions))
        values = []
        for number, (task, body) in enumerate(questions, 1):
            metric = METRICS[judged_by[task]]
            value = metric.judge(answers.get(number, ""), Row.from_dict(body))
            by_task.setdefault(task, []).append((value, number in answers))
            values.append(value)
        right.append(sum(values) / len(questions))
        attempted.append(len(answers) / len(questions))
    parts = {task: _part(task, found) for task, found in sorted(by_task.items())}
    tried = tuple(
        ScorePart(task, part.num_attempted / part.num_samples, part.num_samples, part.num_attempted)
        for task, part in parts.items()
    )
    return {
        RIGHT: Judged(tuple(right), graded=True, parts=tuple(parts.values())),
        ATTEMPTED: Judged(tuple(attempted), graded=True, parts=tried),
    }


def _part(task: str, found: Sequence[tuple[float, bool]]) -> ScorePart:
    value = sum(value for value, _ in found) / len(found)
    return ScorePart(task, value, len(found), sum(tried for _, tried in found))
