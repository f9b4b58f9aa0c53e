"""The answers of a measurement in one Parquet file, and the value of each.

A file has one row for each question, composite or conversation. It holds prompts and answers, so
values can be computed from it again, by the same functions as right after the measurement.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteora.artifacts import MeteoraError, ScorePart, ScoreTurn
from meteora.untrusted.findings import brief
from pipelines.data.composites import split_answers
from pipelines.data.rows import Row
from pipelines.scoring.intervals import interval_of_mean
from pipelines.scoring.metrics import ATTEMPTED, METRICS, RIGHT, TURNS_RIGHT

COSTS = ("prompt_tokens", "computed_tokens", "new_tokens", "seconds")
"""The costs of a turn of a conversation, as named in the column `turns` and in `ScoreTurn`."""


class OutputsError(MeteoraError):
    """The file of a score's answers cannot be read."""


@dataclass(frozen=True)
class RowValues:
    """One metric's value of every row of a task."""

    values: tuple[float, ...]
    """Of each row, in order."""
    graded: bool
    """Whether a row may be partly right; see `Metric.graded`."""
    parts: tuple[ScorePart, ...] = ()
    """For composites and conversations: the same metric on the questions of each task."""
    higher_is_better: bool = True
    turns: tuple[ScoreTurn, ...] = ()
    """For conversations: see `Score.turns`."""

    @property
    def mean(self) -> float:
        """The score."""
        return _mean(self.values)

    def interval(self, seed: int = 0) -> tuple[str, float, float]:
        """The score's 95 % interval: the method's name, the lower end, the upper end."""
        return interval_of_mean(self.values, graded=self.graded, seed=seed)


def write_outputs(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same columns; equal rows give equal bytes."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def read_outputs(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet file, with all columns or some; `OutputsError` if it is none."""
    try:
        # not read_table, which takes the names of a blob's folders for partitions
        table = pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
        return table.to_pylist()
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise OutputsError(
            f"the answers in {path} cannot be read ({brief(error)}); `meteora verify` checks them"
            " against their hash, and a backup may have them"
        ) from error


def compute_values(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> dict[str, RowValues]:
    """The values of all rows, by metric.

    Args:
        rows: with the columns `asked` (JSON of a `Row`), and `output` or, for a metric of choices,
            `log_likelihoods`; for the metrics of composites and of conversations, those of
            `compute_composite_values` and `compute_conversation_values`
        metrics: of one task
    """
    if TURNS_RIGHT in metrics:
        return compute_conversation_values(rows)
    if RIGHT in metrics or ATTEMPTED in metrics:
        return compute_composite_values(rows)
    return {metric: _values(rows, metric) for metric in metrics}


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> RowValues:
    chosen = METRICS[metric]
    column = "log_likelihoods" if chosen.of_choices else "output"
    values = (chosen.compute(row[column], Row.from_dict(json.loads(row["asked"]))) for row in rows)
    return RowValues(tuple(values), graded=chosen.graded)


def compute_composite_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, RowValues]:
    """The shares of questions with a right answer, `RIGHT`, and with any answer, `ATTEMPTED`.

    Args:
        rows: with the columns `asked` (JSON of a `Composite`), `judged_by` (JSON of the metric of
            each task) and `output`
    """
    right: list[float] = []
    attempted: list[float] = []
    by_task: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        asked = json.loads(row["asked"])["questions"]
        answers = split_answers(row["output"], len(asked))
        texts = [answers.get(number, "") for number in range(1, len(asked) + 1)]
        values = _judge(row, texts, by_task)
        right.append(_mean(values))
        attempted.append(len(answers) / len(values))
    parts = _parts(by_task)
    tried = tuple(
        ScorePart(part.name, part.num_attempted / part.num_samples, part.num_samples,
                  part.num_attempted)
        for part in parts
    )  # fmt: skip
    return {
        RIGHT: RowValues(tuple(right), graded=True, parts=parts),
        ATTEMPTED: RowValues(tuple(attempted), graded=True, parts=tried),
    }


def compute_conversation_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, RowValues]:
    """The mean over the turns of each conversation, and over the conversations at each turn.

    A conversation is one row: its turns depend on each other, so intervals and tests must not take
    them as rows of their own.

    Args:
        rows: with the columns `asked` (JSON of a `Dialogue`), `judged_by` (JSON of the metric of
            each task) and `turns` (JSON of each turn's answer and `COSTS`)
    """
    by_task: dict[str, list[tuple[float, bool]]] = {}
    turns = [json.loads(row["turns"]) for row in rows]
    values = [
        _judge(row, [turn["output"] for turn in own], by_task)
        for row, own in zip(rows, turns, strict=True)
    ]
    at_turns = [
        ScoreTurn(number, _mean(right), *(_mean([turn[name] for turn in took]) for name in COSTS))
        for number, (right, took) in enumerate(
            zip(zip(*values, strict=True), zip(*turns, strict=True), strict=True), 1
        )
    ]
    means = tuple(map(_mean, values))
    found = RowValues(means, graded=True, parts=_parts(by_task), turns=tuple(at_turns))
    return {TURNS_RIGHT: found}


def _judge(
    row: Mapping[str, Any], answers: Sequence[str], by_task: dict[str, list[tuple[float, bool]]]
) -> list[float]:
    """The value of the answer to each question of a row.

    Args:
        by_task: gets each value, and whether there is an answer, by the question's task
    """
    judged_by, values = json.loads(row["judged_by"]), []
    asked = json.loads(row["asked"])["questions"]
    for (task, body), answer in zip(asked, answers, strict=True):
        value = METRICS[judged_by[task]].compute(answer, Row.from_dict(body))
        by_task.setdefault(task, []).append((value, bool(answer.strip())))
        values.append(value)
    return values


def _parts(by_task: Mapping[str, Sequence[tuple[float, bool]]]) -> tuple[ScorePart, ...]:
    return tuple(
        ScorePart(
            task, _mean([value for value, _ in found]), len(found), sum(tried for _, tried in found)
        )
        for task, found in sorted(by_task.items())
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
