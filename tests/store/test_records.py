"""The record is one file, whole and unchangeable."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.errors import DamagedError, StoreError
from store.records import Record, Records

if TYPE_CHECKING:
    from pathlib import Path

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
