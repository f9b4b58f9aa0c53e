"""Compute recorded scores again from recorded answers, and find those that differ."""

from dataclasses import dataclass

from meteora.artifacts import Score
from pipelines.data.rows import ExamplesError
from pipelines.scoring.outputs import OutputsError, RowValues, compute_values, read_outputs
from store.check import Finding
from store.errors import DamagedError, StoreError
from store.ledger import Ledger

TOLERANCE = 1e-9
"""Scores, and ends of intervals, that differ by less count as equal."""
DRAWN = 0.1
"""The same for ends of a bootstrap's interval, as a share of its width: another release of numpy
may draw other resamples."""


@dataclass(frozen=True)
class Recomputed:
    """The result of computing a sample of scores again."""

    num_scores: int
    """Scores that could be computed again."""
    findings: tuple[Finding, ...]
    """One for each score that differs, or whose answers cannot be read; or one for the index."""


def recompute_scores(ledger: Ledger, count: int) -> Recomputed:
    """Compute up to `count` scores, others each time, again from their outputs.

    Outputs that are missing or damaged are left out here: the check of blobs reports them.
    """
    if not ledger.records.parts():
        return Recomputed(0, ())  # a query would create the index in an empty home
    try:
        chosen = ledger.scores(f"SELECT id FROM scores ORDER BY random() LIMIT {count:d}")  # noqa: S608
    except StoreError as error:
        problem = f"scores cannot be computed again: {error}"
        return Recomputed(0, (Finding("index", ledger.index.snapshot.name, problem),))
    findings, num_scores = [], 0
    for score in chosen:
        if score.outputs_sha256 not in ledger.blobs:
            continue
        try:
            problem = _difference(score, _recompute(ledger, score))
            num_scores += 1
        except DamagedError:
            continue
        except (OutputsError, LookupError, TypeError, ValueError, ExamplesError) as error:
            problem = f"it cannot be computed again from its outputs: {error}"
        if problem:
            findings.append(Finding("score", score.spec.id, problem))
    return Recomputed(num_scores, tuple(findings))


def _difference(score: Score, found: RowValues) -> str:
    """How a recorded score differs from what its outputs give; empty if it does not."""
    num_samples = len(found.values)
    same = abs(found.mean - score.value) <= TOLERANCE  # False for NaN
    if not same or num_samples != score.num_samples:
        return (
            f"it is recorded as {score.value:.6g} over {score.num_samples} rows, but its outputs"
            f" give {found.mean:.6g} over {num_samples}"
        )
    _, low, high = found.interval(score.spec.seed)
    apart = max(abs(low - score.low), abs(high - score.high))
    if apart > max(TOLERANCE, DRAWN * (high - low) if found.graded else 0.0):
        return (
            f"its interval is recorded as {score.low:.6g} to {score.high:.6g}, but its outputs give"
            f" {low:.6g} to {high:.6g}"
        )
    return ""


def _recompute(ledger: Ledger, score: Score) -> RowValues:
    rows = read_outputs(ledger.blobs.path_of(score.outputs_sha256))
    metric = score.spec.metric
    if "asked" in rows[0]:
        return compute_values(rows, [metric])[metric]
    # lm-eval's own task, or an older release: the file has only the values computed at that time
    graded = score.interval == "bootstrap"
    return RowValues(tuple(float(row[metric]) for row in rows), graded=graded)
