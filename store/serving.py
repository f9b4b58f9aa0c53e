"""Serve the index to people on other machines, with DuckDB's own server, Quack.

    people ─HTTP▶ one process that holds the snapshot open, read-only and hardened ◀ this home

Quack is an extension of DuckDB. It is loaded if it is installed, but never installed here. A new
snapshot starts a new server on the same address; clients have to attach again.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from store.errors import StoreError, brief
from store.query import NO_EXTENSIONS, harden
from store.snapshot import SnapshotReader

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Time between two looks for a new snapshot."""
MEMORY_BYTES = 2 << 30
"""Most memory of all clients' queries together."""


def serve(snapshot: Path, address: str, token: str) -> Iterator[str]:
    """Serve each snapshot until there is a newer one; yields the URL each time a server starts.

    Args:
        address: `quack:<host>:<port>`
        token: the secret that clients have to send

    Raises:
        StoreError: there is no Quack, no snapshot, or the address is taken.
    """
    reader = SnapshotReader(snapshot)
    while before := reader.stamp():
        with _serving(snapshot, address, token) as url:
            yield url
            while (now := reader.stamp()) == before:
                time.sleep(LOOK_SECONDS)
        if now:
            logger.info("%s is new: serving it", snapshot.name)
    raise StoreError(f"{snapshot} is not there; `meteora store rebuild` makes it")


@contextmanager
def _serving(snapshot: Path, address: str, token: str) -> Generator[str]:
    with duckdb.connect(str(snapshot), read_only=True, config=NO_EXTENSIONS) as connection:
        try:
            connection.execute("LOAD httpfs")  # without it every query gets status 500
            connection.execute("LOAD quack")
        except duckdb.Error as error:
            raise StoreError(
                f"DuckDB {duckdb.__version__} has no server here ({brief(error)}); install it"
                " once with `INSTALL httpfs; INSTALL quack` in DuckDB, which asks its repository"
            ) from None
        try:
            (started,) = connection.execute(
                "CALL quack_serve(?, token := ?)", [address, token]
            ).fetchall()
        except duckdb.Error as error:
            raise StoreError(f"{address} cannot be served ({brief(error)})") from None
        harden(connection, MEMORY_BYTES)
        try:
            yield str(started[1])
        finally:
            connection.execute("CALL quack_stop(?)", [address])
