"""The snapshot stays open from one query to the next, and nobody notices but for the time."""

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

import store.snapshot
from store.errors import QueryError
from store.query import LIMITS, Limits
from tests.clock import no_stall
from tests.store.conftest import Shelf

COUNT = "SELECT count(*) FROM artifacts"


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The file of each opening from now on."""
    done: list[Path] = []
    truly = store.snapshot.opened

    def opened(path: Path, memory_bytes: int) -> duckdb.DuckDBPyConnection:
        done.append(path)
        return truly(path, memory_bytes)

    monkeypatch.setattr(store.snapshot, "opened", opened)
    return done


def test_a_snapshot_is_opened_once_and_the_next_one_again(
    filled: Shelf, openings: list[Path]
) -> None:
    ((before,),) = filled.ledger.query(COUNT).rows
    for number in (1, 2):
        assert filled.ledger.weights_of(filled.adapter(number).id)
        assert filled.ledger.query(COUNT).rows == [(before,)]
    assert len(openings) == 1
    filled.make(filled.adapter(3))
    filled.ledger.ingest()
    assert filled.ledger.query(COUNT).rows == [(before + 1,)]
    assert filled.ledger.weights_of(filled.adapter(3).id)
    assert len(openings) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="lists the open files of Linux")
def test_nothing_is_open_when_nobody_has_asked_for_a_while(
    asked: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the disk of a home can be unmounted while a notebook is open."""
    monkeypatch.setattr(store.snapshot, "IDLE_SECONDS", 0.2)
    before = asked.ledger.query(COUNT).rows
    with no_stall():
        while asked.ledger.index.snapshot in map(Path.resolve, Path("/proc/self/fd").iterdir()):
            time.sleep(0.05)
    assert asked.ledger.query(COUNT).rows == before


CLOSES_AT_THE_END = """
import sys, time
from pathlib import Path
import store.snapshot
from store.ledger import Ledger

store.snapshot.IDLE_SECONDS = 0.1
begun = []

def close(reader):
    begun.append(True)
    time.sleep(0.5)
    print("closed", flush=True)

store.snapshot.SnapshotReader.close = close
Ledger(Path(sys.argv[1])).query("FROM runs")
while not begun:
    time.sleep(0.01)
"""


def test_a_process_that_ends_waits_for_a_file_that_is_just_closed(asked: Shelf) -> None:
    """DuckDB ends the process with an error if Python ends while it closes a file."""
    command = [sys.executable, "-c", CLOSES_AT_THE_END, str(asked.home)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"closed\n"


def test_without_another_thread_it_is_asked_all_the_same(
    asked: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have no more of them; one that ends begins none any more."""

    def start(_self: object) -> None:
        raise RuntimeError("can't start new thread")

    reader = asked.ledger.index.reader
    reader.close()
    monkeypatch.setattr("threading.Timer.start", start)
    with reader.reading() as connection:
        assert connection.execute(COUNT).fetchall()


def test_after_an_error_it_is_opened_again(asked: Shelf, openings: list[Path]) -> None:
    """DuckDB has errors after which a database answers nothing any more."""
    asked.ledger.query(COUNT)
    before = len(openings)
    with pytest.raises(QueryError, match="no_such_table"):
        asked.ledger.query("FROM no_such_table")
    asked.ledger.query(COUNT)
    asked.ledger.query(COUNT)
    assert len(openings) == before + 1


def test_queries_at_once_do_not_meet(asked: Shelf) -> None:
    """One that ends with an error leaves the others to go on."""
    reader = asked.ledger.index.reader
    with reader.reading() as other:
        with pytest.raises(duckdb.Error, match="no_such_table"), reader.reading() as one:
            one.execute("FROM no_such_table")
        assert other.execute(COUNT).fetchall() == asked.ledger.query(COUNT).rows


def test_each_query_has_the_memory_that_it_asks_for(asked: Shelf) -> None:
    used = "SELECT current_setting('memory_limit')"
    for limits, said in ((LIMITS, "1.0 GiB"), (Limits(memory_bytes=1 << 28), "256.0 MiB")):
        assert asked.ledger.query(used, limits=limits).rows == [(said,)]


def test_an_open_snapshot_can_be_copied_and_deleted(filled: Shelf) -> None:
    filled.ledger.query(COUNT)
    snapshot = filled.ledger.index.snapshot
    whole = snapshot.read_bytes()
    snapshot.unlink()
    assert filled.ledger.index.known() is None
    snapshot.write_bytes(whole)
    with closing(duckdb.connect(str(snapshot), read_only=True)) as connection:
        assert connection.execute(COUNT).fetchall() == filled.ledger.query(COUNT).rows
