"""The record is one file, whole and unchangeable."""

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meteora.artifacts import canonical_json
from store.errors import DamagedError, StoreError
from store.files import write_whole
from store.records import Record, Records
from tests.store.conftest import Shelf

texts = st.text(st.characters(exclude_categories=["Cs"]))
bodies = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
RECORD = Record("failure", "a task", {"message": "why"}, "r1", "2026-01-01T00:00:00.000000Z")


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "records")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(subject=texts, body=st.dictionaries(texts, bodies, max_size=4))
def test_a_record_comes_back_equal(records: Records, subject: str, body: dict) -> None:
    record = replace(RECORD, subject=subject, body=body)
    assert records.read(records.write(record)) == record


def test_a_record_lies_under_the_hash_of_its_bytes_and_is_read_only(records: Records) -> None:
    sha256 = records.write(RECORD)
    path = records.path_of(sha256)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_the_bytes_of_a_record_are_stable_across_releases() -> None:
    """A changed hash here orphans every record on disk."""
    assert hashlib.sha256(RECORD.to_bytes()).hexdigest() == (
        "93fdb9bc01c381099a4ceabc0749f9381b95c794016898a35614af8d7d3ae1d4"
    )


def test_writing_twice_is_once(records: Records) -> None:
    assert records.write(RECORD) == records.write(RECORD)
    assert len(records.loose()) == 1


def test_a_flipped_byte_is_refused(records: Records) -> None:
    path = records.path_of(sha256 := records.write(RECORD))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"why", b"who"))
    with pytest.raises(DamagedError, match="do not hash to its name"):
        records.read(sha256)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe{}", b"hello", b"[1]", b"{}", RECORD.to_bytes().replace(b"why", rb"\ud800"),
        RECORD.to_bytes().replace(b"[]", b'"x"'), RECORD.to_bytes().replace(b'"a task"', b"[1]"),
    ],
    ids=["no text", "no JSON", "no object", "no fields", "surrogate", "no list", "no name"],
)  # fmt: skip
def test_what_is_no_record_is_left_out_though_its_name_is_right(shelf: Shelf, data: bytes) -> None:
    """Such as from another home, through a shared storage."""
    write_whole(
        path := shelf.ledger.records.path_of(hashlib.sha256(data).hexdigest()),
        data,
        root=shelf.home,
    )
    ids = [shelf.make(shelf.base), shelf.make(shelf.adapter(1))]
    assert "1 record cannot be read" in shelf.ledger.ingest().reason
    assert shelf.ledger.query("SELECT id FROM artifacts ORDER BY ALL").rows == [
        (one,) for one in sorted(ids)
    ]
    (finding,) = shelf.ledger.verify().findings
    assert f"{path} is no record" in finding.problem
    with pytest.raises(DamagedError, match="is no record"):
        shelf.ledger.gc()


def test_a_field_of_a_newer_release_is_left_out() -> None:
    newer = canonical_json({**json.loads(RECORD.to_bytes()), "signed": True}).encode()
    assert Record.from_bytes(newer) == RECORD


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "\ud800", object()],
    ids=["nan", "inf", "surrogate", "object"],
)
def test_what_json_cannot_say_is_refused_and_leaves_nothing(
    records: Records, value: object
) -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        records.write(replace(RECORD, body={"value": value}))
    assert not records.root.exists()


def test_nothing_temporary_is_left_or_listed(records: Records) -> None:
    sha256 = records.write(RECORD)
    (records.root / "tmp" / "1-2").write_bytes(b"half a rec")
    (records.root / "ab").mkdir(exist_ok=True)
    (records.root / "ab" / "notes.txt").write_text("mine")
    assert records.loose() == {sha256}
