"""DuckDB as an index over the records: one writer at a time, and a snapshot for all readers.

    records ─ingest▶ ledger.duckdb ─copy, rename▶ ledger.snapshot.duckdb ◀─ everybody's questions

DuckDB lets one process write and then shuts out everybody else. So the writer holds the database
for one transaction, under a lock file, and readers open a copy that no one writes to. A committed
transaction whose write-ahead log is damaged can vanish without a word; here that loses nothing, for
a record that the index does not hold is simply pending again.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

import duckdb

from store.errors import BusyError, DamagedError, NewerLedgerError, StoreError
from store.files import copy, locked, partial_file, settle
from store.query import memory, quoted, reading
from store.schema import migrate, schema

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from store.records import Records

logger = logging.getLogger(__name__)

STORAGE_VERSION = "v1.4.0"  # what DuckDB 1.4, 1.5 and 2.x can all open
BATCH_RECORDS = 20_000
TURN_SECONDS = 0.05
CIRCUMSTANCES = (
    "Could not set lock on file",
    "No space left on device",
    "File too large",
    "Permission denied",
    "Read-only file system",
    "Too many open files",
)
"""Where DuckDB's error says one of these, the file is not to blame."""


@dataclass(frozen=True)
class Ingest:
    """What an ingest did."""

    num_records: int
    """Records that the index now holds and did not hold before."""
    num_waiting: int
    """Records that still wait."""
    reason: str = ""
    """Why they wait, a sentence; empty where all went well."""


