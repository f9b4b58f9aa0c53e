"""What changed on disk is found, with all that rests on it; what nothing needs can go."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import duckdb
import pytest

from meteora.artifacts import ComparisonSpec, ScorePair
from store import check, files
from store.errors import BusyError, DamagedError, StoreError
from store.garbage import Removable
from tests.store.conftest import Shelf

pytestmark = pytest.mark.usefixtures("disk_is_not_waited_for")


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def test_a_whole_store_has_no_findings(filled: Shelf) -> None:
    found = filled.ledger.verify()
    assert not found.findings
    assert found.num_records == len(filled.ledger.records.loose())
    assert found.num_blobs == len(list(filled.ledger.blobs))


def test_a_flipped_byte_in_a_blob_is_found_with_all_that_rests_on_it(filled: Shelf) -> None:
    expert = filled.adapter(2)
    sha256 = filled.ledger.weights_of(expert.id) or ""
    flip(filled.ledger.blobs.path_of(sha256))
    (finding,) = filled.ledger.verify().findings
    assert (finding.what, finding.name) == ("blob", sha256)
    stack = filled.fused(filled.adapter(1), expert)
    models = [filled.router(stack, seed=night).id for night in (1, 2)]
    measured = [filled.benchmark(subject, "sorting").id for subject in (expert.id, *models)]
    measured += [filled.benchmark(subject, "parentheses").id for subject in models]
    assert set(finding.touches) > {expert.id, stack.id, *models, *measured}
    beside = sorted(
        touched.partition(":")[0]
        for touched in set(finding.touches) - {expert.id, stack.id, *models, *measured}
    )
    assert beside == [
        "benchmark", "comparison", "comparison", "merge", "pool", "routing", "routing", "speed",
            "speed",
    ]  # fmt: skip


def test_a_missing_blob_is_found(filled: Shelf) -> None:
    (measured,) = filled.ledger.scores_of([filled.benchmark(filled.base.id, "sorting").id]).values()
    filled.ledger.blobs.path_of(measured.outputs_sha256).unlink()
    (finding,) = filled.ledger.verify().findings
    assert finding.name == measured.outputs_sha256
    assert finding.touches == (measured.spec.id,)
    assert "missing" in finding.problem


def test_a_blob_that_was_deleted_to_free_its_space_is_not_missing(filled: Shelf) -> None:
    ledger, sha256 = filled.ledger, filled.ledger.weights_of(filled.base.id) or ""
    path = ledger.blobs.place_of(sha256)
    text = path.read_bytes()
    for _ in range(2):  # twice: it is made again in between
        with ledger.running("nightly"), pytest.raises(BusyError, match="a run is going on"):
            ledger.free(lambda: [Removable(sha256, path, len(text))])
        ledger.free(lambda: [Removable(sha256, path, len(text))])
        assert sha256 not in ledger.blobs
        assert not ledger.verify().findings
        with ledger.running("nightly"):
            assert ledger.blobs.put_bytes(text) == sha256
    path.unlink()
    (finding,) = ledger.verify().findings
    assert finding.name == sha256
    with ledger.running("nightly"):
        pass
    assert ledger.verify().findings == (finding,)


def test_what_keeps_a_store_from_being_verified_is_one_line(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = duckdb.OutOfMemoryException("Out of Memory Error: 4 bytes\n\nPossible solutions: SET")
    monkeypatch.setattr(check, "verify", Mock(side_effect=little))
    with pytest.raises(StoreError, match=r"verified now \(Out of Memory Error: 4 bytes\); free"):
        filled.ledger.verify()


def test_a_pipe_in_place_of_a_file_is_found_and_never_read(filled: Shelf) -> None:
    ledger, digits = filled.ledger, "ab" * 32
    segment = ledger.records.segments.path_of(f"{digits}.parquet")
    segment.parent.mkdir()
    pipes = {ledger.records.path_of(digits), ledger.blobs.place_of(digits), segment}
    for pipe in pipes:
        pipe.parent.mkdir(exist_ok=True)
        os.mkfifo(pipe)
    assert not ledger.ingest().reason
    found = ledger.verify().findings
    assert {(one.what, one.name) for one in found} == {
        ("file", str(pipe.relative_to(ledger.home))) for pipe in pipes
    }
    with pytest.raises(DamagedError, match="is missing"):
        ledger.records.read(digits)


def test_a_damaged_score_touches_the_comparisons_with_it(filled: Shelf) -> None:
    expert = filled.adapter(2)
    score_id = filled.benchmark(expert.id, "sorting").id
    flip(filled.ledger.blobs.path_of(filled.ledger.scores_of([score_id])[score_id].outputs_sha256))
    (finding,) = filled.ledger.verify().findings
    compared = []
    for night in (1, 2):
        model = filled.router(filled.fused(filled.adapter(1), expert), night).id
        pair = ScorePair(filled.benchmark(model, "sorting").id, score_id)
        compared.append(ComparisonSpec(model, "fused", "oracle", (pair,)).id)
    assert finding.touches == tuple(sorted((score_id, *compared)))


def test_a_damaged_base_touches_the_scores_of_adapters_on_it(filled: Shelf) -> None:
    flip(filled.ledger.blobs.path_of(filled.ledger.weights_of(filled.base.id) or ""))
    (finding,) = filled.ledger.verify().findings
    assert filled.benchmark(filled.adapter(2).id, "sorting").id in finding.touches


def test_a_table_that_is_gone_is_found(filled: Shelf) -> None:
    """No query of the next ingest may need it, but somebody's question does."""
    import duckdb  # noqa: PLC0415

    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        connection.execute("DROP TABLE published")
    (finding,) = filled.ledger.verify().findings
    assert "published" in finding.problem
    filled.ledger.rebuild()
    assert not filled.ledger.verify().findings


