"""Compare two systems on the same rows: the difference, its interval, and a test."""

import re
from dataclasses import replace

from meteora.artifacts import ArtifactId, ComparisonBuild, ComparisonSpec, Difference, Score
from pipelines.scoring import intervals
from pipelines.scoring.metrics import ATTEMPTED
from pipelines.scoring.outputs import read_outputs
from store.ledger import Ledger

DATE = re.compile(r"\d{1,2} [A-Z][a-z]{2,8} \d{4}|\d{4}-\d\d-\d\d")
"""Today's date, as chat templates write it: `26 Jul 2024`."""


def compare(ledger: Ledger, spec: ComparisonSpec) -> ComparisonBuild:
    """Test the pair of scores of every task, and correct the p-values over the tasks.

    The scores have to be in the ledger. A pair that was not asked the same rows is left out;
    without any pair the mean difference is 0.
    """
    scores = ledger.scores_of(one for pair in spec.pairs for one in (pair.score_id, pair.other_id))
    tested: list[Difference] = []
    better: list[tuple[float, float, float]] = []
    for pair in spec.pairs:
        ours, theirs = scores[pair.score_id], scores[pair.other_id]
        values = values_on_same_rows(ledger, ours, theirs)
        if values is None:
            continue
        graded = intervals.are_graded(*values)
        low, high = intervals.difference_interval(*values, graded=graded, seed=spec.seed)
        one = Difference(
            task=ours.spec.task,
            metric=ours.spec.metric,
            score_id=ours.spec.id,
            other_id=theirs.spec.id,
            difference=intervals.difference(ours.value, theirs.value),
            low=low,
            high=high,
            p_value=intervals.paired_p(*values, seed=spec.seed),
            p_holm=0.0,  # set below, once all p-values are known
            test="sign-flip" if graded else "mcnemar",
            num_samples=ours.num_samples,
        )
        tested.append(one)
        higher = (one.difference, low, high)
        better.append(higher if ours.higher_is_better else (-one.difference, -high, -low))
    if not tested:
        return ComparisonBuild(spec, (), 0.0, 0.0, 0.0)
    corrected = intervals.holm([one.p_value for one in tested])
    differences = (
        replace(one, p_holm=p_holm) for one, p_holm in zip(tested, corrected, strict=True)
    )
    return ComparisonBuild(spec, tuple(differences), *intervals.mean_difference(better))


def values_on_same_rows(
    ledger: Ledger, one: Score, other: Score
) -> tuple[list[float], list[float]] | None:
    """The value of each row of two scores on one task, by their recorded answers.

    None if they are not of the same rows. A task of lm-eval's own has its rows and prompts from
    lm-eval and a data set, and `rows_sha256` holds the version of neither. On two bases, whose
    templates may differ, the references count in place of the prompts. Dates do not count:
    templates write today's.
    """
    column = "prompt" if one.spec.base_id == other.spec.base_id else "reference"
    ours, theirs = (
        read_outputs(ledger.blobs.path_of(score.outputs_sha256), [column, score.spec.metric])
        for score in (one, other)
    )
    asked, asked_other = (
        [DATE.sub("", str(row.get(column))) for row in rows] for rows in (ours, theirs)
    )
    if asked != asked_other:
        return None
    return (
        [float(row[one.spec.metric]) for row in ours],
        [float(row[other.spec.metric]) for row in theirs],
    )


def scores_in_common(
    ledger: Ledger, subject_id: ArtifactId, other_id: ArtifactId, other_base_id: ArtifactId
) -> dict[str, list[tuple[Score, Score]]]:
    """The scores of two subjects on the same rows with the same settings, by task.

    A pair for each metric that both have; if a task was measured several times, the last pairs.
    The other subject may have another base.
    """
    ours = recorded_scores(ledger, subject_id)
    twins = [replace(one.spec, subject_id=other_id, base_id=other_base_id).id for one in ours]
    theirs = ledger.scores_of(twins)
    askings: dict[ArtifactId, list[tuple[Score, Score]]] = {}
    last: dict[str, ArtifactId] = {}
    for one, twin in zip(ours, twins, strict=True):
        if twin in theirs and values_on_same_rows(ledger, one, theirs[twin]) is not None:
            asking = last[one.spec.task] = replace(one.spec, metric="").id
            askings.setdefault(asking, []).append((one, theirs[twin]))
    return {task: askings[asking] for task, asking in last.items()}


def recorded_scores(ledger: Ledger, subject_id: ArtifactId) -> list[Score]:
    """All scores of a subject, earliest first; without shares of attempts, which rate no answer."""
    return ledger.scores(
        f"SELECT id FROM scores WHERE subject_id = '{subject_id}'"  # noqa: S608  (an id)
        f" AND metric <> '{ATTEMPTED}' ORDER BY recorded_at, record_sha256"
    )
