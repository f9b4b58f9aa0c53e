"""Judge again what models answered, and see whether the recorded scores follow from it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyarrow import ArrowInvalid

from pipelines.data.rows import ExamplesError
from pipelines.scoring.metrics import ATTEMPTED, RIGHT
from pipelines.scoring.outputs import read_outputs
from pipelines.scoring.row_scores import judge, judge_composites
from store.check import Finding
from store.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meteora.artifacts import ArtifactId, Score
    from store.ledger import Ledger

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Rejudged:
    num_scores: int
    """Scores that were computed again."""
    findings: tuple[Finding, ...]


def rejudge(ledger: Ledger, count: int, seed: int | None = None) -> Rejudged:
    """Compute a sample of the scores again from the outputs that they were made of.

    Args:
        count: scores in the sample; all of them where there are no more
        seed: without one every call draws another sample
    """
    if not ledger.records.parts():
        return Rejudged(0, ())  # nothing is there, and looking makes nothing
    drawn = random.getrandbits(32) if seed is None else seed
    chosen = ledger.query(
        f"SELECT id FROM scores ORDER BY hash(id || '{drawn:d}'), id LIMIT {count:d}"  # noqa: S608
    ).rows
    findings, num_scores = [], 0
    for (benchmark_id,) in chosen:
        score = ledger.score_of(benchmark_id)
        if score is None or score.outputs_sha256 not in ledger.blobs:
            continue  # a missing blob is a finding of its own
        try:
            value, num_samples = _again(ledger, score)
        except DamagedError:
            continue  # and so is a changed one
        except (ArrowInvalid, KeyError, ValueError, ExamplesError) as error:
            findings.append(_finding(benchmark_id, f"its outputs cannot be judged again: {error}"))
            continue
        num_scores += 1
        if abs(value - score.value) > TOLERANCE or num_samples != score.num_samples:
            findings.append(
                _finding(
                    benchmark_id,
                    f"it is recorded as {score.value:.6g} over {score.num_samples} rows, and its"
                    f" outputs come to {value:.6g} over {num_samples}",
                )
            )
    return Rejudged(num_scores, tuple(findings))


def _finding(benchmark_id: ArtifactId, problem: str) -> Finding:
    return Finding("score", benchmark_id, problem)


def _again(ledger: Ledger, score: Score) -> tuple[float, int]:
    """A score's value and number of rows, from what is kept of each row."""
    rows = read_outputs(ledger.blobs.path_of(score.outputs_sha256))
    metric = score.spec.metric
    values: Sequence[float]
    if metric in {RIGHT, ATTEMPTED}:
        values = judge_composites(rows)[metric].values
    elif "asked" in rows[0]:
        values = judge(rows, metric).values
    else:  # the harness's own task, or an older release: its value of each row is what there is
        values = [float(row[metric]) for row in rows]
    return sum(values) / len(values), len(values)
