"""What an artifact is and what it was made of, as an in-toto statement with SLSA provenance.

One shape for both who need it: the `lineage.json` of a checkpoint's files, and `meteora attest` for
any artifact of the ledger.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from meteora import __version__
from meteora.artifacts import COMMIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:meteora-pipelines:run:v1"
BUILDER = "urn:meteora-pipelines"


def statement(
    subject: Mapping[str, str],
    *,
    made_of: Sequence[Mapping[str, Any]],
    asked: Mapping[str, Any],
    chosen: Mapping[str, Any],
    run: Mapping[str, str] | None = None,
) -> str:
    """The statement as JSON.

    Args:
        subject: SHA-256 by name
        made_of: as `dependency` gives them
        asked: what a person asked for: the recipe
        chosen: what followed from it: ids and settings
        run: `invocationId`, `startedOn`, `finishedOn`, as far as they are known
    """
    details: dict[str, Any] = {"builder": {"id": BUILDER, "version": {BUILDER: __version__}}}
    if run:
        details["metadata"] = dict(run)
    return (
        json.dumps(
            {
                "_type": STATEMENT,
                "subject": [{"name": n, "digest": {"sha256": sha}} for n, sha in subject.items()],
                "predicateType": PREDICATE,
                "predicate": {
                    "buildDefinition": {
                        "buildType": BUILD,
                        "externalParameters": dict(asked),
                        "internalParameters": dict(chosen),
                        "resolvedDependencies": list(made_of),
                    },
                    "runDetails": details,
                },
            },
            indent=1,
        )
        + "\n"
    )


def dependency(
    name: str, source: str, revision: str, *, sha256: str = "", licence: str = ""
) -> dict[str, Any]:
    """A Hub commit, or a local file by its hash; `sha256` is that of the weights, where known."""
    pinned = COMMIT.fullmatch(revision)
    found: dict[str, Any] = {
        "name": name,
        "uri": f"hf://{source}@{revision}" if pinned else source,
        "digest": {"gitCommit": revision} if pinned else {},
    }
    if sha256 or not pinned:
        found["digest"]["sha256"] = sha256 or revision.removeprefix("sha256:")
    if licence:
        found["annotations"] = {"licence": licence}
    return found
