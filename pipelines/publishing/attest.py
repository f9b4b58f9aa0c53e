"""An in-toto statement on any artifact, read off the ledger."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meteora.artifacts import short
from pipelines.publishing.in_toto import dependency, statement
from store.errors import UnknownError

if TYPE_CHECKING:
    from meteora.artifacts import ArtifactId
    from store.ledger import Ledger

ARTIFACT_ID = re.compile(r"[a-z]+:[0-9a-f]{64}")
MADE_FROM = """
SELECT relative_id, kind, coalesce(source, ''), coalesce(revision, ''), coalesce(licence, ''),
       coalesce(weights_sha256, '')
FROM lineage WHERE artifact_id = '{}' AND relation = 'made from' ORDER BY depth, kind, relative_id
"""
MADE_BY = """
SELECT weights_sha256, record_sha256, artifacts.run_id, recipe_name, recipe_sha256, started_at,
       ended_at
FROM artifacts LEFT JOIN runs USING (run_id) WHERE id = '{}'
"""


def attest(ledger: Ledger, artifact_id: ArtifactId) -> str:
    """An in-toto statement on one artifact: what it is, what it was made of, and by which run.

    An artifact without bytes of its own, such as a comparison, is told by the record that says it.
    """
    known = ARTIFACT_ID.fullmatch(artifact_id)
    made = ledger.query(MADE_BY.format(artifact_id)).rows if known else []
    if not made:
        raise UnknownError(
            f"{short(artifact_id)} is not in the index; `meteora store rebuild` makes it again"
        )
    weights, record, run_id, recipe_name, recipe_sha256, started, ended = made[0]
    asked = {"recipe": recipe_name, "recipe_sha256": recipe_sha256} if recipe_sha256 else {}
    run = {"invocationId": run_id}
    run |= {
        name: f"{moment.isoformat()}Z"
        for name, moment in (("startedOn", started), ("finishedOn", ended))
        if moment
    }
    return statement(
        {artifact_id if weights else f"record of {artifact_id}": weights or record},
        made_of=[_dependency(*row) for row in ledger.query(MADE_FROM.format(artifact_id)).rows],
        asked=asked,
        chosen={"id": artifact_id, "spec": ledger.spec_of(artifact_id)},
        run=run,
    )


def _dependency(
    artifact_id: str, kind: str, source: str, revision: str, licence: str, weights: str
) -> dict[str, Any]:
    if source:
        return dependency(kind, source, revision, sha256=weights, licence=licence)
    return dependency(kind, artifact_id, "", sha256=weights or artifact_id.partition(":")[2])
