"""What is recorded is recorded once, for good, and answered whether or not it was ingested."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meteora.artifacts import ArtifactId, Publication, RouterBuild, RoutingScore
from store.errors import (
    BusyError,
    ConflictError,
    MissingBlobError,
    StoreError,
    UnknownError,
)
from store.events import Outcome, RunEnded, RunStarted
from store.ledger import Ledger
from store.records import Record, Records
from tests.store.conftest import Shelf

pytestmark = pytest.mark.usefixtures("disk_is_not_waited_for")

INGESTED = pytest.mark.parametrize("ingested", [False, True], ids=["waiting", "ingested"])


@INGESTED
def test_what_was_recorded_is_answered(shelf: Shelf, ingested: bool) -> None:
    shelf.make(shelf.base)
    shelf.make(expert := shelf.adapter(1))
    shelf.make(stack := shelf.fused(expert))
    build = RouterBuild(shelf.router(stack), "a" * 64, 5012, 0.93, 12.5, "cpu")
    shelf.ledger.record_artifact(build.spec, weights_sha256="a" * 64, built=build, run_id="r1")
    measured = shelf.measure(build.spec, "sorting", 0.5)
    routing = [RoutingScore(build.spec.id, "model.layers.0.q_proj", "expert-0", "expert-0", 9)]
    shelf.ledger.record_routing(routing, run_id="r1")
    if ingested:
        shelf.ledger.ingest()
    ledger = Ledger(shelf.home)
    assert ledger.weights_of(build.spec.id) == "a" * 64
    assert ledger.built_as(RouterBuild, build.spec.id) == build
    assert ledger.spec_of(stack.id) == {
        **stack.to_dict(),
        "names": ["expert-0"],
        "adapter_ids": [expert.id],
        "bare": [],
    }
    assert ledger.built_as(RouterBuild, stack.id) is None
    assert ledger.scores_of([measured.spec.id, stack.id]) == {measured.spec.id: measured}
    assert ledger.scores_of([]) == {}
    counts = ledger.query("SELECT truth, chosen, num_tokens FROM routing_counts")
    assert counts.rows == [("expert-0", "expert-0", 9)]


@INGESTED
def test_what_was_not_recorded_is_none(shelf: Shelf, ingested: bool) -> None:
    if ingested:
        shelf.ledger.ingest()
    nothing = ArtifactId("adapter:" + "0" * 64)
    assert shelf.ledger.weights_of(nothing) is None
    assert shelf.ledger.built(nothing) is None
    assert shelf.ledger.spec_of(nothing) is None
    assert shelf.ledger.scores_of([nothing]) == {}


@INGESTED
def test_adapters_are_recorded_together_and_the_store_is_not_listed_for_each(
    shelf: Shelf, ingested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe may have thousands; one of them may be there twice, or from an earlier run."""
    specs = [shelf.adapter(number) for number in range(40)]
    specs = [replace(spec, weights_sha256=f"{n:064x}") for n, spec in enumerate(specs)]
    shelf.ledger.record_adapters(specs[3:4], run_id="r0")
    if ingested:
        shelf.ledger.ingest()
    listed, loose = [], Records.loose
    monkeypatch.setattr(Records, "loose", lambda self: listed.append(self) or loose(self))
    for _ in range(2):
        shelf.ledger.record_adapters([*specs, specs[0]], run_id="r1")
    assert len(listed) < 10
    found = shelf.ledger.specs_of(spec.id for spec in specs)
    assert found == {spec.id: json.loads(json.dumps(spec.to_dict())) for spec in specs}
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT count(*) FROM records").rows == [(40,)]


