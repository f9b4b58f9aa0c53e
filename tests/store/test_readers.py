"""People open the snapshot with the DuckDB that they have: an older one, a shell, a notebook."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from store.errors import StoreError
from store.ledger import Ledger
from store.serving import serve
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
    assert not got.returncode, f"no package index gives DuckDB {request.param}"
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
    before = len(rows(other, filled.ledger.index.snapshot)["artifacts"])
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
    assert len(rows(other, filled.ledger.index.snapshot)["artifacts"]) == before + 3


@pytest.mark.slow
@pytest.mark.parametrize("other", ["1.5.6"], indirect=True)  # older ones read, and cannot write
def test_the_index_goes_from_one_duckdb_to_another(filled: Shelf, other: Path) -> None:
    """What the oldest release writes that we support, this one goes on with, and the other way."""
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


SERVER = """
import sys
from pathlib import Path
import duckdb
from store.serving import serve
try:
    for url in serve(Path(sys.argv[1]), sys.argv[2], "a long enough token"):
        print(url, flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""
CLIENT = """
import sys
import duckdb
connection = duckdb.connect()
connection.execute("LOAD httpfs; LOAD quack")
connection.execute(f"CREATE SECRET (TYPE quack, TOKEN '{sys.argv[2]}')")
try:
    connection.execute(f"ATTACH '{sys.argv[1]}' AS ledger")
    print(connection.execute(sys.argv[3]).fetchall())
except duckdb.Error as error:
    print("refused", error)
"""


@pytest.fixture(scope="module")
def quack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose DuckDB has a server: of 1.5.5, the last one that came in wheels."""
    folder = tmp_path_factory.mktemp("quack") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = ("duckdb", "duckdb-extension-quack", "duckdb-extension-httpfs")
    wheels = [f"{name}==1.5.5" for name in wanted]
    install = [python, "-m", "pip", "install", "-q", "duckdb-extensions", *wheels]
    bring = (
        "import duckdb, duckdb_extensions as e; c = duckdb.connect();"
        "e.import_extension('httpfs', con=c); e.import_extension('quack', con=c)"
    )
    for command in (install, [python, "-c", bring]):
        subprocess.run(command, check=True)
    return python


@pytest.mark.slow
def test_many_ask_one_server_and_can_do_nothing_else(filled: Shelf, quack: Path) -> None:
    (artifacts,), (places,) = (
        filled.ledger.query(f"SELECT count(*) FROM {name}").rows[0]  # noqa: S608
        for name in ("artifacts", "leaderboard")
    )
    address = f"quack:localhost:{free_port()}"
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [quack, "-c", SERVER, filled.ledger.index.snapshot, address]

    def ask(sql: str, token: str = "a long enough token") -> str:  # noqa: S107
        asked = [quack, "-c", CLIENT, address, token, sql]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ours) as server:
        try:
            assert server.stdout
            assert server.stdout.readline().startswith("http://localhost:")
            count = "SELECT count(*) FROM ledger.artifacts"
            assert ask(count) == f"[({artifacts},)]"
            assert ask("SELECT count(*) FROM ledger.leaderboard") == f"[({places},)]"
            assert ask(count, "another token").startswith("refused")
            inside = "FROM quack_query('" + address + "', '{}')"
            for sql in (
                "DELETE FROM scores",
                "FROM read_text(''/etc/hostname'')",
                "ATTACH ''/tmp/x.duckdb''",
                "SET memory_limit = ''1TB''",
                "COPY scores TO ''/tmp/x.csv''",
            ):
                assert ask(inside.format(sql)).startswith("refused"), sql
            filled.make(filled.adapter(3))
            assert not filled.ledger.ingest().reason, "a server never stops a run"
            assert server.stdout.readline().startswith("http://localhost:")
            assert ask(count) == f"[({artifacts + 1},)]"
        finally:
            server.kill()


def test_a_duckdb_without_a_server_is_a_sentence(filled: Shelf) -> None:
    with pytest.raises(StoreError, match="INSTALL quack` in DuckDB"):
        next(serve(filled.ledger.index.snapshot, "quack:localhost:1", "t"))
    with pytest.raises(StoreError, match="is not there"):
        next(serve(filled.home / "nowhere.duckdb", "quack:localhost:1", "t"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
