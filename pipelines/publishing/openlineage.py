"""Runs as OpenLineage events: inputs, outputs, and the outcome of the run.

A dataset is an artifact under its id; its facet `symlinks` names its repository. Bases and adapters
are always inputs, even of the run that recorded them first; all other artifacts are outputs. The
data sets of the Hub that gates were fitted to are inputs, too, under their names there.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from meteora import __version__
from pipelines.publishing.in_toto import DataSet, data_sets
from store.query import Limits

if TYPE_CHECKING:
    from store.ledger import Ledger

SPEC = "https://openlineage.io/spec"
EVENT = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
PRODUCER = f"urn:meteora-pipelines:{__version__}"
NAMESPACE = "meteora"
FACETS = {
    "DatasetTypeDatasetFacet": "1-0-1",
    "DatasetVersionDatasetFacet": "1-0-1",
    "ErrorMessageRunFacet": "1-0-1",
    "JobTypeJobFacet": "2-0-4",
    "ProcessingEngineRunFacet": "1-1-1",
    "SymlinksDatasetFacet": "1-0-1",
    "TagsDatasetFacet": "1-0-0",
    "TagsRunFacet": "1-0-0",
}
"""The version of each facet's schema."""
ENDS = {
    "ok": "COMPLETE",
    "failed": "FAIL",
    "refused": "FAIL",
    "stopped": "ABORT",
    "killed": "ABORT",
}
RUNS = """
SELECT run_id, recipe_name, recipe_sha256, device, versions, started_at, ended_at, outcome, reason
FROM runs WHERE started_at IS NOT NULL AND {} ORDER BY started_at, run_id
"""
USED = """
WITH made AS (SELECT id, run_id, kind IN ('base', 'adapter') AS goes_in FROM artifacts WHERE {}),
used AS (
    SELECT run_id, goes_in, id FROM made
    UNION
    SELECT made.run_id, true, parent_id
    FROM made JOIN parents ON child_id = made.id JOIN artifacts ON artifacts.id = parent_id
    WHERE NOT made.goes_in AND artifacts.run_id <> made.run_id
)
SELECT used.run_id, goes_in, id, kind, source, revision, licence, weights_sha256
FROM used JOIN lineage ON artifact_id = id AND relation = 'itself' ORDER BY ALL
"""
EVERYTHING = Limits(rows=100_000_000, memory_bytes=4 << 30, seconds=600.0)


def events(ledger: Ledger, run_id: str = "") -> Iterator[dict[str, Any]]:
    """Two events for each run that has ended, one for each other; earliest run first.

    Args:
        run_id: of the only run; empty for all
    """
    only = "run_id = '{}'".format(run_id.replace("'", "''")) if run_id else "true"
    goes_in: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    comes_out: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for run, into, *dataset in ledger.query(USED.format(only), limits=EVERYTHING).rows:
        (goes_in if into else comes_out)[run].append(_artifact(*dataset))
        if not into and dataset[1] == "router":
            goes_in[run] += map(_data_set, data_sets(ledger.built(dataset[0]) or {}))
    for row in ledger.query(RUNS.format(only), limits=EVERYTHING).rows:
        run, recipe, recipe_sha256, device, versions, started, ended, outcome, reason = row
        run_tags = {"run_id": run, "recipe_sha256": recipe_sha256, "device": device, **versions}
        engine = {"name": "meteora-pipelines", "version": __version__}
        facets = {
            "processing_engine": _facet("ProcessingEngineRunFacet", engine),
            "tags": _tags("TagsRunFacet", run_tags),
        }
        yield _event("START", started, run, recipe, facets)
        if outcome is None:
            continue
        if reason:
            message = {"message": reason, "programmingLanguage": "Python"}
            facets["errorMessage"] = _facet("ErrorMessageRunFacet", message)
        yield {
            **_event(ENDS.get(outcome, "OTHER"), ended, run, recipe, facets),
            "inputs": goes_in[run],
            "outputs": comes_out[run],
        }


def _event(
    what: str, when: datetime, run_id: str, recipe: str, facets: dict[str, Any]
) -> dict[str, Any]:
    # the spec requires a UUID: this one is computed from the run's id
    name = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:meteora-pipelines:run:{run_id}")
    job_type = {"processingType": "BATCH", "integration": "METEORA", "jobType": "RECIPE"}
    return {
        "eventType": what,
        "eventTime": f"{when.isoformat()}Z",
        "run": {"runId": str(name), "facets": dict(facets)},
        "job": {
            "namespace": NAMESPACE,
            "name": recipe,
            "facets": {"jobType": _facet("JobTypeJobFacet", job_type)},
        },
        "inputs": [],
        "outputs": [],
        "producer": PRODUCER,
        "schemaURL": EVENT,
    }


def _artifact(
    artifact_id: str,
    kind: str,
    source: str | None,
    revision: str | None,
    licence: str | None,
    weights_sha256: str,
) -> dict[str, Any]:
    version = revision or (f"sha256:{weights_sha256}" if weights_sha256 else "")
    facets = _facets("MODEL", kind, version, licence)
    if source:
        namespace = "file" if ":" in source else "hf"
        identifier = {"namespace": namespace, "name": source, "type": "MODEL"}
        facets["symlinks"] = _facet("SymlinksDatasetFacet", {"identifiers": [identifier]})
    return {"namespace": NAMESPACE, "name": artifact_id, "facets": facets}


def _data_set(of: DataSet) -> dict[str, Any]:
    """A data set of the Hub, under its name there."""
    facets = _facets("TABLE", "examples", of.commit, of.licence)
    return {"namespace": "hf", "name": of.source, "facets": facets}


def _facets(what: str, kind: str, version: str, licence: str | None) -> dict[str, Any]:
    type_of = {"datasetType": what, "subType": kind}
    facets = {"datasetType": _facet("DatasetTypeDatasetFacet", type_of)}
    if version:
        facets["version"] = _facet("DatasetVersionDatasetFacet", {"datasetVersion": version})
    if licence:
        facets["tags"] = _tags("TagsDatasetFacet", {"licence": licence})
    return facets


def _tags(schema: str, tags: dict[str, str]) -> dict[str, Any]:
    fields = [
        {"key": key, "value": value, "source": "METEORA"} for key, value in tags.items() if value
    ]
    return _facet(schema, {"tags": fields})


def _facet(schema: str, fields: dict[str, Any]) -> dict[str, Any]:
    url = f"{SPEC}/facets/{FACETS[schema]}/{schema}.json#/$defs/{schema}"
    return {"_producer": PRODUCER, "_schemaURL": url, **fields}