def test_answers_do_not_need_the_database(filled: Shelf) -> None:
    filled.ledger.ingest()
    for path in filled.home.glob("ledger.*"):
        path.unlink()
    assert Ledger(filled.home).weights_of(filled.base.id)
    assert Ledger(filled.home).resolve("base:") == filled.base.id


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_rows_that_cannot_be_read_are_read_from_the_records(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """As where a block of one table is damaged, and the names of the files can be read."""
    if packed:
        filled.ledger.pack()
    filled.ledger.ingest()
    assert (filled.ledger.index.known() or set()) >= filled.ledger.records.parts()
    monkeypatch.setattr(filled.ledger.index, "select", lambda *_: None)
    assert filled.ledger.weights_of(filled.base.id)
    assert filled.ledger.resolve("base:") == filled.base.id


@INGESTED
def test_recording_twice_is_once(shelf: Shelf, ingested: bool) -> None:
    shelf.make(shelf.base)
    measured = shelf.measure(shelf.base, "sorting", 0.5)
    publication = Publication(shelf.base.id, "someone/base", "c" * 40)
    shelf.ledger.record_publication(publication, run_id="r1")
    before = shelf.ledger.records.loose()
    if ingested:
        shelf.ledger.ingest()
    shelf.make(shelf.base, run_id="r2")
    shelf.ledger.record_score(replace(measured, wall_seconds=9.0), run_id="r2")
    shelf.ledger.record_publication(publication, run_id="r2")
    assert shelf.ledger.records.loose() == before


def test_a_publication_is_recorded_again_where_the_last_record_of_it_says_something_else(
    shelf: Shelf,
) -> None:
    shelf.make(shelf.base)
    for count, (private, tag) in enumerate(((True, ""), (False, ""), (True, ""), (True, "v1")), 1):
        made = Publication(shelf.base.id, "someone/base", "c" * 40, "", private, tag)
        for run_id in ("r1", "r2"):
            shelf.ledger.record_publication(made, run_id=run_id)
        found = shelf.ledger.publications("someone/base")
        assert (found[-1], len(found)) == (made, count)
        shelf.ledger.ingest()
        assert len(shelf.ledger.query("FROM publications").rows) == 1
    assert not shelf.ledger.verify().findings


@INGESTED
def test_one_spec_has_one_outcome(shelf: Shelf, ingested: bool) -> None:
    shelf.make(shelf.base, "these weights")
    measured = shelf.measure(shelf.base, "sorting", 0.5)
    first = shelf.ledger.weights_of(shelf.base.id) or ""
    if ingested:
        shelf.ledger.ingest()
    with pytest.raises(ConflictError, match=first) as conflict:
        shelf.make(shelf.base, "other weights")
    assert shelf.ledger.blobs.put_bytes(b"other weights") in str(conflict.value)
    with pytest.raises(ConflictError, match=r"value 0\.5; "):
        shelf.ledger.record_score(replace(measured, value=0.51), run_id="r2")


def test_a_child_without_its_parents_leaves_nothing(shelf: Shelf) -> None:
    with pytest.raises(UnknownError, match=r"refers to base:.* not recorded"):
        shelf.make(shelf.fused(shelf.adapter(1)))
    assert not shelf.ledger.records.loose()


def test_a_record_never_names_a_blob_that_is_not_there(shelf: Shelf) -> None:
    with pytest.raises(MissingBlobError, match="put it there first"):
        shelf.ledger.record_artifact(shelf.base, weights_sha256="", blobs=["0" * 64], run_id="r1")
    shelf.make(shelf.base)
    measured = shelf.score(shelf.benchmark(shelf.base.id, "sorting"), 0.5, "0" * 64)
    with pytest.raises(MissingBlobError):
        shelf.ledger.record_score(measured, run_id="r1")


@INGESTED
def test_a_unique_prefix_is_enough(shelf: Shelf, ingested: bool) -> None:
    experts = [shelf.adapter(number) for number in range(1, 20)]
    for spec in experts:
        shelf.make(spec)
    if ingested:
        shelf.ledger.ingest()
    digest = experts[0].id.partition(":")[2]
    for prefix in (experts[0].id, experts[0].id[:24], digest, digest[:16]):
        assert shelf.ledger.resolve(prefix) == experts[0].id
    with pytest.raises(UnknownError, match="several ids begin with 'adapter:'"):
        shelf.ledger.resolve("adapter:")
    for prefix in ("router:", "", "%", "' OR 1=1 --"):
        with pytest.raises(UnknownError, match="no artifact's id begins with"):
            shelf.ledger.resolve(prefix)


def test_the_first_end_of_a_run_stands(shelf: Shelf) -> None:
    shelf.ledger.record_run(RunStarted("r1", "nightly", "9" * 64))
    assert [run.run_id for run in shelf.ledger.unended_runs()] == ["r1"]
    shelf.ledger.record_run(RunEnded("r1", "failed", "the disk is full", 1.0))
    shelf.ledger.record_run(RunEnded("r1", "killed", "found dead"))
    assert not shelf.ledger.unended_runs()
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT outcome, reason FROM runs").rows == [
        ("failed", "the disk is full")
    ]