class Index:
    """The two database files of a home, and the lock beside them."""

    def __init__(self, home: Path, records: Records) -> None:
        self.home = home
        self.live = home / "ledger.duckdb"
        self.snapshot = home / "ledger.snapshot.duckdb"
        self.lock = home / "ledger.lock"
        self._records = records
        self._stamp: tuple[int, int, int] | None = None
        self._known: frozenset[str] = frozenset()
        self._rejected: frozenset[str] = frozenset()
        self._schema: dict[int, str] = {}

    def known(self) -> frozenset[str] | None:
        """The records that the snapshot answers for; None where no snapshot can be read."""
        try:
            status = self.snapshot.stat()
        except FileNotFoundError:
            return None
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            rows = self.select(
                "SELECT 'known', sha256, NULL FROM records"
                " UNION ALL SELECT 'rejected', sha256, NULL FROM rejected"
                " UNION ALL SELECT 'schema', sha256, number FROM migrations",
                [],
            )
            if rows is None:
                return None
            self._known = frozenset(sha256 for what, sha256, _ in rows if what == "known")
            self._rejected = frozenset(sha256 for what, sha256, _ in rows if what == "rejected")
            self._schema = {number: sha256 for what, sha256, number in rows if what == "schema"}
            self._stamp = stamp
        return self._known

    def select(self, sql: str, parameters: list[object]) -> list[tuple] | None:
        """Rows of the snapshot; None where it cannot be read, and the records have to answer."""
        if not self.snapshot.exists():
            return None
        try:
            with reading(self.snapshot) as connection:
                return connection.execute(sql, parameters).fetchall()
        except duckdb.Error as error:
            logger.warning("%s cannot be read: %s", self.snapshot.name, error)
            return None

    def ingest(self, *, deadline_seconds: float) -> Ingest:
        """Bring the index up to date. Never raises: what cannot be ingested now waits."""
        try:
            return self._ingest_in_turn(deadline_seconds)
        except (StoreError, duckdb.Error, OSError) as error:
            waiting = len(self._records.sha256s() - (self.known() or frozenset()))
            logger.warning("%d records wait for the next ingest: %s", waiting, error)
            return Ingest(0, waiting, str(error))

    def rebuild(self, *, deadline_seconds: float) -> Ingest:
        """Make the index again from the records alone; the old one is set aside."""
        lock = locked(self.lock, deadline_seconds=deadline_seconds)
        with lock, partial_file(self.home) as fresh:
            num_records, _ = self.build(fresh, self._records.sha256s())
            if self.live.exists():
                self._set_aside("rebuilt")
            fresh.replace(self.live)
            self._publish()
        return Ingest(num_records, 0)

    def _ingest_in_turn(self, deadline_seconds: float) -> Ingest:
        """Ingest, or see it done by whoever holds the lock: one ingest serves all who wait."""
        names = self._records.sha256s()
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                with locked(self.lock, deadline_seconds=min(TURN_SECONDS, deadline_seconds)):
                    return self._ingest()
            except BusyError:
                if self._covers(names):
                    return Ingest(0, 0)
                if time.monotonic() >= deadline:
                    raise

    def _covers(self, names: set[str]) -> bool:
        """Whether readers have all these records, in the tables and views of this release."""
        known = self.known()
        current = self._schema == schema() and self.live.exists()
        return known is not None and current and names <= known | self._rejected

    def _ingest(self) -> Ingest:
        names = self._records.sha256s()
        if self._covers(names):
            return Ingest(0, 0)
        try:
            num_records, held = self.build(self.live, names)
        except (duckdb.Error, DamagedError) as error:
            text = str(error)
            ours = isinstance(error, duckdb.ProgrammingError)  # our SQL is wrong, not the file
            if ours or any(circumstance in text for circumstance in CIRCUMSTANCES):
                raise
            if "Trying to read a database file with version number" in text:
                raise NewerLedgerError(
                    f"{self.live} was written by a newer DuckDB than {duckdb.__version__}; upgrade"
                    " it, or move the file away: it is made again from the records"
                ) from None
            aside = self._set_aside("damaged")
            logger.warning(
                "%s could not be read (%s); it now lies at %s and is made again from the records",
                self.live.name,
                text,
                aside,
            )
            num_records, held = self.build(self.live, names)
        if not self._covers(held):
            self._publish()
        unread = len(names - held)
        reason = f"{unread} records cannot be read; `verify` names them" if unread else ""
        return Ingest(num_records, unread, reason)

    def build(self, database: Path, sha256s: Collection[str]) -> tuple[int, set[str]]:
        """Ingest those records that `database` lacks; leave it checkpointed and closed.

        Returns:
            How many records it lacked, and the SHA-256 of all that it has been given by now.
        """
        with memory() as connection:
            connection.execute(
                f"ATTACH {quoted(database)} AS ledger (STORAGE_VERSION '{STORAGE_VERSION}')"
            )
            connection.execute("USE ledger")
            migrate(connection)
            rows = connection.execute(
                "SELECT sha256 FROM records UNION ALL SELECT sha256 FROM rejected"
            ).fetchall()
            held = {sha256 for (sha256,) in rows}
            pending = sorted(set(sha256s) - held)
            num_records = 0
            for start in range(0, len(pending), BATCH_RECORDS):
                batch = self._texts(pending[start : start + BATCH_RECORDS])
                add(connection, batch)
                num_records += len(batch)
                held.update(sha256 for sha256, _ in batch)
            connection.execute("CHECKPOINT ledger")
            connection.execute("USE memory")
            connection.execute("DETACH ledger")
        return num_records, held

    def _texts(self, sha256s: Collection[str]) -> list[tuple[str, str]]:
        texts = []
        for sha256 in sha256s:
            try:
                texts.append((sha256, self._records.read_bytes(sha256).decode()))
            except DamagedError as error:
                logger.warning("left out of the index: %s", error)
        return texts

    def _publish(self) -> None:
        """Give readers the index as it is now. Those who have the old one open keep it."""
        with partial_file(self.home) as partial:
            copy(self.live, partial)
            wal(self.snapshot).unlink(missing_ok=True)  # somebody wrote to the old copy
            settle(partial, self.snapshot, root=self.home)

    def _set_aside(self, why: str) -> Path:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self.live.with_name(f"ledger.{why}-{moment}.duckdb")
        with suppress(FileNotFoundError):
            wal(self.live).replace(wal(aside))
        self.live.replace(aside)
        return aside


def wal(database: Path) -> Path:
    """Where DuckDB keeps what is committed but not yet in the database file."""
    return database.with_name(database.name + ".wal")


def add(connection: duckdb.DuckDBPyConnection, batch: list[tuple[str, str]]) -> None:
    """Ingest (sha256, text) pairs in one transaction.

    A record that the tables refuse is set down in `rejected`, and the others go on without it.
    """
    if not batch:
        return
    sha256s, texts = zip(*batch, strict=True)
    connection.execute("BEGIN")
    try:
        connection.execute(
            "CREATE OR REPLACE TEMP TABLE batch AS"
            " SELECT unnest($1::VARCHAR[]) AS sha256, unnest($2::VARCHAR[]) AS text",
            [sha256s, texts],
        )
        connection.execute(resources.files("store").joinpath("ingest.sql").read_text())
        connection.execute("COMMIT")
    except (duckdb.DataError, duckdb.IntegrityError, duckdb.ProgrammingError) as error:
        connection.execute("ROLLBACK")
        if len(batch) == 1:
            connection.execute("INSERT INTO rejected VALUES (?, ?)", [sha256s[0], str(error)])
            logger.warning("record %s is not understood: %s", sha256s[0][:12], error)
            return
        half = len(batch) // 2
        add(connection, batch[:half])
        add(connection, batch[half:])
