"""Packed records are the same records: found, checked, rebuilt, and never lost on the way."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import duckdb
import pytest

from meteora.artifacts import file_sha256
from store import segments
from store.errors import DamagedError, StoreError
from store.ledger import Ledger
from store.query import memory
from store.records import Record
from tests.store.conftest import Shelf, write_segment

pytestmark = pytest.mark.usefixtures("disk_is_not_waited_for")


def flip(path: Path, position: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


def the_segment(shelf: Shelf) -> Path:
    (path,) = shelf.ledger.records.segments.root.glob("*.parquet")
    return path


def test_packing_changes_no_answer(filled: Shelf) -> None:
    before = filled.views()
    num_records = len(filled.ledger.records.loose())
    assert filled.ledger.pack() == num_records
    assert not filled.ledger.records.loose()
    assert filled.ledger.ingest().num_records == 0, "the index has these records already"
    assert filled.views() == before
    filled.ledger.rebuild()
    assert filled.views() == before
    found = filled.ledger.verify()
    assert not found.findings
    assert found.num_records == num_records


@pytest.mark.parametrize("lost", ["nothing", "the index"])
def test_a_packed_record_is_found_by_whoever_looks(filled: Shelf, lost: str) -> None:
    filled.ledger.pack()
    if lost == "the index":
        for path in filled.home.glob("ledger.*"):
            path.unlink()
    ledger = Ledger(filled.home)
    assert ledger.weights_of(filled.base.id)
    assert ledger.scores_of([filled.benchmark(filled.base.id, "sorting").id])
    assert ledger.resolve("base:") == filled.base.id
    assert [run.run_id for run in ledger.unended_runs()] == ["r3"]
    before = ledger.records.parts()
    filled.make(filled.base, filled.base.id, run_id="r4")
    assert ledger.records.parts() == before, "recording twice is once, packed or not"


def test_a_segment_that_came_from_elsewhere_is_read(
    filled: Shelf, make_shelf: Callable[[str], Shelf]
) -> None:
    filled.ledger.pack()
    other = make_shelf("other")
    other.make(filled.base, filled.base.id)
    other.ledger.ingest()
    for part in ("records", "blobs"):
        shutil.copytree(filled.home / part, other.home / part, dirs_exist_ok=True)
    assert other.ledger.weights_of(filled.adapter(2).id), "before it is ingested"
    other.ledger.ingest()
    assert len(other.views()["artifacts"]) == len(filled.views()["artifacts"])
    assert not other.ledger.verify().findings


@pytest.mark.parametrize(
    "text", ["a\0b", "é\U0001f600\u202e", '"\\', "x'); DROP TABLE scores; --", "\r\n\t "]
)
def test_every_text_is_packed_byte_for_byte(shelf: Shelf, text: str) -> None:
    record = Record("failure", text, {"message": text}, "r1", "2026-01-01T00:00:00.000000Z")
    records = shelf.ledger.records
    sha256 = records.write(record)
    records.write(replace(record, run_id="r2"))
    before = records.read_bytes(sha256)
    assert records.pack() == 2
    assert records.read_bytes(sha256) == before
    assert records.read(sha256) == record


def test_a_run_packs_records_when_they_are_many(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled.views()
    monkeypatch.setattr("store.ledger.PACK_RECORDS", len(filled.ledger.records.loose()) + 1)
    with filled.ledger.running("weekly"):
        assert not filled.ledger.records.segments.names()
    monkeypatch.setattr("store.ledger.PACK_RECORDS", len(filled.ledger.records.loose()))
    with filled.ledger.running("weekly"):
        assert not filled.ledger.records.loose()
    filled.ledger.ingest()
    assert filled.views() == before
    assert not filled.ledger.verify().findings


def test_records_that_cannot_be_packed_stop_no_run(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("store.ledger.PACK_RECORDS", 1)
    full = Mock(side_effect=StoreError("the disk is full"))
    monkeypatch.setattr(filled.ledger.records.segments, "write", full)
    with filled.ledger.running("weekly"):
        assert filled.ledger.records.loose()
    assert "loose records are not packed: the disk is full" in caplog.text


def test_large_stores_have_several_segments(filled: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled.views()
    monkeypatch.setattr("store.records.SEGMENT_RECORDS", 7)
    filled.ledger.pack()
    assert len(filled.ledger.records.segments.names()) > 3
    filled.ledger.rebuild()
    assert filled.views() == before


def test_a_record_that_is_loose_and_packed_is_one(filled: Shelf) -> None:
    """As a process leaves it that dies while it packs."""
    before = filled.views()
    kept = filled.home / "kept"
    shutil.copytree(filled.ledger.records.root, kept)
    filled.ledger.pack()
    shutil.copytree(kept, filled.ledger.records.root, dirs_exist_ok=True)
    shutil.rmtree(kept)
    filled.ledger.rebuild()
    assert filled.views() == before
    assert filled.ledger.pack() == 0
    assert not filled.ledger.records.loose()
    assert len(filled.ledger.records.segments.names()) == 1


def test_a_flipped_byte_anywhere_in_a_segment_is_found(filled: Shelf) -> None:
    filled.ledger.pack()
    filled.ledger.ingest()
    path = the_segment(filled)
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 5):
        path.write_bytes(whole)
        flip(path, position)
        found = Ledger(filled.home).verify().findings
        assert (found[0].what, found[0].name) == ("segment", path.name)
        assert filled.base.id in found[0].touches
    path.write_bytes(whole)
    assert not filled.ledger.verify().findings


def test_a_segment_that_is_unreadable_hides_no_other(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    first = filled.ledger.records.loose()
    filled.ledger.pack()
    path = the_segment(filled)
    filled.make(filled.adapter(9))
    second = filled.ledger.records.loose()
    filled.ledger.pack()
    path.chmod(0o644)
    path.write_bytes(b"")
    segments = filled.ledger.records.segments
    assert second
    assert segments.holding(first | second) == segments.texts(first | second).keys() == second
    assert f"segment {path.name} cannot be read" in caplog.text
    with pytest.raises(StoreError, match=r"cannot be read now .*is not known"):
        segments.blobs(path.name)


def test_a_record_that_changed_inside_a_segment_is_left_out(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    names = filled.ledger.records.loose()
    filled.ledger.pack()
    path = the_segment(filled)
    with memory() as connection:
        connection.execute(
            "COPY (SELECT * REPLACE (text || ' ' AS text)"  # noqa: S608
            f" FROM read_parquet('{path}')) TO '{path}.new' (FORMAT parquet)"
        )
    path.with_name(f"{path.name}.new").replace(path)
    assert filled.ledger.records.segments.texts(names) == {}
    assert "in a segment does not hash to its name" in caplog.text


def test_a_damaged_segment_is_never_a_reason_to_drop_a_loose_record(filled: Shelf) -> None:
    kept = filled.home / "kept"
    shutil.copytree(filled.ledger.records.root, kept)
    filled.ledger.pack()
    path = the_segment(filled)
    flip(path, path.stat().st_size // 2)
    shutil.copytree(kept, filled.ledger.records.root, dirs_exist_ok=True)
    before = filled.ledger.records.loose()
    with pytest.raises(DamagedError, match="do not hash to its name"):
        filled.ledger.pack()
    assert filled.ledger.records.loose() == before


def test_a_segment_of_other_texts_is_no_reason_to_drop_a_record(filled: Shelf) -> None:
    names = filled.ledger.records.loose()
    before = filled.ledger.records.read_all(names)
    write_segment(filled.ledger.records.segments.root, dict.fromkeys(names, "{}"))
    filled.ledger.ingest()
    assert filled.ledger.pack() == len(names)
    assert filled.ledger.records.read_all(names) == before


def test_a_file_that_is_no_segment_is_left_out_and_named(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_segment(filled.ledger.records.segments.root, {})
    with memory() as connection:
        connection.execute(f"COPY (SELECT 1 AS other) TO '{path}' (FORMAT parquet)")
    path.rename(path.with_name(f"{file_sha256(path)}.parquet"))
    path.write_bytes(b"no parquet")
    path.rename(path.with_name(f"{file_sha256(path)}.parquet"))
    filled.make(filled.adapter(9), run_id="r9")
    assert filled.ledger.ingest().num_records == 1
    assert caplog.text.count("is no segment") == 2
    findings = filled.ledger.verify().findings
    assert [found.what for found in findings] == ["segment", "segment"]
    assert all("move it away to go on without it" in found.problem for found in findings)


def test_a_damaged_record_is_not_packed_and_stops_no_other(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    records = filled.ledger.records
    before = records.loose()
    damaged = records.path_of(min(before))
    flip(damaged, 9)
    for num_packed in (len(before) - 1, 0):
        assert records.pack() == num_packed
        assert records.loose() == {min(before)}
        assert f"not packed: {damaged}: its bytes do not hash to its name" in caplog.text
        caplog.clear()
    (finding,) = filled.ledger.verify().findings
    assert finding.name == min(before)


def test_what_is_not_whole_when_it_is_read_back_is_not_packed(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "INSERT_RECORDS", 5)
    records = filled.ledger.records
    texts, _ = records.read_all(records.loose())
    texts[min(texts)] += b" "
    with pytest.raises(segments.StoreError, match="does not hold what was written"):
        records.segments.write(texts)
    assert not records.segments.names()


def test_gc_knows_what_packed_records_mention(filled: Shelf) -> None:
    before = set(filled.ledger.blobs)
    filled.ledger.pack()
    for sha256 in before:
        os.utime(filled.ledger.blobs.path_of(sha256), (0, 0))
    assert not filled.ledger.gc(remove=True)
    assert set(filled.ledger.blobs) == before


def test_gc_removes_nothing_while_a_segment_is_damaged(filled: Shelf) -> None:
    filled.ledger.pack()
    path = the_segment(filled)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(DamagedError, match="do not hash to its name"):
        filled.ledger.gc(remove=True)


def test_gc_removes_nothing_while_segments_may_not_be_listed(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(filled.ledger.blobs)
    filled.ledger.pack()
    for sha256 in before:
        os.utime(filled.ledger.blobs.path_of(sha256), (0, 0))
    packed, scandir = filled.ledger.records.segments.root, os.scandir

    def refused(path: Path) -> object:  # by a mode that does not bind root
        if Path(path) == packed:
            raise PermissionError(errno.EACCES, "Permission denied", str(packed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        filled.ledger.gc(remove=True)
    monkeypatch.undo()
    assert set(filled.ledger.blobs) == before


def test_gc_removes_nothing_while_a_segment_cannot_be_searched(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where several are searched together, and then one by one."""
    before = set(filled.ledger.blobs)
    monkeypatch.setattr("store.records.SEGMENT_RECORDS", 20)
    filled.ledger.pack()
    for sha256 in before:
        os.utime(filled.ledger.blobs.path_of(sha256), (0, 0))

    def little() -> duckdb.DuckDBPyConnection:
        connection = memory()
        connection.execute("SET memory_limit = '300KiB'")
        return connection

    monkeypatch.setattr(segments, "memory", little)
    with pytest.raises(StoreError, match=r"cannot be read now .*is not known"):
        filled.ledger.gc(remove=True)
    assert set(filled.ledger.blobs) == before
