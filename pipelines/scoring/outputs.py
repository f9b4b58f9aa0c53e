"""The answers of a measurement, kept in one Parquet file, and the value of each.

A file has one row for each question. It holds what was asked and what was answered, so values can
be computed from it again; they are computed in the same way right after a system has answered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteora.artifacts import ScorePart
from pipelines.data.composites import split_answers
from pipelines.data.rows import Row
from pipelines.scoring.intervals import interval_of_mean
from pipelines.scoring.metrics import ATTEMPTED, METRICS, RIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class RowValues:
    """One metric's value of every row of a task."""

    values: tuple[float, ...]
    """Of each row, in order."""
    graded: bool
    """Whether a row may be partly right; see `Metric.graded`."""
    parts: tuple[ScorePart, ...] = ()
    """Of composites: the same metric on the questions of each task."""
    higher_is_better: bool = True

    @property
    def mean(self) -> float:
        """The score."""
        return sum(self.values) / len(self.values)

    def interval(self, seed: int = 0) -> tuple[str, float, float]:
        """The score's 95 % interval: the method's name, the lower end, the upper end."""
        return interval_of_mean(self.values, graded=self.graded, seed=seed)


def write_outputs(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same columns; equal rows give equal bytes."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def read_outputs(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file, with all columns or some.

    Raises:
        pyarrow.ArrowInvalid: it is not a Parquet file.
    """
    # ParquetFile, not read_table: that would read partitions out of the names of a blob's folders
    table = pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    return table.to_pylist()


def compute_values(rows: Sequence[Mapping[str, Any]], metric: str) -> RowValues:
    """The value of each row.

    Args:
        rows: with the columns `asked` (JSON of a `Row`), and `output` or, for a metric of choices,
            `log_likelihoods`
        metric: a key of `METRICS`
    """
    chosen = METRICS[metric]
    column = "log_likelihoods" if chosen.of_choices else "output"
    values = (chosen.compute(row[column], Row.from_dict(json.loads(row["asked"]))) for row in rows)
    return RowValues(tuple(values), graded=chosen.graded)


def compute_composite_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, RowValues]:
    """The shares of each composite's questions that were answered rightly, and at all.

    Args:
        rows: with the columns `asked` (JSON of a `Composite`), `judged_by` (JSON of the metric of
            each task) and `output`

    Returns:
        by metric, `RIGHT` and `ATTEMPTED`
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
            value = metric.compute(answers.get(number, ""), Row.from_dict(body))
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
        RIGHT: RowValues(tuple(right), graded=True, parts=tuple(parts.values())),
        ATTEMPTED: RowValues(tuple(attempted), graded=True, parts=tried),
    }


def _part(task: str, found: Sequence[tuple[float, bool]]) -> ScorePart:
    value = sum(value for value, _ in found) / len(found)
    return ScorePart(task, value, len(found), sum(tried for _, tried in found))
