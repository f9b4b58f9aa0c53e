"""Lineage leaves in the words of others: OpenLineage's classes and in-toto's own check read it."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import attr
import pytest
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement
from openlineage.client import event_v2, facet_v2

from meteora.artifacts import RouterBuild
from meteora.artifacts.identity import ArtifactId, MeteoraError
from meteora.checkpoint.manifest import BaseEntry, Manifest
from pipelines.cli import store
from pipelines.publishing.in_toto import attest, write_lineage
from pipelines.publishing.openlineage import events
from store.errors import UnknownError
from store.events import AdapterVerdict, RunEnded, RunStarted
from tests.store.conftest import BASE, COMMIT, HOSTILE, Shelf, adapter, fill, fused, router

EXPERTS = adapter(1), adapter(2)
STACK = fused(*EXPERTS)
MODELS = [router(STACK, seed=night) for night in (1, 2)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Two nights that went well, one that goes on, one that failed, one that never began."""
    shelf = Shelf(tmp_path_factory.mktemp("lineage") / "home")
    fill(shelf)
    shelf.ledger.record_run(RunStarted("r4", HOSTILE, "9" * 64, {}, "cpu"))
    shelf.ledger.record_run(RunEnded("r4", "failed", "the disk is full", 3.0))
    shelf.ledger.record_run(RunEnded("r5", "skipped_late", "a later one was due"))
    shelf.ledger.ingest()
    return shelf


@pytest.fixture(scope="module")
def told(shelf: Shelf) -> list[dict[str, Any]]:
    return list(events(shelf.ledger))


def by_the_spec(event: dict[str, Any]) -> event_v2.RunEvent:
    """The event as OpenLineage's classes take it: they refuse what the spec does not know."""
    facets = {
        name: getattr(facet_v2, f"{module}_{of}")
        for name, module, of in (
            ("datasetType", "dataset_type", "dataset"), ("errorMessage", "error_message", "run"),
            ("jobType", "job_type", "job"), ("processing_engine", "processing_engine", "run"),
            ("symlinks", "symlinks", "dataset"), ("version", "dataset_version", "dataset"),
        )
    }  # fmt: skip

    def facet(name: str, fields: dict[str, Any], of: str) -> Any:
        fields = dict(fields)
        schema = fields.pop("_schemaURL")
        if name == "tags":
            module = getattr(facet_v2, f"tags_{of}")
            kind = getattr(module, f"Tags{of.capitalize()}Facet")
            tag = getattr(module, f"Tags{of.capitalize()}FacetFields")
            fields["tags"] = [tag(**one) for one in fields["tags"]]
        else:
            kind = getattr(facets[name], schema.rpartition("/")[2])
        made = kind(producer=fields.pop("_producer"), **fields)
        assert made._schemaURL == schema
        return made

    def dataset(kind: type, one: dict[str, Any]) -> Any:
        own = {name: facet(name, fields, "dataset") for name, fields in one["facets"].items()}
        return kind(**{**one, "facets": own})

    run, job = event["run"], event["job"]
    return event_v2.RunEvent(
        eventType=event_v2.RunState(event["eventType"]),
        eventTime=event["eventTime"],
        producer=event["producer"],
        run=event_v2.Run(
            run["runId"], {name: facet(name, own, "run") for name, own in run["facets"].items()}
        ),
        job=event_v2.Job(
            job["namespace"],
            job["name"],
            {name: facet(name, own, "job") for name, own in job["facets"].items()},
        ),
        inputs=[dataset(event_v2.InputDataset, one) for one in event["inputs"]],
        outputs=[dataset(event_v2.OutputDataset, one) for one in event["outputs"]],
    )


def test_every_event_is_as_the_spec_has_it(told: list[dict[str, Any]]) -> None:
    for event in told:
        taken = by_the_spec(event)
        assert taken.schemaURL == event["schemaURL"]
        assert attr.asdict(taken)["run"]["runId"] == event["run"]["runId"]
        assert uuid.UUID(event["run"]["runId"]).version == 5


def test_every_run_begins_and_those_that_ended_end(told: list[dict[str, Any]]) -> None:
    assert [(event["job"]["name"], event["eventType"]) for event in told] == [
        ("nightly", "START"),
        ("nightly", "COMPLETE"),
        ("nightly", "START"),
        ("nightly", "COMPLETE"),
        ("nightly", "START"),
        (HOSTILE, "START"),
        (HOSTILE, "FAIL"),
    ]
    assert told[-1]["run"]["facets"]["errorMessage"]["message"] == "the disk is full"
    assert len({event["run"]["runId"] for event in told}) == 4


