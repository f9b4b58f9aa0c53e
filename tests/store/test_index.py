"""The index can be lost, damaged, outdated or locked, and nothing is lost with it."""

import hashlib
import logging
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import duckdb
import pytest

from meteora.artifacts import ArtifactId, BenchmarkSpec
from store import index
from store.errors import StoreError
from store.events import AdapterVerdict, RunStarted
from store.files import locked
from store.intake import add, offer_texts
from store.ledger import Ledger
from store.query import LIMITS, memory, opened, quoted
from store.records import Record
from store.schema import migrate, sources
from tests.store.conftest import Shelf

pytestmark = pytest.mark.usefixtures("disk_is_not_waited_for")

LAST = Record(
    "failure",
    "sorting",
    {"stage": "fit", "subject": "sorting", "error": "E", "message": "m"},
    "r3",
    "2026-01-02T00:00:00.000000Z",
)
LIVE, SNAPSHOT = "ledger.duckdb", "ledger.snapshot.duckdb"


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_text("no database at all\n" * 999)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0xFF
    path.write_bytes(data)


def with_a_log(path: Path) -> None:
    """The log of another database lies beside it, as of whoever wrote to an earlier copy."""
    with duckdb.connect(str(path.with_name("other.duckdb"))) as connection:
        connection.execute(
            "PRAGMA disable_checkpoint_on_shutdown; CREATE TABLE records (sha256 INT)"
        )
    index.wal(path.with_name("other.duckdb")).rename(index.wal(path))
    path.with_name("other.duckdb").unlink()


def orphaned(path: Path) -> None:
    with_a_log(path)
    path.unlink()


def foreign(path: Path) -> None:
    """A database of somebody else, in the format that this DuckDB prefers."""
    path.unlink()
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE records (mine INT)")


def foreign_of_old(path: Path) -> None:
    path.unlink()
    with memory() as connection:
        connection.execute(f"ATTACH {quoted(path)} AS other (STORAGE_VERSION 'v1.4.0')")
        connection.execute("CREATE TABLE other.records (mine INT)")


def sqlite(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE records (sha256)")
    connection.close()


def header_flipped(path: Path) -> None:
    flipped(path, 4096)


@pytest.fixture(scope="module")
def views_with_last(
    asked: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple]]:
    """What `filled` holds once it has one more record, and nothing else happened to it."""
    home = tmp_path_factory.mktemp("last") / "home"
    shutil.copytree(asked.home, home)
    shelf = replace(asked, home=home)
    shelf.ledger.records.write(LAST)
    assert shelf.ledger.ingest().num_records == 1
    views = shelf.views()
    assert len(views["failures"]) == 2
    return views


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        pytest.param(Path.unlink, [LIVE], id="live deleted"),
        pytest.param(Path.unlink, [SNAPSHOT], id="snapshot deleted"),
        pytest.param(Path.unlink, [LIVE, SNAPSHOT], id="both deleted"),
        pytest.param(orphaned, [LIVE], id="live deleted, its log left"),
        pytest.param(with_a_log, [LIVE], id="another log beside live"),
        pytest.param(with_a_log, [SNAPSHOT], id="another log beside the snapshot"),
        pytest.param(truncated, [LIVE], id="live truncated"),
        pytest.param(truncated, [SNAPSHOT], id="snapshot truncated"),
        pytest.param(emptied, [LIVE, SNAPSHOT], id="both empty"),
        pytest.param(overwritten, [LIVE, SNAPSHOT], id="both text"),
        pytest.param(sqlite, [LIVE, SNAPSHOT], id="both SQLite"),
        pytest.param(foreign, [LIVE, SNAPSHOT], id="both somebody else's"),
        pytest.param(foreign_of_old, [LIVE, SNAPSHOT], id="both somebody else's of old"),
        pytest.param(header_flipped, [LIVE, SNAPSHOT], id="both with a flipped header"),
    ],
)
def test_a_lost_index_comes_back_from_the_records(
    filled: Shelf,
    views_with_last: dict[str, list[tuple]],
    damage: Callable[[Path], None],
    names: list[str],
) -> None:
    for name in names:
        (filled.home / name).chmod(0o644)
        damage(filled.home / name)
    filled.ledger = Ledger(filled.home)
    assert filled.ledger.weights_of(filled.base.id)
    filled.ledger.records.write(LAST)
    assert filled.ledger.ingest().reason == ""
    assert not any(index.wal(filled.home / name).exists() for name in (LIVE, SNAPSHOT))
    assert not filled.ledger.verify().findings
    assert filled.views() == views_with_last


