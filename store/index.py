"""DuckDB as an index over the records: one writer at a time, and a snapshot for all readers.

    records ─ingest▶ ledger.duckdb ─copy, rename▶ ledger.snapshot.duckdb ◀─ all queries

While one process writes to a DuckDB file, no other can open it. So the writer opens the database
for one ingest, under a lock file, and readers open a copy that is never written to. DuckDB can lose
a committed transaction silently if its write-ahead log is damaged. No fact is lost then: a record
that is missing in the index is ingested again.
"""

import logging
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from store.errors import BusyError, DamagedError, NewerLedgerError, StoreError, brief
from store.files import LOG, copy, locked, partial_file, settle
from store.intake import add, count, offer, offer_texts, rank
from store.query import memory, quoted
from store.records import Records
from store.schema import migrate, schema
from store.segments import SUFFIX
from store.snapshot import SnapshotReader

logger = logging.getLogger(__name__)

STORAGE_VERSION = "v1.4.0"  # DuckDB 1.4, 1.5 and 2.x can all open it
BATCH_RECORDS = 20_000
"""Loose records that are ingested in one transaction."""
TURN_SECONDS = 0.05
"""Time to wait for the lock before checking whether another process has done the work."""
CIRCUMSTANCES = (
    "Could not set lock on file",
    "No space left on device",
    "File too large",
    "Permission denied",
    "Read-only file system",
    "Too many open files",
)
"""Parts of DuckDB's errors that do not mean that the file is damaged."""


@dataclass(frozen=True)
class Ingest:
    num_records: int
    """The number of records that are new in the index."""
    num_waiting: int
    """The number of record files that are not in the index yet."""
    reason: str = ""
    """Why they are not in the index, a sentence; empty if nothing went wrong."""