def test_every_flipped_record_is_found_and_named(filled: Shelf) -> None:
    subjects = dict(filled.ledger.query("SELECT sha256, subject FROM records").rows)
    for sha256 in sorted(subjects)[::7]:
        path = filled.ledger.records.path_of(sha256)
        before = path.read_bytes()
        flip(path)
        found = filled.ledger.verify().findings
        assert (found[0].what, found[0].name) == ("record", sha256)
        assert subjects[sha256] in found[0].touches
        path.write_bytes(before)
    assert not filled.ledger.verify().findings


@pytest.mark.parametrize("packed", [False, True])
def test_records_whose_files_are_gone_are_told_before_a_rebuild_forgets_them(
    filled: Shelf, *, packed: bool
) -> None:
    ledger, expert = filled.ledger, filled.adapter(2)
    subjects = dict(ledger.query("SELECT sha256, subject FROM records").rows)
    if packed:
        ledger.pack()
        for name in ledger.records.segments.names():
            ledger.records.segments.path_of(name).unlink()
        gone = sorted(subjects)
    else:
        gone = sorted(sha256 for sha256, subject in subjects.items() if subject == expert.id)
        for sha256 in gone:
            ledger.records.path_of(sha256).unlink()
    (finding,) = ledger.verify().findings  # none on the index, which advises to rebuild it
    assert (finding.what, finding.name) == ("record", gone[0])
    assert "restore it from a backup" in finding.problem
    assert expert.id in finding.touches


def test_a_record_that_is_ingested_while_verify_waits_is_not_gone(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*arguments: Any, **options: Any) -> AbstractContextManager[None]:
        filled.make(filled.adapter(3))
        filled.ledger.ingest()
        return files.locked(*arguments, **options)

    monkeypatch.setattr(check, "locked", locked)
    assert not filled.ledger.verify().findings


def test_a_flipped_record_touches_what_was_made_from_it(filled: Shelf) -> None:
    expert, stack = filled.adapter(2), filled.fused(filled.adapter(1), filled.adapter(2))
    sql = "SELECT record_sha256 FROM artifacts WHERE id = '{}'"
    ((sha256,),) = filled.ledger.query(sql.format(expert.id)).rows
    flip(filled.ledger.records.path_of(sha256))
    (finding,) = filled.ledger.verify().findings  # a rebuild would forget the record
    models = [filled.router(stack, seed=night).id for night in (1, 2)]
    measured = [filled.benchmark(subject, "sorting").id for subject in (expert.id, *models)]
    assert set(finding.touches) > {expert.id, stack.id, *models, *measured}


def test_a_row_that_no_record_says_is_found(filled: Shelf) -> None:
    import duckdb  # noqa: PLC0415  (the store's door is shut to this)

    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        connection.execute("UPDATE scores SET value = 0.99 WHERE task = 'sorting'")
    (finding,) = filled.ledger.verify().findings
    assert finding.name == "ledger.duckdb"
    assert "table scores differs" in finding.problem
    filled.ledger.rebuild()
    assert not filled.ledger.verify().findings


def test_a_foreign_file_is_found(filled: Shelf) -> None:
    (filled.ledger.blobs.root / "notes.txt").write_text("mine")
    (finding,) = filled.ledger.verify().findings
    assert (finding.what, finding.name) == ("file", "blobs/notes.txt")


def test_records_that_wait_are_no_fault(filled: Shelf) -> None:
    filled.make(filled.adapter(3))
    assert not filled.ledger.verify().findings


PARTIAL = "1-0123456789abcdef"
"""What a writer calls a file that is not complete."""


def old(path: Path) -> Path:
    os.utime(path, (0, 0), follow_symlinks=False)
    return path