def test_a_rebuilt_index_takes_over_no_log_that_was_left(filled: Shelf) -> None:
    before = filled.views()
    orphaned(filled.ledger.index.live)
    assert filled.ledger.rebuild().reason == ""
    assert not index.wal(filled.ledger.index.live).exists()
    assert filled.views() == before


@pytest.mark.parametrize("names", [[LIVE], [LIVE, SNAPSHOT]], ids=["live", "both"])
def test_a_deleted_index_is_told_of(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    """And the first one of a home is not."""
    shelf.make(shelf.base)
    shelf.ledger.ingest()
    assert not caplog.text
    for name in names:
        (shelf.home / name).unlink()
    assert Ledger(shelf.home).ingest().reason == ""
    assert "ledger.duckdb is missing; it is made again from the records" in caplog.text
    assert len(shelf.ledger.query("FROM artifacts").rows) == 1


def test_a_damaged_index_is_set_aside_not_deleted(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    filled.ledger.index.live.write_bytes(b"damaged")
    filled.make(filled.adapter(3))
    assert filled.ledger.ingest().reason == ""
    (aside,) = filled.home.glob("ledger.damaged-*.duckdb")
    assert aside.read_bytes() == b"damaged"
    assert "made again from the records" in caplog.text


def test_an_index_of_another_history_is_set_aside_too(filled: Shelf) -> None:
    """A migration that it was made with had other bytes, so its tables may be others."""
    before = filled.views()
    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        connection.execute("UPDATE migrations SET sha256 = 'other' WHERE number = 1")
    filled.ledger.index.snapshot.unlink()
    assert Ledger(filled.home).ingest().reason == ""
    assert len([*filled.home.glob("ledger.damaged-*.duckdb")]) == 1
    assert filled.views() == before


@pytest.mark.parametrize(
    "error",
    [
        duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block"),
        duckdb.IOException("IO Error: Could not write file: No space left on device"),
        duckdb.InternalException("INTERNAL Error: of any kind"),
    ],
    ids=["memory", "disk", "anything"],
)
def test_an_index_stays_where_it_is_if_another_cannot_be_made(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch, error: duckdb.Error
) -> None:
    """Whatever it is that fails, time after time, no copies pile up and nothing is lost."""

    def failing(*_: object) -> None:
        raise error

    before = filled.ledger.index.live.read_bytes()
    filled.make(filled.adapter(3))
    with monkeypatch.context() as patch:
        patch.setattr("store.index.add", failing)
        for _ in range(2):
            assert str(error) in filled.ledger.ingest().reason
    assert filled.ledger.index.live.read_bytes() == before
    assert not list(filled.home.glob("ledger.damaged-*"))
    assert filled.ledger.ingest().num_records == 1


def test_what_does_not_fit_in_memory_lies_in_the_home_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spill = tmp_path / "home" / "tmp" / "1-2"
    spill.parent.mkdir(parents=True)
    sorting = "CREATE TABLE sorted AS SELECT hash(range) AS h FROM range(4_000_000) ORDER BY h"
    for folder in (spill, None):
        with memory(folder) as connection:
            connection.execute("SET memory_limit = '24MiB'; SET threads = 1")
            if folder:
                connection.execute(sorting)
                assert spill.is_dir()
            else:
                with pytest.raises(duckdb.OutOfMemoryException):
                    connection.execute(sorting)
    assert not spill.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40) if seed != 1)]


