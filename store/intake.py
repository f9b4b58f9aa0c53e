"""Turn records into rows of the index, in one transaction; unreadable ones are set aside."""

import logging
import re
from functools import cache
from importlib import resources

import duckdb

from store.errors import brief

logger = logging.getLogger(__name__)

ORDERED_ROWS = 100_000
"""Up to this many rows, the leaderboard is stored in sorted order; sorting millions is slow."""
REFUSALS = (duckdb.DataError, duckdb.IntegrityError, duckdb.ProgrammingError, UnicodeDecodeError)
"""Errors about a record. The last one is of a message that quotes it and is cut in a character."""


def offer_texts(connection: duckdb.DuckDBPyConnection, texts: dict[str, bytes]) -> None:
    """Put these records, by their SHA-256, into the table that `add` reads."""
    offer(
        connection,
        "(SELECT unnest($1::VARCHAR[]) AS sha256, unnest($2::VARCHAR[]) AS text)",
        [list(texts), [text.decode() for text in texts.values()]],
    )


def offer(connection: duckdb.DuckDBPyConnection, source: str, parameters: list[object]) -> None:
    """Put records of `source` (sha256, text) that the index lacks into the table for `add`."""
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE offered AS"  # noqa: S608
        f" SELECT row_number() OVER () - 1 AS position, sha256, text FROM {source} AS source"
        " ANTI JOIN records USING (sha256) ANTI JOIN rejected USING (sha256)",
        parameters,
    )


def add(connection: duckdb.DuckDBPyConnection, start: int = 0, end: int | None = None) -> None:
    """Ingest the offered records from `start` to `end` in one transaction.

    A record that the tables refuse goes to `rejected`; the others are ingested without it.
    """
    if end is None:
        end = connection.table("offered").shape[0]
    if start == end:
        return
    connection.execute("BEGIN")
    try:
        connection.execute(
            "CREATE OR REPLACE TEMP TABLE batch AS"
            " SELECT sha256, text FROM offered WHERE position >= $1 AND position < $2",
            [start, end],
        )
        for needed, statements in _parts_of_ingest():
            if not needed or connection.execute(f"SELECT 1 FROM {needed} LIMIT 1").fetchall():  # noqa: S608
                connection.execute(statements)
        connection.execute("COMMIT")
    except REFUSALS as error:
        connection.execute("ROLLBACK")
        if end - start == 1:
            _reject(connection, start, brief(error))
            return
        middle = (start + end) // 2
        add(connection, start, middle)
        add(connection, middle, end)


@cache
def _parts_of_ingest() -> list[tuple[str, str]]:
    """The parts of `ingest.sql`: the rows without which one does nothing, or "", and its SQL.

    Planning a statement takes a millisecond, also where it finds nothing to insert.
    """
    text = resources.files("store").joinpath("ingest.sql").read_text(encoding="utf-8")
    first, *others = re.split(r"^-- (?:IF ANY: (.+)|ALWAYS)\n", text, flags=re.MULTILINE)
    return [("", first), *zip((one or "" for one in others[::2]), others[1::2], strict=True)]


def rank(connection: duckdb.DuckDBPyConnection) -> None:
    """Update leaderboard and regressions, after all records are added."""
    if not connection.execute("SELECT 1 FROM unsettled LIMIT 1").fetchall():
        return
    connection.execute("BEGIN")
    connection.execute(resources.files("store").joinpath("rank.sql").read_text(encoding="utf-8"))
    few = connection.table("placed").shape[0] <= ORDERED_ROWS
    order = " ORDER BY task, metric, place, subject_id" if few else ""
    connection.execute(f"INSERT INTO leaderboard_rows BY NAME FROM ranked{order}")
    connection.execute("COMMIT")


def _reject(connection: duckdb.DuckDBPyConnection, position: int, reason: str) -> None:
    rows = connection.execute(
        "INSERT INTO rejected SELECT sha256, $2 FROM offered WHERE position = $1 RETURNING sha256",
        [position, reason],
    ).fetchall()
    for (sha256,) in rows:
        logger.warning("record %s cannot be read into the tables: %s", sha256[:12], reason)


def count(connection: duckdb.DuckDBPyConnection) -> int:
    """The number of records in the index, rejected ones included."""
    ((records, rejected),) = connection.execute(
        "SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM rejected)"
    ).fetchall()
    return records + rejected
