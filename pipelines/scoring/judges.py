"""Check that recorded scores of mixed questions used the metrics of the present recipe.

The id of such a score depends on the questions, but not on the metric of each. So after a change of
an expert's metric, the old values would count for the new recipe.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

from meteora.artifacts import ArtifactId, MeteoraError, Score
from store.errors import DamagedError
from store.ledger import Ledger


class JudgedError(MeteoraError):
    """A recorded score used another metric than the recipe names now."""


def judged_scores(
    ledger: Ledger, ids: Iterable[ArtifactId], asked: Mapping[str, Mapping[str, str]]
) -> dict[str, Score]:
    """The recorded scores among these ids, by id, if the metrics of mixed questions are the same.

    Answers that are not on this disk, or damaged, are not compared.

    Args:
        asked: the metric of each part, by composite or conversation and by part

    Raises:
        JudgedError: a part has another metric now.
    """
    scores = ledger.scores_of(ids)
    for score in sorted(scores.values(), key=lambda score: score.spec.task):
        name = score.spec.task
        then = _judges(ledger, score) if asked.get(name) else {}
        for part, metric in asked.get(name, {}).items():
            if then.get(part, metric) != metric:
                raise JudgedError(
                    f"{name} is recorded with the answers of {part} judged by {then[part]}, and the"
                    f" recipe has {metric} now; recorded scores stay as they are, so give the"
                    f" recipe another `benchmark: {{seed: …}}`, which asks other questions, or"
                    f" {part} its old metric"
                )
    return scores


def _judges(ledger: Ledger, score: Score) -> dict[str, str]:
    """The metric that judged each part of a score; empty if its answers do not state it."""
    from pipelines.scoring.outputs import (  # noqa: PLC0415  (slow to import; few recipes mix tasks)
        OutputsError,
        read_outputs,
    )

    if ledger.blobs.place_of(score.outputs_sha256).is_file():
        with suppress(OutputsError, DamagedError, KeyError):
            answers = read_outputs(ledger.blobs.path_of(score.outputs_sha256), ["judged_by"])
            return json.loads(answers[0]["judged_by"]) if answers else {}
    return {}
