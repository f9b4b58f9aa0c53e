"""The database that all queries read. It stays open from one query to the next.

Opening it takes some ten times as long as looking a record up. When nobody asks for a while, it is
closed: an open file keeps its disk from being unmounted, and a deleted one keeps its room.
"""

import atexit
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from store.query import LIMITS, Limits, opened

IDLE_SECONDS = 5.0
"""Time after a query for which the file stays open."""


class _Rest(threading.Timer):
    """Closes the file when nobody has asked for a while."""


@atexit.register
def _end_rests() -> None:
    """A thread in which DuckDB closes a file while Python ends would abort the process."""
    for thread in threading.enumerate():
        if isinstance(thread, _Rest):
            thread.cancel()
            thread.join()


class SnapshotReader:
    """Gives connections to the snapshot at `path`, to any number of threads.

    The open file is no obstacle to a writer, who puts another one in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.Lock()
        self._key: tuple[object, ...] = ()
        self._database: duckdb.DuckDBPyConnection | None = None
        self._rest = _Rest(IDLE_SECONDS, self.close)

    def stamp(self) -> tuple[int, int, int] | None:
        """What changes with the file: inode, time of change in ns, size; None without a file."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    @contextmanager
    def reading(self, limits: Limits = LIMITS) -> Generator[duckdb.DuckDBPyConnection]:
        """A read-only, hardened connection to the snapshot; `duckdb.Error` if it cannot be read."""
        with self._connect(limits.memory_bytes) as connection:
            try:
                connection.execute("USE ledger")
                yield connection
            except BaseException:
                self.close()  # after some errors a database answers no query any more
                raise

    def close(self) -> None:
        """Let go of the file; the next query opens it again, and those that run now go on."""
        with self._turn:
            self._database = None

    def _connect(self, memory_bytes: int) -> duckdb.DuckDBPyConnection:
        with self._turn:
            key = (self.stamp(), memory_bytes)
            if self._database is None or key != self._key:
                self._database = None
                self._database, self._key = opened(self.path, memory_bytes), key
            self._rest.cancel()
            self._rest = _Rest(IDLE_SECONDS, self.close)
            self._rest.daemon = True  # a program that is done does not wait for it
            with suppress(RuntimeError):  # no more threads, as when Python ends: it stays open
                self._rest.start()
            return self._database.cursor()