def test_what_went_in_and_what_came_out(shelf: Shelf, told: list[dict[str, Any]]) -> None:
    first, second = (event for event in told if event["eventType"] == "COMPLETE")
    sources = {BASE.id, *(spec.id for spec in EXPERTS)}
    assert {dataset["name"] for dataset in first["inputs"]} == sources
    assert {STACK.id, MODELS[0].id} <= {dataset["name"] for dataset in first["outputs"]}
    assert STACK.id in {dataset["name"] for dataset in second["inputs"]}
    assert MODELS[1].id in {dataset["name"] for dataset in second["outputs"]}
    (mit,) = (dataset for dataset in first["inputs"] if dataset["name"] == EXPERTS[0].id)
    assert mit["facets"]["version"]["datasetVersion"] == COMMIT
    assert mit["facets"]["symlinks"]["identifiers"][0]["name"] == "someone/lora-0"
    assert mit["facets"]["tags"]["tags"][0]["value"] == "mit"
    (stack,) = (dataset for dataset in first["outputs"] if dataset["name"] == STACK.id)
    weights = shelf.ledger.weights_of(STACK.id)
    assert stack["facets"]["version"]["datasetVersion"] == f"sha256:{weights}"


SHEETS, CHATS = "b" * 40, "d" * 40
FITTED = replace(
    RouterBuild(router(STACK, seed=9), "9" * 64, 5012, 0.93, 12.5, "cpu"),
    card_examples=(
        f"sums: hf:someone/sheets?config=default&split=train&revision={SHEETS}&turns=messages",
        "odd: hf:someone/sheets?revision=main",
        "odd: hf:someone/sheets?split=a&split=b",
        "odd: hf:../../etc?revision=main",
    ),
    hub_examples=(
        f"a: b: hf:someone/chats?split=train&revision={CHATS}",
        f"old: hf:gsm8k?config=main&revision={CHATS}",
    ),
    example_licences=("someone/sheets: cc-by-4.0", "odd"),
)
"""Gates that were fitted to three data sets of the Hub."""


def test_data_sets_that_gates_were_fitted_to_are_named_with_commit_and_licence(
    tmp_path: Path,
) -> None:
    shelf = Shelf(tmp_path)
    shelf.ledger.record_run(RunStarted("r1", "cards", "9" * 64, {}, "cpu"))
    for spec in (BASE, *EXPERTS, STACK):
        shelf.make(spec, run_id="r1")
    made = FITTED.weights_sha256
    shelf.ledger.record_artifact(FITTED.spec, weights_sha256=made, built=FITTED, run_id="r1")
    shelf.ledger.record_run(RunEnded("r1", "ok", "", 3.0))
    shelf.ledger.ingest()
    expected = [
        {
            "name": "examples of sums",
            "uri": f"hf://datasets/someone/sheets@{SHEETS}",
            "digest": {"gitCommit": SHEETS},
            "annotations": {"licence": "cc-by-4.0"},
        },
        {
            "name": "examples of a: b",
            "uri": f"hf://datasets/someone/chats@{CHATS}",
            "digest": {"gitCommit": CHATS},
        },
        {
            "name": "examples of old",
            "uri": f"hf://datasets/gsm8k@{CHATS}",
            "digest": {"gitCommit": CHATS},
        },
    ]
    for text in (
        attest(shelf.ledger, FITTED.spec.id),
        write_lineage(manifest_of(FITTED), recipe_sha256=""),
    ):
        said = json.loads(text)
        Statement.copy_from_pb(as_message(said)).validate()
        found = said["predicate"]["buildDefinition"]["resolvedDependencies"]
        assert [one for one in found if one["name"].startswith("examples")] == expected
    _, ended = events(shelf.ledger)
    by_the_spec(ended)
    sheets, chats, _ = (one for one in ended["inputs"] if one["namespace"] == "hf")
    assert (sheets["name"], chats["name"]) == ("datasets/someone/sheets", "datasets/someone/chats")
    assert sheets["facets"]["version"]["datasetVersion"] == SHEETS
    assert sheets["facets"]["tags"]["tags"][0]["value"] == "cc-by-4.0"
    assert "tags" not in chats["facets"]