def test_gc_lists_what_nothing_refers_to_and_removes_it_only_when_asked(filled: Shelf) -> None:
    ledger = filled.ledger
    for sha256 in ledger.blobs:
        old(ledger.blobs.path_of(sha256))
    unused = ledger.blobs.put_bytes(b"unused")
    young = ledger.blobs.put_bytes(b"a run will record it soon")
    old(ledger.blobs.path_of(unused))
    roots = (ledger.home, ledger.blobs.root, ledger.records.root, ledger.records.segments.root)
    left = {root / "tmp" / PARTIAL for root in roots}
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        old(path)
    ledger.rebuild()
    (aside,) = ledger.home.glob("ledger.rebuilt-*")
    lost = {ledger.blobs.place_of(unused), *left}
    # somebody may want the database of a moment ago
    assert {one.path for one in ledger.gc()} == lost
    old(aside)
    garbage = ledger.gc()
    assert garbage[0].name == unused
    assert {one.path for one in garbage} == {*lost, aside}
    assert sum(one.num_bytes for one in garbage) == 6 + 4 * 4 + aside.stat().st_size
    assert all(path.exists() for path in left)
    assert ledger.gc(remove=True) == garbage
    assert unused not in ledger.blobs
    assert young in ledger.blobs
    assert not any(path.exists() for path in left)
    assert not ledger.gc()
    assert not ledger.verify().findings


@pytest.mark.parametrize(
    "place",
    [
        f"bases/{'a1' * 32}.partial",
        f"adapters/a--b/{'a1' * 20}.partial",
        f"adapters/a--b/{'a1' * 20}--inside.partial",
        f"adapters/named-bases/.1.json.{'a1' * 8}.partial",
        "runs/20260801T030000-0123abcd",
        f"training/{'a1' * 8}",
        f"answers/{'a1' * 16}.jsonl",
    ],
)
def test_gc_finds_work_that_was_stopped(filled: Shelf, place: str) -> None:
    """A base of many gigabytes that nobody wants any more is nowhere else to be seen."""
    stopped = filled.ledger.home / place
    going_on = stopped.with_name(stopped.name.replace("1", "2"))
    for folder in (stopped, going_on):
        folder.mkdir(parents=True)
        old(folder)
        (folder / "model.safetensors").write_bytes(b"half" * 1000)
    (stopped / "model.safetensors").write_bytes(b"half")
    (stopped / "link").symlink_to(going_on / "model.safetensors")
    (stopped / "to nothing").symlink_to("away")
    lock = filled.home / "runs" / "base.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    old(lock)
    for path in (*stopped.iterdir(), stopped):
        old(path)
    (found,) = filled.ledger.gc(remove=True)
    assert found.path == stopped
    assert found.num_bytes < 1000  # the link's own few, not those of the file behind it
    assert not stopped.exists()
    assert (going_on / "model.safetensors").exists()


def test_gc_waits_for_no_run_and_touches_none(filled: Shelf) -> None:
    with filled.ledger.running("nightly"), pytest.raises(BusyError, match="a run is going on"):
        filled.ledger.gc(remove=True)


def test_gc_removes_nothing_while_a_record_cannot_be_read(filled: Shelf) -> None:
    unused = filled.ledger.blobs.put_bytes(b"unused")
    old(filled.ledger.blobs.path_of(unused))
    damaged = filled.ledger.records.path_of(min(filled.ledger.records.loose()))
    flip(damaged)
    with pytest.raises(DamagedError, match=f"{damaged}: .* blobs that it alone names then count"):
        filled.ledger.gc(remove=True)
    assert unused in filled.ledger.blobs


def test_a_run_sweeps_what_killed_writers_left(filled: Shelf) -> None:
    left = [root / "tmp" / PARTIAL for root in (filled.home, filled.ledger.records.root)]
    left.append(filled.home / "tmp" / f"{PARTIAL}.wal")
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        old(path)
    young = filled.ledger.blobs.root / "tmp" / f"3-{'4' * 16}"
    young.write_bytes(b"someone writes it now")
    spilt, spilling = (filled.home / "tmp" / name for name in (f"5-{'6' * 16}", f"7-{'8' * 16}"))
    for folder in (spilt, spilling):
        folder.mkdir()
        (folder / "part").write_bytes(b"what did not fit in memory")
        old(folder)
    old(spilt / "part")
    assert 26 in {one.num_bytes for one in filled.ledger.gc()}
    with filled.ledger.running("nightly"):
        assert not any(path.exists() for path in (*left, spilt))
        assert young.exists()
        assert (spilling / "part").exists()


def test_what_a_home_did_not_write_stays(filled: Shelf) -> None:
    """The home may be a project's folder, with a `tmp`, `runs` and `training` of its own."""
    places = (
        "tmp/notes.txt",
        "runs/Aug01_tensorboard/events",
        "training/rows",
        "answers/a.jsonl",
        "adapters/sums/model.partial",
    )
    theirs = [filled.home / place for place in places]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        old(path)
        old(path.parent)
    assert not filled.ledger.gc(remove=True)
    with filled.ledger.running("nightly"):
        assert all(path.exists() for path in theirs)