@pytest.mark.parametrize("outcome", ["skipped_late", "skipped_overlap"])
def test_a_skipped_run_is_shown_and_is_no_failure(shelf: Shelf, outcome: Outcome) -> None:
    """It never began, so its end may be all that there is."""
    shelf.ledger.record_run(RunEnded("r1", outcome, "the run of 04:00 was due too"))
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT run_id, started_at, outcome FROM runs").rows == [
        ("r1", None, outcome)
    ]
    assert not shelf.ledger.query("FROM failures").rows
    assert not shelf.ledger.unended_runs()


def test_a_killed_run_is_closed_by_the_next_of_its_recipe(shelf: Shelf) -> None:
    shelf.ledger.record_run(RunStarted("r1", "nightly", "9" * 64))
    shelf.ledger.record_run(RunStarted("r2", "weekly", "9" * 64))
    with shelf.ledger.running("nightly") as killed:
        assert [run.run_id for run in killed] == ["r1"]
    assert [run.run_id for run in shelf.ledger.unended_runs()] == ["r2"]
    with shelf.ledger.running("nightly") as killed:
        assert not killed


def test_all_killed_runs_are_closed_unless_one_goes_on(shelf: Shelf) -> None:
    shelf.ledger.record_run(RunStarted("r1", "nightly", "9" * 64))
    with shelf.ledger.running("weekly"), pytest.raises(BusyError, match="a run is going on"):
        shelf.ledger.close_killed()
    shelf.ledger.close_killed()
    assert not shelf.ledger.unended_runs()


