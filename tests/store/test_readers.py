"""People open the snapshot with the DuckDB that they have: an older one, a shell, a notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pytest

from store.ledger import Ledger

if TYPE_CHECKING:
    from tests.store.conftest import Shelf

ROOT = Path(__file__).parents[2]
OLDER = ["1.4.5", "1.5.6"]
ROWS = """
import duckdb, json, sys
connection = duckdb.connect(sys.argv[1], read_only=True)
names = connection.execute("SELECT DISTINCT name FROM dictionary ORDER BY ALL").fetchall()
for (name,) in names:
    print(json.dumps([name, sorted(map(repr, connection.table(name).fetchall()))]), flush=True)
print(json.dumps([duckdb.__version__, []]), flush=True)
sys.stdin.read()
"""
INGEST = """
import sys
from pathlib import Path
from store.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
assert not ledger.ingest().reason
assert not ledger.verify().findings
"""


def rows(python: Path, snapshot: Path) -> dict[str, list[str]]:
    """What an interpreter's DuckDB reads in every table and view, and its version."""
    told = subprocess.run(
        [python, "-c", ROWS, snapshot], capture_output=True, text=True, check=True, input=""
    )
    return dict(json.loads(line) for line in told.stdout.splitlines())


@pytest.fixture(scope="module", params=OLDER)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with an older DuckDB and nothing else."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    got = subprocess.run(
        [python, "-m", "pip", "install", "-q", f"duckdb=={request.param}"], check=False
    )
    if got.returncode:
        pytest.skip(f"no package index gives DuckDB {request.param}")
    return python


@pytest.mark.slow
def test_an_older_duckdb_reads_every_row(filled: Shelf, other: Path) -> None:
    mine = rows(Path(sys.executable), filled.ledger.index.snapshot)
    theirs = rows(other, filled.ledger.index.snapshot)
    versions = {name for name in (*mine, *theirs) if name[0].isdigit()}
    assert duckdb.__version__ in versions
    for name in mine.keys() - versions:
        assert theirs[name] == mine[name], name


@pytest.mark.slow
def test_an_older_notebook_never_stops_a_run(filled: Shelf, other: Path) -> None:
    with subprocess.Popen(
        [other, "-c", ROWS, filled.ledger.index.snapshot],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as notebook:
        assert notebook.stdout
        while not json.loads(notebook.stdout.readline())[0][0].isdigit():
            pass  # it has read everything and holds the file open
        for number in range(3, 6):
            filled.make(filled.adapter(number))
            assert not filled.ledger.ingest().reason
        assert notebook.poll() is None
        notebook.communicate(b"")
    assert len(rows(other, filled.ledger.index.snapshot)["artifacts"]) == 14


@pytest.mark.slow
def test_the_index_goes_from_one_duckdb_to_another(filled: Shelf, other: Path) -> None:
    """What the oldest release writes that we support, this one goes on with, and the other way."""
    if _version(other) < (1, 5, 6):
        pytest.skip("this one reads, and is too old to write")
    before = filled.views()
    for path in filled.home.glob("ledger.*"):
        path.unlink()
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in range(3, 7):
        if number % 2:
            subprocess.run([other, "-c", INGEST, filled.home], env=ours, check=True, cwd=ROOT)
        else:
            assert not Ledger(filled.home).ingest().reason
        filled.make(filled.adapter(number))
    filled.ledger = Ledger(filled.home)
    assert filled.ledger.ingest().num_records == 1
    assert not filled.ledger.verify().findings
    after = filled.views()
    assert len(after["artifacts"]) == len(before["artifacts"]) + 4
    assert after["leaderboard"] == before["leaderboard"]


def _version(python: Path) -> tuple[int, ...]:
    told = subprocess.run(
        [python, "-c", "import duckdb; print(duckdb.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(map(int, told.stdout.strip().split(".")))