def manifest_of(made: RouterBuild) -> Manifest:
    """A manifest with what a checkpoint states on these gates."""
    keys = ("card_examples", "hub_examples", "example_licences")
    gates = {key: getattr(made, key) for key in keys}
    unread: Any = None
    base = BaseEntry("tiny/base", COMMIT, unread)
    return Manifest(base, (), {}, unread, gates, files={"gates": made.weights_sha256})


def test_one_run_can_be_asked_for(
    shelf: Shelf, told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    store.openlineage("r1", shelf.home)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == told[:2]
    assert not list(events(shelf.ledger, HOSTILE))
    with pytest.raises(MeteoraError, match="nope: the ledger has no such run"):
        store.openlineage("nope", shelf.home)


@pytest.mark.parametrize("spec", [BASE, EXPERTS[0], STACK, *MODELS], ids=lambda spec: spec.id[:12])
def test_an_artifact_is_attested(shelf: Shelf, spec: Any) -> None:
    said = json.loads(attest(shelf.ledger, spec.id))
    Statement.copy_from_pb(as_message(said)).validate()
    (subject,) = said["subject"]
    assert subject == {"name": spec.id, "digest": {"sha256": shelf.ledger.weights_of(spec.id)}}
    build = said["predicate"]["buildDefinition"]
    assert build["internalParameters"]["spec"] == shelf.ledger.spec_of(spec.id)
    assert build["externalParameters"]["recipe"] == "nightly"
    run = said["predicate"]["runDetails"]["metadata"]
    assert run["invocationId"] == ("r2" if spec is MODELS[1] else "r1")
    assert run["startedOn"] < run["finishedOn"]


def as_message(said: dict[str, Any]) -> Any:
    message = Statement([], "", {}).pb
    message.Clear()
    return json_format.ParseDict(said, message)


def test_all_that_an_artifact_was_made_of_is_named(shelf: Shelf) -> None:
    said = json.loads(attest(shelf.ledger, MODELS[0].id))
    found = {
        one["uri"]: one for one in said["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    weights = shelf.ledger.weights_of
    assert found == {
        STACK.id: {"name": "fused", "uri": STACK.id, "digest": {"sha256": weights(STACK.id)}},
        f"hf://tiny/base@{COMMIT}": {
            "name": "base",
            "uri": f"hf://tiny/base@{COMMIT}",
            "digest": {"gitCommit": COMMIT, "sha256": weights(BASE.id)},
        },
        **{
            f"hf://someone/lora-{number}@{COMMIT}": {
                "name": "adapter",
                "uri": f"hf://someone/lora-{number}@{COMMIT}",
                "digest": {"gitCommit": COMMIT, "sha256": weights(EXPERTS[number].id)},
                "annotations": {"licence": licence},
            }
            for number, licence in enumerate(("mit", "apache-2.0"))
        },
    }


def test_where_an_adapter_is_found_later_is_no_source_of_what_was_made_before(
    shelf: Shelf,
) -> None:
    """The same adapter may lie in a folder and on the Hub, under two licences."""
    grown = router(STACK, seed=9)  # as `add` and `drop` make it: their runs read no older expert
    shelf.ledger.record_artifact(grown, weights_sha256="9" * 64, run_id="r7")
    shelf.ledger.ingest()
    models = [MODELS[0].id, grown.id]
    said = [attest(shelf.ledger, model) for model in models]
    assert all("someone/lora-0" in one for one in said)
    copied = AdapterVerdict(
        "copy", "a/copy", "a/copy", COMMIT, "accept", licence="gpl", adapter_id=EXPERTS[0].id
    )
    shelf.ledger.record_adapter(copied, run_id="r6")
    shelf.ledger.ingest()
    assert [attest(shelf.ledger, model) for model in models] == said


def test_what_has_no_bytes_is_told_by_its_record(shelf: Shelf) -> None:
    (found,) = shelf.ledger.query(
        "SELECT id, record_sha256 FROM artifacts WHERE kind = 'speed' ORDER BY id LIMIT 1"
    ).rows
    said = json.loads(attest(shelf.ledger, found[0]))
    assert said["subject"] == [{"name": f"record of {found[0]}", "digest": {"sha256": found[1]}}]
    assert shelf.ledger.records.read(found[1]).subject == found[0]


@pytest.mark.parametrize("name", ["router:" + "0" * 64, HOSTILE])
def test_nothing_is_attested_of_what_is_not_there(shelf: Shelf, name: str) -> None:
    with pytest.raises(UnknownError, match="not in the index"):
        attest(shelf.ledger, ArtifactId(name))
