"""SQL queries on a connection that can only read the ledger.

This does not protect users from each other: a process may read everything that its user may read.
But SQL itself gets no files, no network, no extensions, no settings, and limited time, memory and
rows.
"""

import os
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb

from store.errors import DamagedError, QueryError

NO_EXTENSIONS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
MEMORY_BYTES = 4 << 30
"""Memory for an ingest, on a machine that also runs models; more data spills to disk."""
ROWS_AT_ONCE = 2_048
CELL_BYTES = 40
"""Of a number or an empty text in Python, and the pointer to it."""
QUESTIONS = ("SELECT", "EXPLAIN")
"""Kinds of statements that are allowed; FROM, WITH, DESCRIBE, SHOW, SUMMARIZE and VALUES are
SELECTs."""


@dataclass(frozen=True)
class Limits:
    """The most time, memory and rows of one query."""

    seconds: float = 60.0
    memory_bytes: int = 1 << 30
    rows: int = 1_000_000
    """Most rows of an answer; a query with more is an error."""


LIMITS = Limits()
"""The default limits."""


@dataclass(frozen=True)
class Answer:
    """The result of a query."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    @property
    def dicts(self) -> list[dict[str, Any]]:
        """Each row as a mapping from column to value."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def memory(spill: Path | None = None) -> duckdb.DuckDBPyConnection:
    """A new in-memory database, to which a ledger can be attached. No extension is installed.

    Args:
        spill: a new folder for data beyond `MEMORY_BYTES`; None: nothing spills, and DuckDB may use
            most of the machine's memory
    """
    # DuckDB's default is `.tmp` in the current folder, which is never emptied
    config = {**NO_EXTENSIONS, "temp_directory": str(spill or "")}
    if spill:
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        config["memory_limit"] = f"{min(MEMORY_BYTES, half) // 1024}KiB"
    return duckdb.connect(":memory:", config=config)


def quoted(path: Path) -> str:
    """A path as an SQL literal, for statements that take no parameters."""
    return "'" + str(path).replace("'", "''") + "'"


def opened(path: Path, memory_bytes: int) -> duckdb.DuckDBPyConnection:
    """A read-only, hardened connection to the database at `path`, attached as `ledger`."""
    connection = memory()
    try:
        connection.execute(f"ATTACH {quoted(path)} AS ledger (READ_ONLY)")
        connection.execute("USE ledger")
        harden(connection, memory_bytes)
    except BaseException:
        connection.close()
        raise
    return connection


def harden(connection: duckdb.DuckDBPyConnection, memory_bytes: int) -> None:
    """Limit a connection to this much memory, without further files, network or settings.

    Its time zone is that of the ledger's times, UTC: `now()` is compared with them.
    """
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute(f"SET memory_limit = '{memory_bytes // 1024}KiB'")
    connection.execute("SET max_temp_directory_size = '0KiB'")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def ask(connection: duckdb.DuckDBPyConnection, sql: str, limits: Limits) -> Answer:
    """Run one query within its limits.

    Raises:
        QueryError: it is not one SELECT, has an error, or runs past a limit.
        DamagedError: the database is damaged.
    """
    _check_is_one_question(connection, sql)
    timer = threading.Timer(limits.seconds, connection.interrupt)
    timer.start()
    try:
        answer = _answer(connection, sql, limits)
    except duckdb.InterruptException:
        raise QueryError(
            f"the query was stopped after {limits.seconds:g} s; narrow the question"
        ) from None
    except duckdb.OutOfMemoryException:
        raise QueryError(
            f"the query needs more than {limits.memory_bytes >> 20} MiB of memory; narrow the"
            " question"
        ) from None
    except duckdb.Error as error:
        if "Corrupt" in str(error):
            raise DamagedError(
                f"the index is damaged ({error}); rebuild it from the records"
            ) from None
        raise QueryError(str(error)) from None
    finally:
        timer.cancel()
    if len(answer.rows) > limits.rows:
        raise QueryError(f"the answer has more than {limits.rows:,} rows; add a LIMIT")
    return answer


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, limits: Limits) -> Answer:
    """Run a query in a thread: in the main thread, Ctrl-C may not stop it."""

    def work() -> Answer:
        result = connection.execute(sql)
        columns = tuple(column[0] for column in result.description or ())
        rows: list[tuple[Any, ...]] = []
        room = limits.memory_bytes
        while part := result.fetchmany(min(ROWS_AT_ONCE, limits.rows + 1 - len(rows))):
            room -= sum(map(_size, part))
            if room < 0:  # DuckDB's own limit does not count what Python holds
                raise duckdb.OutOfMemoryException
            rows += part
        return Answer(columns, rows)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(work)
        try:
            return answer.result()
        except KeyboardInterrupt:
            connection.interrupt()
            raise


def _size(cells: Collection[Any]) -> int:
    """Bytes of the cells of a row, with what is inside them; roughly, as it counts every row."""
    size = CELL_BYTES * len(cells)
    for cell in cells:
        kind = type(cell)
        if kind is str or kind is bytes:
            size += len(cell)
        elif kind in (list, tuple, dict):
            size += _size(cell.values() if kind is dict else cell)
    return size


def _check_is_one_question(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryError(str(error)) from None
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or kinds[0] not in QUESTIONS:
        raise QueryError(
            "one SELECT, FROM, DESCRIBE, SHOW or EXPLAIN is needed, not"
            f" {', '.join(kinds) or 'nothing'}"
        )


def examples() -> list[tuple[str, str]]:
    """The queries of `examples.sql`, each as (title, SQL)."""
    return titled(resources.files("store").joinpath("examples.sql").read_text(encoding="utf-8"))


def titled(text: str) -> list[tuple[str, str]]:
    """The queries of a file after its first paragraph, each as (title, SQL)."""
    blocks = (block.strip().partition("\n") for block in text.split("\n\n-- ")[1:])
    return [(title, sql) for title, _, sql in blocks]