class Index:
    """The two database files of a home, and the lock beside them."""

    def __init__(self, home: Path, records: Records) -> None:
        self.home = home
        self.live = home / "ledger.duckdb"
        self.snapshot = home / "ledger.snapshot.duckdb"
        self.reader = SnapshotReader(self.snapshot)
        self.lock = home / "ledger.lock"
        self._records = records
        self._stamp: tuple[int, int, int] | None = None
        self._known: frozenset[str] = frozenset()
        self._rejected: frozenset[str] = frozenset()
        self._schema: dict[int, str] = {}

    def known(self) -> frozenset[str] | None:
        """The names of the record files in the snapshot; None if it cannot be read.

        The set is small even for a large store, since many packed records are one file.
        """
        stamp = self.reader.stamp()
        if stamp is None:
            return None
        if stamp != self._stamp:
            rows = self.select(
                "SELECT (SELECT list(name) FROM read_files), (SELECT list(sha256) FROM rejected),"
                " (SELECT map_from_entries(list((number, sha256))) FROM migrations)"
            )
            if rows is None:
                return None
            ((known, rejected, self._schema),) = rows
            self._known, self._rejected = frozenset(known or ()), frozenset(rejected or ())
            self._stamp = stamp
        return self._known

    def select(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple] | None:
        """Rows of the snapshot; None if it cannot be read: the caller then reads the records."""
        if not self.snapshot.exists():
            return None
        try:
            with self.reader.reading() as connection:
                return connection.execute(sql, parameters).fetchall()
        except duckdb.CatalogException:  # the first release had fewer tables; an ingest makes them
            return None
        except duckdb.Error as error:
            logger.warning("%s cannot be read: %s", self.snapshot.name, brief(error))
            return None

    def ingest(self, *, deadline_seconds: float) -> Ingest:
        """Bring the index up to date. Never raises: the next ingest tries again."""
        try:
            return self._ingest_in_turn(deadline_seconds)
        except (StoreError, duckdb.Error, OSError) as error:
            known = self.known()
            waiting = len(self._records.parts() - (known or frozenset()))
            if waiting:
                many = "1 record waits" if waiting == 1 else f"{waiting} records wait"
                logger.warning("%s for the next ingest: %s", many, error)
            elif known is not None and self._schema != schema():
                logger.warning(
                    "the index is that of another release, whose views may differ: %s", error
                )
            return Ingest(0, waiting, str(error))

    def rebuild(self, *, deadline_seconds: float) -> Ingest:
        """As `Ledger.rebuild`."""
        with locked(self.lock, deadline_seconds=deadline_seconds):
            names = self._records.parts()
            try:
                num_records, held, _ = self._replace("rebuilt", names)
            except duckdb.Error as error:
                raise StoreError(f"no index can be made now ({error}); the old one stays") from None
            self._publish()
        return _outcome(num_records, names - held)

    def _ingest_in_turn(self, deadline_seconds: float) -> Ingest:
        """Ingest, unless another process, which holds the lock, ingests these records meanwhile."""
        names = self._records.parts()
        first = not self.lock.exists() and not self.snapshot.exists()
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                with locked(self.lock, deadline_seconds=min(TURN_SECONDS, deadline_seconds)):
                    return self._ingest(first=first)
            except BusyError:
                if self._covers(names):
                    return Ingest(0, 0)
                if time.monotonic() >= deadline:
                    raise

    def _covers(self, names: set[str]) -> bool:
        """Whether the snapshot has all these files, in the tables and views of this release."""
        known = self.known()
        current = self._schema == schema() and self.live.exists()
        return known is not None and current and names <= known | self._rejected

    def _ingest(self, *, first: bool) -> Ingest:
        names = self._records.parts()
        if self._covers(names):
            return Ingest(0, 0)
        if not self.live.exists():
            if not first:
                logger.warning("%s is missing; it is made again from the records", self.live.name)
            wal(self.live).unlink(missing_ok=True)  # DuckDB 1.5 replays any log that is there
        try:
            num_records, held = self.build(self.live, names)
        except (duckdb.Error, DamagedError) as error:
            text = str(error)
            little_memory = isinstance(error, duckdb.OutOfMemoryException)
            if little_memory or any(circumstance in text for circumstance in CIRCUMSTANCES):
                raise
            if "Trying to read a database file with version number" in text:
                raise NewerLedgerError(
                    f"{self.live} was written by a newer DuckDB than {duckdb.__version__}; upgrade"
                    " it, or move the file away: it is made again from the records"
                ) from None
            num_records, held, aside = self._replace("damaged", names)
            logger.warning(
                "%s could not be read (%s); it now lies at %s and was made again from the records",
                self.live.name,
                text,
                aside,
            )
        if not self._covers(held):
            self._publish()
        return _outcome(num_records, names - held)

    def build(
        self, database: Path, names: Collection[str], *, room: Path | None = None
    ) -> tuple[int, set[str]]:
        """Ingest the record files that `database` lacks; leave it checkpointed and closed.

        Args:
            room: a folder for data that does not fit in memory; None: the home

        Returns:
            The number of new records, and the names of all files that are now ingested.
        """
        with partial_file(room or self.home) as spill, memory(spill) as connection:
            connection.execute(
                f"ATTACH {quoted(database)} AS ledger (STORAGE_VERSION '{STORAGE_VERSION}')"
            )
            connection.execute("USE ledger")
            migrate(connection)
            rows = connection.execute(
                "SELECT name FROM read_files UNION ALL SELECT sha256 FROM rejected"
            ).fetchall()
            held = {name for (name,) in rows}
            pending = sorted(set(names) - held)
            segments = [name for name in pending if name.endswith(SUFFIX)]
            loose = [name for name in pending if not name.endswith(SUFFIX)]
            before = count(connection)
            for name in segments:
                held.update(self._add_segment(connection, name))
            for start in range(0, len(loose), BATCH_RECORDS):
                held.update(self._add_loose(connection, loose[start : start + BATCH_RECORDS]))
            num_records = count(connection) - before
            rank(connection)
            connection.execute("CHECKPOINT ledger")
            connection.execute("USE memory")
            connection.execute("DETACH ledger")
        return num_records, held

    def _add_segment(self, connection: duckdb.DuckDBPyConnection, name: str) -> set[str]:
        """Ingest one segment, of at most `SEGMENT_RECORDS` records, in one transaction."""
        segments = self._records.segments
        try:
            segments.check(name)
        except DamagedError as error:
            logger.warning("left out of the index: %s", error)
            return set()
        offer(connection, f"read_parquet({quoted(segments.path_of(name))})", [])
        add(connection)
        connection.execute("INSERT INTO read_files VALUES (?)", [name])
        return {name}

    def _add_loose(self, connection: duckdb.DuckDBPyConnection, sha256s: list[str]) -> set[str]:
        texts, errors = self._records.read_all(sha256s)
        for error in errors.values():
            logger.warning("left out of the index: %s", error)
        offer_texts(connection, texts)
        add(connection)
        connection.execute(
            "INSERT INTO read_files"
            " SELECT unnest($1::VARCHAR[]) EXCEPT SELECT sha256 FROM rejected",
            [list(texts)],
        )
        return set(texts)

    def _publish(self) -> None:
        """Copy the index to the snapshot. Readers that have the old one open keep it."""
        with partial_file(self.home) as partial:
            copy(self.live, partial)
            wal(self.snapshot).unlink(missing_ok=True)  # left if a user wrote to the old copy
            self.reader.close()  # an open file takes room after another is in its place
            settle(partial, self.snapshot, root=self.home)

    def _replace(self, why: str, names: Collection[str]) -> tuple[int, set[str], Path | None]:
        """Make a new index, then set the old one aside; after an error the old one stays."""
        with partial_file(self.home) as fresh:
            num_records, held = self.build(fresh, names)
            aside = self._set_aside(why) if self.live.exists() else None
            wal(self.live).unlink(missing_ok=True)
            fresh.replace(self.live)
        return num_records, held, aside

    def _set_aside(self, why: str) -> Path:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self.live.with_name(f"ledger.{why}-{moment}.duckdb")
        with suppress(FileNotFoundError):
            wal(self.live).replace(wal(aside))
        self.live.replace(aside)
        return aside


def _outcome(num_records: int, unread: set[str]) -> Ingest:
    some = "1 record" if len(unread) == 1 else f"{len(unread)} records"
    reason = f"{some} cannot be read; `verify` names them" if unread else ""
    return Ingest(num_records, len(unread), reason)


def wal(database: Path) -> Path:
    """DuckDB's write-ahead log: transactions that are committed, but not in the file yet."""
    return database.with_name(database.name + LOG)