@pytest.mark.parametrize("run_id", [None, "", "..", "../../blobs", "/home/me", 5], ids=repr)
def test_a_forged_start_of_a_run_is_left_out(
    run_id: object, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    """It stops no run, and no folder that it names is taken for that of a killed run."""
    start = RunStarted("r1", "nightly", "9" * 64)
    shelf.ledger.record_run(start)
    body = start.to_dict() | {"run_id": run_id}
    if run_id is None:
        del body["run_id"]
    forged = Record("run-started", "forged", body, "forged", "2026-01-01T00:00:00Z")
    shelf.ledger.records.write(forged)
    with shelf.ledger.running("nightly") as killed:
        assert [run.run_id for run in killed] == ["r1"]
    assert "the run-started of 'forged' is left out" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in ("weights_sha256", "spec", "built")),
        ("weights_sha256", 5),
        ("spec", []),
        ("spec", {"use_rslora": 5}),
        ("spec", {"modules": [7]}),
        ("spec", {"modules": "all"}),
    ],
)
def test_a_forged_artifact_counts_as_not_recorded(
    field: str, value: object, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where it is the earliest record about its subject."""
    shelf.make(shelf.base)
    spec = shelf.adapter(1)
    body: dict[str, Any] = {
        "id": spec.id, "spec": spec.to_dict(), "weights_sha256": "", "built": None
    }  # fmt: skip
    if value is None:
        del body[field]
    else:
        body[field] = {**body[field], **value} if isinstance(value, dict) else value
    forged = Record("artifact", spec.id, body, "forged", "2026-01-01T00:00:00Z")
    shelf.ledger.records.write(forged)
    assert shelf.ledger.weights_of(spec.id) is None
    assert f"the artifact of {spec.id!r} is left out" in caplog.text
    shelf.make(spec)
    assert shelf.ledger.weights_of(spec.id)
    shelf.ledger.ingest()
    assert shelf.ledger.weights_of(spec.id)


def test_a_forged_build_counts_as_not_recorded(shelf: Shelf) -> None:
    shelf.make(shelf.base)
    spec = shelf.base
    for built in ({}, {"linears": [{"path": "q_proj"}]}, [], "built"):
        body = {"id": spec.id, "spec": spec.to_dict(), "weights_sha256": "", "built": built}
        forged = Record("artifact", spec.id, body, "forged", "2026-01-01T00:00:00Z")
        shelf.ledger.records.write(forged)
    assert shelf.ledger.weights_of(spec.id)


@pytest.mark.parametrize("field", ["spec", "value", "num_samples"])
def test_a_forged_score_counts_as_not_recorded(
    field: str, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.make(shelf.base)
    subject = shelf.adapter(1)
    shelf.make(subject)
    spec = shelf.benchmark(subject.id, "counting")
    body = {"id": spec.id, **shelf.score(spec, 0.5, "0" * 64).to_dict()}
    del body[field]
    forged = Record("score", spec.id, body, "forged", "2026-01-01T00:00:00Z")
    shelf.ledger.records.write(forged)
    assert not shelf.ledger.scores_of([spec.id])
    assert f"the score of {spec.id!r} is left out" in caplog.text
    measured = shelf.measure(subject, "counting", 0.25)
    assert shelf.ledger.scores_of([spec.id]) == {spec.id: measured}


def test_a_recipe_runs_once_at_a_time(shelf: Shelf) -> None:
    running = shelf.ledger.running
    with (
        running("nightly"),
        running("weekly"),
        pytest.raises(BusyError, match=f"process id {os.getpid()}"),
        running("nightly"),
    ):
        pass


def test_a_home_may_move(filled: Shelf) -> None:
    filled.ledger.ingest()
    before = filled.views()
    moved = filled.home.rename(filled.home.with_name("it's elsewhere"))
    filled.ledger = Ledger(moved)
    assert filled.views() == before
    assert not filled.ledger.verify().findings


@pytest.mark.parametrize("name", ["why?", "back\\slash", "\udcff"])
def test_a_home_that_duckdb_cannot_open_is_refused_before_anything_is_made(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(StoreError, match="choose another folder"):
        Ledger(tmp_path / name / "home")
    assert not [*tmp_path.iterdir()]


def test_a_home_may_have_any_other_name(make_shelf: Callable[[str], Shelf]) -> None:
    shelf = make_shelf("""it's "日本" [a-z]* {b,c} #1 100%41 $X;:""")
    shelf.make(shelf.base)
    shelf.ledger.pack()
    shelf.make(shelf.adapter(1))
    assert shelf.ledger.ingest().reason == ""
    assert shelf.ledger.query("SELECT count(*) FROM artifacts").rows == [(2,)]
    assert not shelf.ledger.verify().findings


def test_two_homes_copied_together_agree_in_any_order(
    shelf: Shelf, make_shelf: Callable[[str], Shelf]
) -> None:
    """Both made one artifact, differently: the earlier record stands, however it got there."""
    other = make_shelf("other")
    for spec in (shelf.base, *map(shelf.adapter, range(1, 5))):
        shelf.make(spec, "these weights")
        other.make(spec, "other weights")
    other.measure(shelf.base, "sorting", 0.4)
    shelf.measure(shelf.base, "sorting", 0.5)
    shelf.ledger.ingest()
    other.ledger.ingest()
    for one, two in ((shelf, other), (other, shelf)):
        for part in ("records", "blobs"):
            shutil.copytree(two.home / part, one.home / part, dirs_exist_ok=True)
    shelf.ledger.ingest()
    other.ledger.ingest()
    assert shelf.views() == other.views()
    stands = dict(shelf.ledger.query("SELECT id, weights_sha256 FROM artifacts").rows)
    assert len(stands) == 5
    assert [*stands.values()] == [shelf.ledger.blobs.put_bytes(b"these weights")] * 5
    assert shelf.ledger.query("SELECT value FROM scores").rows == [(0.4,)]
    score_id = shelf.benchmark(shelf.base.id, "sorting").id
    for one in (shelf, other):
        assert {id_: one.ledger.weights_of(ArtifactId(id_)) for id_ in stands} == stands
        assert one.ledger.scores_of([score_id])[score_id].value == 0.4
    grown = shelf.views()
    shelf.ledger.rebuild()
    assert shelf.views() == grown