@pytest.mark.parametrize("name", [LIVE, SNAPSHOT])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_flipped_byte_anywhere_is_found_or_harmless(
    filled: Shelf, views_of_filled: dict[str, list[tuple]], name: str, seed: int
) -> None:
    """DuckDB notices a flipped block only when it reads it: `verify` reads them all."""
    path = filled.home / name
    path.chmod(0o644)
    flipped(path, random.Random(seed).randrange(path.stat().st_size))
    problems = [finding.problem for finding in Ledger(filled.home).verify().findings]
    if any("rebuild" in problem for problem in problems):
        filled.ledger.rebuild()
    filled.ledger.ingest()
    assert not filled.ledger.verify().findings
    assert filled.views() == views_of_filled


def test_a_damaged_log_loses_nothing(filled: Shelf) -> None:
    """Where the size of an entry is hit, DuckDB opens without a word, and rows are gone."""
    script = (
        "import os, sys, store.index as index\n"
        "from pathlib import Path\n"
        "from store.ledger import Ledger\n"
        "whole = index.add\n"
        "index.add = lambda *batch: (whole(*batch), os._exit(9))\n"
        "Ledger(Path(sys.argv[1])).ingest()\n"
    )
    before = filled.views()
    for number in range(3, 6):
        filled.make(filled.adapter(number))
    subprocess.run([sys.executable, "-c", script, filled.home], check=False)
    live = filled.ledger.index.live
    log = index.wal(live)
    kept, whole = log.read_bytes(), live.read_bytes()
    assert kept, "the writer was to die between commit and checkpoint"
    for position in range(0, len(kept), len(kept) // 3):
        live.write_bytes(whole)
        log.write_bytes(kept)
        flipped(log, position)
        filled.ledger.index.snapshot.unlink(missing_ok=True)
        ledger = filled.ledger = Ledger(filled.home)
        assert ledger.ingest().reason == ""
        assert ledger.query("SELECT count(*) FROM artifacts").rows == [(17,)]
        assert not log.exists()
        assert not ledger.verify().findings
    assert len(filled.views()["scores"]) == len(before["scores"])


def test_a_writer_that_dies_before_it_has_ranked_leaves_that_to_the_next(filled: Shelf) -> None:
    """Records are in, and what is kept about whole boards is not up to date."""
    script = (
        "import os, sys, store.index as index\n"
        "from pathlib import Path\n"
        "from store.ledger import Ledger\n"
        "index.rank = lambda connection: os._exit(9)\n"
        "Ledger(Path(sys.argv[1])).ingest()\n"
    )
    stack = filled.fused(filled.adapter(1), filled.adapter(2))
    filled.make(better := filled.router(stack, seed=3))
    filled.measure(better, "sorting", 0.95)
    subprocess.run([sys.executable, "-c", script, filled.home], check=False)
    ledger = filled.ledger = Ledger(filled.home)
    assert ledger.ingest().reason == ""
    best = "SELECT subject_id, place, oracle_value FROM leaderboard WHERE task = 'sorting'"
    assert ledger.query(f"{best} AND place = 1").rows == [(better.id, 1, 0.9)]
    assert ledger.query(f"{best} AND place = 3").rows != []
    assert not ledger.query("FROM unsettled").rows
    assert not ledger.verify().findings


@pytest.mark.parametrize("last", [-1, -2], ids=["the model", "its stack"])
def test_what_is_learnt_later_about_a_model_is_ranked_too(shelf: Shelf, last: int) -> None:
    """Scores came first, then who they are of: as records of two homes can come."""
    records = shelf.ledger.records
    stack = shelf.fused(shelf.adapter(1), shelf.adapter(2))
    shelf.ledger.record_run(RunStarted("r1", "nightly", "9" * 64))
    artifacts = [*records.loose()]
    for spec in (shelf.base, shelf.adapter(1), shelf.adapter(2), stack, shelf.router(stack)):
        shelf.make(spec)
        artifacts += records.loose().difference(artifacts)
    shelf.measure(shelf.base, "sorting", 0.1)
    shelf.measure(shelf.adapter(2), "sorting", 0.9)
    shelf.measure(shelf.router(stack), "sorting", 0.8)
    shelf.measure(shelf.router(stack), "parentheses", 0.7)  # which nobody else was asked
    later = shelf.home / "later"
    later.mkdir()
    for name in artifacts:
        records.path_of(name).rename(later / name)
    shelf.ledger.ingest()
    assert shelf.ledger.query("FROM leaderboard").rows == []
    artifacts.append(artifacts.pop(last))
    for name in artifacts:
        (later / name).rename(records.path_of(name))
        assert shelf.ledger.ingest().reason == ""
    grown = shelf.views()
    ranked = "SELECT value, base_value, oracle_value FROM leaderboard ORDER BY value"
    assert shelf.ledger.query(ranked).rows == [(0.7, None, None), (0.8, 0.1, 0.9)]
    shelf.ledger.rebuild()
    assert shelf.views() == grown


def test_a_fall_is_told_when_the_start_of_its_run_comes_last(filled: Shelf) -> None:
    before = filled.views()
    ((name,),) = filled.ledger.query(
        "SELECT sha256 FROM records WHERE kind = 'run-started' AND subject = 'r2'"
    ).rows
    path, later = filled.ledger.records.path_of(name), filled.home / "later"
    path.rename(later)
    filled.ledger.rebuild()
    assert not filled.ledger.query("FROM regressions").rows
    later.rename(path)
    assert filled.ledger.ingest().num_records == 1
    assert filled.views() == before


def test_rebuilding_gives_the_same_answers(filled: Shelf) -> None:
    """Also where the index grew bit by bit, in an order that is not that of the events."""
    for path in filled.home.glob("ledger.*"):
        path.unlink()
    paths = sorted(filled.ledger.records.root.glob("*/*.json"))
    for path in paths:
        path.rename(path.with_suffix(".later"))
    for start in range(0, len(paths), 15):
        for path in paths[start : start + 15]:
            path.with_suffix(".later").rename(path)
        assert filled.ledger.ingest().num_records == len(paths[start : start + 15])
    grown = filled.views()
    assert filled.ledger.rebuild().num_records == len(filled.ledger.records.loose())
    assert filled.views() == grown


def test_a_busy_index_lets_the_records_wait(
    filled: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    filled.make(filled.adapter(3))
    with locked(filled.ledger.index.lock, deadline_seconds=0):
        outcome = filled.ledger.ingest(deadline_seconds=0.1)
    assert outcome.num_waiting == 1
    assert "is held by another process" in outcome.reason
    assert "1 record waits for the next ingest" in caplog.text
    assert filled.ledger.ingest().num_records == 1


def test_an_open_notebook_never_stops_a_run(filled: Shelf) -> None:
    """Neither on the snapshot, where it belongs, nor on the index itself, where it does not."""
    filled.ledger.ingest()
    notebook = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True);"
        "print(c.execute('SELECT count(*) FROM scores').fetchone(), flush=True); sys.stdin.read()"
    )
    for path, waits in ((filled.ledger.index.snapshot, False), (filled.ledger.index.live, True)):
        with subprocess.Popen(
            [sys.executable, "-c", notebook, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as open_notebook:
            assert open_notebook.stdout
            assert open_notebook.stdout.readline() == b"(9,)\n"
            filled.make(filled.adapter(7 + waits))
            outcome = filled.ledger.ingest(deadline_seconds=1)
            assert bool(outcome.num_waiting) is waits
            assert ("Could not set lock on file" in outcome.reason) is waits
            open_notebook.communicate()
    assert filled.ledger.ingest().num_records == 1


def test_no_default_calls_a_function(filled: Shelf) -> None:
    """Whoever attaches to a served index binds the defaults, and looks for functions there."""
    with duckdb.connect(filled.ledger.index.snapshot, read_only=True) as connection:
        defaults = connection.execute(
            "SELECT DISTINCT column_default FROM duckdb_columns() WHERE column_default IS NOT NULL"
            " AND NOT internal"
        ).fetchall()
    assert ("'auto'",) in defaults
    assert not [default for (default,) in defaults if "(" in default.replace("CAST(", "")]


def test_arrows_stand_alone() -> None:
    """DuckDB 1.5 reads `a AND b->>'c'` as `(a AND b)->>'c'`, and rejected every such record."""
    for file in Path(index.__file__).parent.rglob("*.*"):
        sql = file.read_text() if file.suffix in {".py", ".sql"} else ""
        arrows = re.findall(r"\w+(?:->>?'[^']+')+", sql)
        alone = r"(?:[(,]|SELECT)\s*(\w+(?:->>?'[^']+')+)(?=\s*(?:[),\"]|AS\b|FROM\b))"
        assert re.findall(alone, sql) == arrows, file


def test_every_table_forgets_a_record_that_an_earlier_one_overrules(asked: Shelf) -> None:
    """But those of events, of which each counts."""
    sql = resources.files("store").joinpath("ingest.sql").read_text()
    forgetting = re.findall(r"DELETE FROM (\w+) WHERE record_sha256 IN \(FROM overruled\)", sql)
    tables = asked.ledger.query(
        "SELECT table_name FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (table_name)"
        " WHERE column_name = 'record_sha256'"
    ).rows
    events = {"verdicts", "verdict_reasons", "failed"}
    assert sorted(forgetting) == sorted({name for (name,) in tables} - events)


def test_migrations_are_numbered_as_they_are_applied() -> None:
    numbers = [int(name[:4]) for number, (name, _) in sorted(sources().items()) if number]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_new_index_has_what_the_migrations_make(shelf: Shelf, tmp_path: Path) -> None:
    """Though the tests copy it from an empty one."""
    objects = (
        "SELECT table_name AS name, sql, comment FROM duckdb_tables()"
        " WHERE database_name = 'ledger' UNION ALL"
        " SELECT view_name, sql, comment FROM duckdb_views() WHERE database_name = 'ledger'"
        " ORDER BY ALL"
    )
    applied = "SELECT * FROM migrations ORDER BY ALL"
    shelf.ledger.ingest()
    path = tmp_path / "migrated.duckdb"
    with memory() as connection:
        version = f"STORAGE_VERSION '{index.STORAGE_VERSION}'"
        connection.execute(f"ATTACH {quoted(path)} AS ledger ({version}); USE ledger")
        migrate(connection)
    with opened(path, LIMITS.memory_bytes) as connection:
        for question, least in ((objects, 40), (applied, len(sources()))):
            expected = connection.execute(question).fetchall()
            assert len(expected) >= least
            assert shelf.ledger.query(question).rows == expected


def test_an_index_from_before_abstentions_reads_the_records_of_routing_again(
    filled: Shelf,
) -> None:
    before = filled.views()
    assert before["abstentions"]
    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        connection.execute("DROP TABLE abstentions")
        connection.execute("DELETE FROM migrations WHERE name = '0012_abstentions.sql'")
    filled.ledger.index.snapshot.unlink()
    assert Ledger(filled.home).ingest().reason == ""
    assert filled.views() == before
    assert not Ledger(filled.home).verify().findings


def test_an_index_in_which_the_first_routes_counted_has_the_latest(filled: Shelf) -> None:
    (first, *_) = filled.ledger.query("SELECT sha256 FROM records WHERE kind = 'routing'").rows[0]
    again = replace(filled.ledger.records.read(first), at="2100-01-01T00:00:00.000000Z")
    latest = filled.ledger.records.write(again)
    filled.ledger.ingest()
    before = filled.views()
    assert latest in str(before["routing_counts"])
    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        earlier = f"UPDATE routing_counts SET record_sha256 = '{first}'"  # noqa: S608
        connection.execute(f"{earlier} WHERE record_sha256 = '{latest}'")
        connection.execute("DELETE FROM migrations WHERE name = '0017_latest_routing.sql'")
    assert filled.ledger.ingest().reason == ""
    assert filled.views() == before
    assert not filled.ledger.verify().findings


def test_a_router_that_was_grown_often_has_all_its_ancestors(shelf: Shelf) -> None:
    """Also in an index that was made when 32 steps were the most."""
    shelf.make(shelf.base)
    shelf.make(shelf.adapter(1))
    gates = shelf.router(shelf.fused(shelf.adapter(1)))
    shelf.make(shelf.fused(shelf.adapter(1)))
    shelf.make(gates)
    for number in range(1, 40):
        gates = replace(gates, seed=number, grown_from=gates.id)
        shelf.make(gates)
    shelf.ledger.ingest()
    sql = f"SELECT max(depth), count(*) FROM ancestors WHERE descendant_id = '{gates.id}'"  # noqa: S608
    assert shelf.ledger.query(sql).rows == [(39, 39 + 3)]
    with duckdb.connect(str(shelf.ledger.index.live)) as connection:
        connection.execute("DELETE FROM ancestors WHERE depth > 32")
        connection.execute("DELETE FROM migrations WHERE name = '0015_long_lineages.sql'")
    shelf.ledger.index.snapshot.unlink()
    shelf.ledger.ingest()
    assert shelf.ledger.query(sql).rows == [(39, 39 + 3)]
    assert not shelf.ledger.verify().findings


def test_a_newer_ledger_is_left_alone(filled: Shelf) -> None:
    with duckdb.connect(str(filled.ledger.index.live)) as connection:
        connection.execute("INSERT INTO migrations VALUES (99, '0099_later.sql', '')")
    before = filled.ledger.index.live.read_bytes()
    filled.make(filled.adapter(3))
    outcome = filled.ledger.ingest()
    assert "has schema 99" in outcome.reason
    assert outcome.num_waiting == 1
    assert filled.ledger.index.live.read_bytes() == before
    assert filled.ledger.weights_of(filled.adapter(3).id)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP TABLE read_files", ["37 records wait for the next ingest: it is busy"]),
        (
            "UPDATE migrations SET sha256 = '' WHERE number = 0",
            ["the index is that of another release, whose views may differ: it is busy"],
        ),
    ],
    ids=["first", "later"],
)
def test_an_index_of_an_older_release_that_stays_as_it_is_says_so(
    change: str,
    said: list[str],
    filled: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a read-only disk. The very first release did not list the files that it had read."""
    older, snapshot = filled.home / "older", filled.ledger.index.snapshot
    shutil.copyfile(snapshot, older)
    with duckdb.connect(str(older)) as connection:
        connection.execute(change)
    older.replace(snapshot)
    with monkeypatch.context() as patch:
        patch.setattr(index, "locked", Mock(side_effect=StoreError("it is busy")))
        assert filled.ledger.ingest().reason == "it is busy"
    assert caplog.messages == said
    assert filled.ledger.ingest().reason == ""
    assert filled.ledger.index.known()
    assert caplog.messages == said


def test_a_file_of_a_newer_duckdb_is_a_sentence(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DuckDB 1.5 says it of a file in the format of 2.0."""

    def newer(*_: object) -> int:
        raise duckdb.IOException(
            "IO Error: Trying to read a database file with version number 999, but we can only"
            " read versions between 64 and 68."
        )

    before = filled.ledger.index.live.read_bytes()
    filled.make(filled.adapter(3))
    with monkeypatch.context() as patch:
        patch.setattr(filled.ledger.index, "build", newer)
        outcome = filled.ledger.ingest()
    assert "was written by a newer DuckDB" in outcome.reason
    assert filled.ledger.index.live.read_bytes() == before
    assert filled.ledger.ingest().num_records == 1


def test_a_record_that_is_not_understood_does_not_stop_the_others(shelf: Shelf) -> None:
    records = shelf.ledger.records
    shelf.make(shelf.base)
    strange = [
        Record("dream", "x", {}, "r1", "2026-01-01T00:00:00.000000Z"),
        replace(LAST, version=2),
        Record("failure", "x", {}, "r1", "2026-01-01T00:00:00.000000Z"),
        Record("score", "x", {"value": "1e999", "spec": []}, "r1", "2026-01-01T00:00:00.000000Z"),
        Record("routing", "x", {"counts": 7}, "r1", "2026-01-01T00:00:00.000000Z"),
        Record("failure", "x", {"stage": "a\0b"}, "r1", "tomorrow"),
    ]
    names = sorted(records.write(record) for record in strange)
    shelf.make(shelf.adapter(1))
    assert shelf.ledger.ingest().reason == ""
    assert shelf.ledger.query("SELECT count(*) FROM artifacts").rows == [(2,)]
    rejected = shelf.ledger.query("SELECT subject FROM failures WHERE error = 'rejected'").rows
    assert sorted(name for (name,) in rejected) == names
    before = shelf.ledger.index.snapshot.stat().st_ino
    shelf.ledger.ingest()
    assert shelf.ledger.index.snapshot.stat().st_ino == before, "nothing new, nothing written"
    assert shelf.ledger.pack() == len(strange) + 2
    outcome = shelf.ledger.ingest()
    assert (outcome.num_records, outcome.reason) == (0, "")
    assert shelf.ledger.query("SELECT count(*) FROM rejected").rows == [(len(strange),)]


def test_the_reason_against_a_record_is_short_and_printable(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    """The database quotes the record in it."""
    shelf.make(shelf.base)
    measured = shelf.measure(shelf.base, "sorting", 0.5)
    body = {**measured.to_dict(), "id": "x", "num_samples": "\x1b[2J" + "x" * 5_000}
    shelf.ledger.records.write(Record("score", "x", body, "r1", "2026-01-01"))
    shelf.ledger.ingest()
    (said,) = [record.getMessage() for record in caplog.records]
    ((kept,),) = shelf.ledger.query("SELECT reason FROM rejected").rows
    assert said.endswith(f"cannot be read into the tables: {kept}")
    assert said.isprintable()
    assert "�[2Jxxx" in said
    assert len(said) < 500


@pytest.mark.parametrize("start", ["", "x"])
def test_a_message_that_the_database_cuts_in_a_character_stops_nothing(
    shelf: Shelf, start: str
) -> None:
    shelf.make(shelf.base)
    body = {"parents": start + "é" * 100}
    shelf.ledger.records.write(Record("artifact", "x", body, "r1", "2026-01-01"))
    assert shelf.ledger.ingest().reason == ""
    assert shelf.ledger.query("SELECT id FROM artifacts").rows == [(shelf.base.id,)]
    assert len(shelf.ledger.query("FROM rejected").rows) == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused_by_the_tables(shelf: Shelf, value: str) -> None:
    shelf.make(shelf.base)
    measured = shelf.measure(shelf.base, "sorting", 0.5)
    record = Record(
        "score", "x", {**measured.to_dict(), "id": "x", "value": value}, "r1", "2026-01-01"
    )
    shelf.ledger.records.write(record)
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT value FROM scores").rows == [(0.5,)]
    assert len(shelf.ledger.query("FROM rejected").rows) == 1


@pytest.mark.parametrize(
    "text",
    ["x'); DROP TABLE scores; --", '"', "\\", "é\U0001f600\u202e", "\x07", "a\0b", "$1", "%"],
)
def test_every_text_is_kept_as_it_is(shelf: Shelf, text: str) -> None:
    shelf.make(shelf.base)
    shelf.measure(shelf.base, text, 0.5)
    assert shelf.ledger.ingest().reason == ""
    assert shelf.ledger.query("SELECT task FROM scores").rows == [(text,)]


def test_the_index_is_in_a_format_that_duckdb_1_4_reads(filled: Shelf) -> None:
    with duckdb.connect(str(filled.ledger.index.live), read_only=True) as connection:
        tags = connection.execute(
            "SELECT tags FROM duckdb_databases() WHERE NOT internal"
        ).fetchone()
    assert "v1.4.0" in str(tags)


def test_unknown_artifacts_are_unknown_also_without_an_index(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert shelf.ledger.weights_of(ArtifactId("base:" + "0" * 64)) is None
    assert not caplog.records, "a fresh home is nothing to warn about"


def test_a_record_that_cannot_be_read_is_left_out_and_said(filled: Shelf) -> None:
    filled.make(filled.adapter(3))
    (name,) = filled.ledger.records.loose() - (filled.ledger.index.known() or set())
    path = filled.ledger.records.path_of(name)
    path.chmod(0o644)
    whole = path.read_bytes()
    path.write_bytes(b"{}")
    filled.make(filled.adapter(4))
    outcome = filled.ledger.ingest()
    assert (outcome.num_records, outcome.num_waiting) == (1, 1)
    assert "cannot be read" in outcome.reason
    assert filled.ledger.weights_of(filled.adapter(3).id) is None
    assert filled.ledger.rebuild().reason == outcome.reason
    path.write_bytes(whole)
    assert filled.ledger.ingest().reason == ""
    assert filled.ledger.weights_of(filled.adapter(3).id)


def test_readers_are_never_behind_an_index_that_is_whole(
    filled: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies between checkpoint and snapshot leaves the next one to publish."""
    filled.make(filled.adapter(3))
    with monkeypatch.context() as patch:
        patch.setattr(filled.ledger.index, "_publish", lambda: None)
        filled.ledger.ingest()
    assert filled.ledger.query("SELECT count(*) FROM artifacts").rows == [(14,)]
    filled.ledger.ingest()
    assert filled.ledger.query("SELECT count(*) FROM artifacts").rows == [(15,)]


def test_a_score_of_an_older_release_is_the_same_before_and_after_a_migration(
    asked: Shelf, tmp_path: Path
) -> None:
    """Its row gets from the migration what a rebuild reads into a record without the new fields."""
    score = asked.score(asked.benchmark(asked.base.id, "old"), 0.5, "f" * 64).to_dict()
    for name in ("parts", "higher_is_better", "interval", "num_empty", "num_truncated", "device"):
        del score[name]
    for name in ("templated", "mean_prompt_tokens", "max_prompt_tokens"):
        del score[name]
    del score["spec"]["template"]
    spec = BenchmarkSpec.from_dict(score["spec"])
    record = Record("score", spec.id, {"id": spec.id, **score}, "r0", "2026-01-01T00:00:00Z")
    with memory() as connection:
        connection.execute(f"ATTACH {quoted(tmp_path / 'new.duckdb')} AS ledger")
        connection.execute("USE ledger")
        migrate(connection)
        offer_texts(connection, {"a" * 64: record.to_bytes()})
        add(connection)
        (new,) = connection.execute("FROM scores").fetchall()
        connection.execute("USE memory; DETACH ledger")

        connection.execute(f"ATTACH {quoted(tmp_path / 'old.duckdb')} AS ledger")
        connection.execute("USE ledger")
        name, sql = sources()[1]
        connection.execute(sql)
        digest = hashlib.sha256(sql.encode()).hexdigest()
        connection.execute("INSERT INTO migrations VALUES (1, ?, ?)", [name, digest])
        width = len(connection.execute("FROM scores").description or ())
        places = ", ".join("?" * width)
        connection.execute(f"INSERT INTO scores VALUES ({places})", new[:width])  # noqa: S608
        migrate(connection)
        assert connection.execute("FROM scores").fetchall() == [new]
    assert len(new) > width


def test_a_verdict_of_an_older_release_names_no_bases(shelf: Shelf) -> None:
    verdict = AdapterVerdict("x", "o/n@main", "o/n", "c" * 40, "accept").to_dict()
    del verdict["base_models"], verdict["downloads"]
    shelf.ledger.records.write(Record("adapter", "o/n", verdict, "r1", "2026-01-01T00:00:00Z"))
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT base_models FROM adapters").rows == [([],)]
