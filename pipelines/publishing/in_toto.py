"""Artifacts and their sources, as in-toto statements with SLSA provenance.

`write_lineage` makes the `lineage.json` of a checkpoint from its manifest; `attest` makes a
statement on any artifact from the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from meteora import __version__
from meteora.artifacts import COMMIT, REPO_ID, ArtifactId, short
from pipelines.data.row_sources import data_set_of
from store.errors import UnknownError

if TYPE_CHECKING:
    from meteora.checkpoint.manifest import Manifest
    from store.ledger import Ledger

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:meteora-pipelines:run:v1"
BUILDER = "urn:meteora-pipelines"
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


class DataSet(NamedTuple):
    """A data set of the Hub with examples of an expert."""

    expert: str
    source: str
    """`datasets/owner/name`, or `datasets/name`."""
    commit: str
    licence: str
    """As its card states it; empty if that is not known."""


def write_lineage(manifest: Manifest, recipe_sha256: str) -> str:
    """The statement on a checkpoint: its files, its base and experts, and what it has grown from.

    Args:
        recipe_sha256: of the recipe that made it; empty if there is none
    """
    base = manifest.base
    experts = [
        _dependency(
            f"expert {expert.name}",
            expert.source,
            expert.revision,
            sha256=expert.weights_sha256,
            licence=expert.licence,
        )
        for expert in manifest.experts
    ]
    parent = str(manifest.gates.get("grown_from", ""))
    parents = []
    if ARTIFACT_ID.fullmatch(parent):
        parents = [_dependency("router", parent, "", sha256=parent.partition(":")[2])]
    return _statement(
        manifest.files,
        dependencies=[
            _dependency("base", base.repo_id, base.revision, licence=base.licence),
            *experts,
            *parents,
            *map(_examples, data_sets(manifest.gates)),
        ],
        external={"recipe_sha256": recipe_sha256},
        internal={
            "fused_id": manifest.fused_id,
            "router_id": manifest.router_id,
            "gates": manifest.gates,
        },
    )


def data_sets(made: Mapping[str, Any]) -> list[DataSet]:
    """The data sets that gates were fitted to, by a `RouterBuild` as a table, or by a manifest."""

    def stated_as(key: str) -> Sequence[object]:
        """What a stranger's manifest may have as anything."""
        value = made.get(key)
        return value if isinstance(value, list | tuple) else ()

    named = [*stated_as("card_examples"), *stated_as("hub_examples")]
    stated = [str(one).partition(": ") for one in stated_as("example_licences")]
    licences = {name: licence for name, _, licence in stated}
    found = []
    for one in map(str, named):
        expert, _, source = one.rpartition(": hf:")
        name, commit = data_set_of(f"hf:{source}")
        place = f"datasets/{name}"  # names of old data sets, such as gsm8k, have no owner
        is_named = REPO_ID.fullmatch(name) or REPO_ID.fullmatch(place)
        if is_named and COMMIT.fullmatch(commit):
            found.append(DataSet(expert, place, commit, licences.get(name, "")))
    return found


def attest(ledger: Ledger, artifact_id: ArtifactId) -> str:
    """The statement on an artifact of the ledger: its hash, its sources, and its run.

    The subject is the artifact's bytes, or its record if it has no bytes, as a comparison.

    Raises:
        UnknownError: The artifact is not in the index.
    """
    known = ARTIFACT_ID.fullmatch(artifact_id)
    made = ledger.query(MADE_BY.format(artifact_id)).rows if known else []
    if not made:
        raise UnknownError(
            f"{short(artifact_id)} is not in the index; `meteora store rebuild` makes it again"
        )
    weights, record, run_id, recipe_name, recipe_sha256, started, ended = made[0]
    run = {"invocationId": run_id}
    run |= {
        name: f"{moment.isoformat()}Z"
        for name, moment in (("startedOn", started), ("finishedOn", ended))
        if moment
    }
    return _statement(
        {artifact_id if weights else f"record of {artifact_id}": weights or record},
        dependencies=[
            *(_ancestor(*row) for row in ledger.query(MADE_FROM.format(artifact_id)).rows),
            *map(_examples, data_sets(ledger.built(artifact_id) or {})),
        ],
        external={"recipe": recipe_name, "recipe_sha256": recipe_sha256} if recipe_sha256 else {},
        internal={"id": artifact_id, "spec": ledger.spec_of(artifact_id)},
        run=run,
    )


def _ancestor(
    artifact_id: str, kind: str, source: str, revision: str, licence: str, weights: str
) -> dict[str, Any]:
    if source:
        return _dependency(kind, source, revision, sha256=weights, licence=licence)
    return _dependency(kind, artifact_id, "", sha256=weights or artifact_id.partition(":")[2])


def _examples(of: DataSet) -> dict[str, Any]:
    return _dependency(f"examples of {of.expert}", of.source, of.commit, licence=of.licence)


def _dependency(
    name: str, source: str, revision: str, *, sha256: str = "", licence: str = ""
) -> dict[str, Any]:
    """A Hub commit, or a local file by its hash; with the hash of its weights, if it is known."""
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


def _statement(
    subject: Mapping[str, str],
    *,
    dependencies: Sequence[Mapping[str, Any]],
    external: Mapping[str, Any],
    internal: Mapping[str, Any],
    run: Mapping[str, str] | None = None,
) -> str:
    """The statement as JSON.

    Args:
        subject: SHA-256 by name
        external: the recipe
        internal: what follows from the recipe
        run: `invocationId`, `startedOn` and `finishedOn`, as far as they are known
    """
    details: dict[str, Any] = {"builder": {"id": BUILDER, "version": {BUILDER: __version__}}}
    if run:
        details["metadata"] = dict(run)
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": n, "digest": {"sha256": sha}} for n, sha in subject.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": dict(external),
                "internalParameters": dict(internal),
                "resolvedDependencies": list(dependencies),
            },
            "runDetails": details,
        },
    }
    return json.dumps(statement, indent=1) + "\n"
