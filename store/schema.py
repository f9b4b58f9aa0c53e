"""Make tables and views from the numbered files of `migrations` and from `views.sql`."""

import hashlib
from importlib import resources

import duckdb

from store.errors import DamagedError, NewerLedgerError

EXPLAINED = ("leaderboard", "standings", "changes", "lineage")
"""Where the columns of views are explained that have no comment of their own, by their names."""


def sources() -> dict[int, tuple[str, str]]:
    """The files that make tables and views: (name, SQL) by number; `views.sql` has 0."""
    package = resources.files("store")
    files = sorted(package.joinpath("migrations").iterdir(), key=lambda file: file.name)
    return {
        number: (file.name, file.read_text(encoding="utf-8"))
        for number, file in enumerate((package.joinpath("views.sql"), *files))
    }


def schema() -> dict[int, str]:
    """The SHA-256 of each file by number, as in the table `migrations` of a current ledger."""
    return {number: _sha256(sql) for number, (_, sql) in sources().items()}


def migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """Bring tables and views up to date, in one transaction.

    Raises:
        NewerLedgerError: the ledger has a migration that this release does not know.
        DamagedError: the ledger was made with another version of a migration.
    """
    applied = _applied(connection)
    known = sources()
    if max(applied, default=0) > max(known):
        raise NewerLedgerError(
            f"ledger.duckdb has schema {max(applied)}, this release knows {max(known)}; upgrade,"
            " or move the file away: it is made again from the records"
        )
    new = [
        number
        for number in (*range(1, len(known)), 0)
        if applied.get(number) != _sha256(known[number][1])
    ]
    if altered := [number for number in new if number and number in applied]:
        raise DamagedError(f"ledger.duckdb was made by another {known[altered[0]][0]}")
    if new:
        connection.execute("BEGIN")
        for number in new:
            _apply(connection, number, *known[number])
        _explain(connection)
        # this release may understand records that were rejected
        connection.execute("DELETE FROM read_files WHERE EXISTS (FROM rejected)")
        connection.execute("DELETE FROM rejected")
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT ledger")  # a write-ahead log with DDL may fail to replay


def _applied(connection: duckdb.DuckDBPyConnection) -> dict[int, str]:
    tables = connection.execute(
        "SELECT 1 FROM duckdb_tables() WHERE database_name = 'ledger' AND table_name = 'migrations'"
    ).fetchall()
    if not tables:
        return {}
    return dict(connection.execute("SELECT number, sha256 FROM migrations").fetchall())


def _apply(connection: duckdb.DuckDBPyConnection, number: int, name: str, sql: str) -> None:
    connection.execute(sql)
    connection.execute("DELETE FROM migrations WHERE number = ?", [number])
    connection.execute("INSERT INTO migrations VALUES (?, ?, ?)", [number, name, _sha256(sql)])


def _explain(connection: duckdb.DuckDBPyConnection) -> None:
    """Give columns of views without a comment the first one of their name in `EXPLAINED`."""
    found = connection.execute(
        """
        SELECT bare.table_name, column_name,
               arg_min(said.comment, list_position($1, said.table_name))
        FROM duckdb_columns() AS bare JOIN duckdb_columns() AS said
             USING (database_name, column_name)
        WHERE database_name = current_database() AND bare.comment IS NULL
          AND said.comment IS NOT NULL AND list_contains($1, said.table_name)
        GROUP BY ALL
        """,
        [EXPLAINED],
    ).fetchall()
    for view, column, comment in found:
        text = comment.replace("'", "''")
        connection.execute(f"COMMENT ON COLUMN {view}.{column} IS '{text}'")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
