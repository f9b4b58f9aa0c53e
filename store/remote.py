"""Storage that several homes share: S3, or any service with the same API.

    s3://bucket/prefix/records/ab/cdef….json
                       records/packed/….parquet
                       blobs/ab/cdef…

The layout is that of a home. Objects never change: a name is the hash of its bytes, and an object
is put only if its name is free (`If-None-Match: *`), or, in parts, after a look that finds none. It
appears when it is complete. So no writer can disturb a reader.
Credentials and endpoint are those of S3's own tools: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so
on, or the machine's role.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import StoreError, UnreachableError, brief
from store.files import partial_file, settle

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""Larger files are uploaded in parts of this size, one at a time, and appear complete."""
MOST_PARTS = 10_000
"""S3 takes no more for one object, so the parts of files beyond 80 GB are larger."""
STALL_SECONDS = 60.0
"""A part has to be uploaded in this time. A download may take longer, but not pause for so long."""
RETRY_SECONDS = 30.0
"""Time for which a request is repeated before the storage counts as unreachable."""
REQUEST = re.compile(r"Error performing [A-Z]+ (\w+://[^/\s]+).*? - ([^\n<]*)")
"""In an error: the server, and what went wrong; between them are the object's name and a time."""
REFUSAL = re.compile(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>")
"""In a storage's answer: why it refuses, such as a clock that is wrong."""
LATER = "what was recorded is safe on this machine, and the next ingest tries again to share it"
"""What happens to records of a home that shares them, if the storage cannot be reached."""


class Remote:
    """Objects below one URL, named like the files of a home.

    All methods raise `UnreachableError` if the storage does not answer, or refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import obstore  # noqa: PLC0415  (an extra: most homes lie on one machine)
            from obstore.store import MemoryStore, from_url  # noqa: PLC0415
        except ImportError:
            raise StoreError(
                f"{url} is reached through obstore: pip install 'meteora-pipelines[shared]'"
            ) from None
        self._obstore = obstore
        client: ClientConfig = {
            "connect_timeout": "5s",
            "read_timeout": timedelta(seconds=STALL_SECONDS),
            "timeout": timedelta(days=1),  # of a whole request: by default 30 s
            "allow_http": True,
        }
        retries: RetryConfig = {
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        }
        try:
            self._store = from_url(url, client_options=client, retry_config=retries)
        except (obstore.exceptions.BaseError, ValueError) as error:  # ValueError: it is no URL
            advice = "" if "://" in url else "; give an address such as s3://bucket/prefix"
            raise StoreError(
                f"{url} cannot be used as shared storage: {brief(error)}{advice}"
            ) from None
        if isinstance(self._store, MemoryStore):
            raise StoreError(
                f"{url} is the memory of this process, which no other one sees; give an address"
                " such as s3://bucket/prefix"
            )

    def prove(self) -> None:
        """Check that the storage refuses a second writer of a name.

        Raises:
            StoreError: it does not, so one home could overwrite an object that another one reads.
        """
        name = f"tmp/{secrets.token_hex(8)}"
        there = self._reached("nothing is shared there; check address, keys and network")
        with there, suppress(NotImplementedError):  # of an address such as https://…
            self._obstore.put(self._store, name, b"first", mode="create")
            try:
                self._obstore.put(self._store, name, b"second", mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return
            finally:
                self._obstore.delete(self._store, [name])
        raise StoreError(
            f"{self.url} ignores `If-None-Match`, so homes could overwrite each other's objects;"
            " use a storage with conditional puts"
        )

    def put(self, name: str, path: Path) -> None:
        """Upload a file as `name`; does nothing if the name exists."""
        size = path.stat().st_size
        if (large := size > PART_BYTES) and self.holds(name):
            return
        with self._reached(), suppress(self._obstore.exceptions.AlreadyExistsError):
            if large:
                part = max(PART_BYTES, -(-size // MOST_PARTS))
                self._obstore.put(self._store, name, path, chunk_size=part, max_concurrency=1)
            else:
                self._obstore.put(self._store, name, path, mode="create", use_multipart=False)

    def fetch(
        self,
        name: str,
        sha256: str,
        root: Path,
        is_sound: Callable[[Path], bool] = lambda _path: True,
    ) -> bool:
        """Download an object to its place below `root` in a home; False if damaged or not there.

        Args:
            is_sound: whether a file with these bytes is one of its kind; it has no name yet
        """
        with partial_file(root) as partial:
            downloaded_sha256 = self.get(name, partial)
            if downloaded_sha256 != sha256:
                if downloaded_sha256:
                    logger.warning("%s on %s does not hash to its name", name, self.url)
                return False
            if not is_sound(partial):
                logger.warning("%s on %s holds no records; remove it there", name, self.url)
                return False
            settle(partial, root.parent / name, root=root)
        return True

    def get(self, name: str, target: Path) -> str | None:
        """Download an object to `target`; return its SHA-256, or None if there is no object."""
        digest = hashlib.sha256()
        with self._reached():
            try:
                result = self._obstore.get(self._store, name)
            except FileNotFoundError:
                return None
            with target.open("wb") as file:
                for chunk in result.stream():
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    def holds(self, name: str) -> bool:
        """Whether there is an object with this name."""
        with self._reached():
            try:
                self._obstore.head(self._store, name)
            except FileNotFoundError:
                return False
        return True

    def names(self, folder: str) -> set[str]:
        """All names below a folder."""
        with self._reached():
            pages = self._obstore.list(self._store, prefix=folder)
            return {entry["path"] for page in pages for entry in page}

    def remove(self, names: Collection[str]) -> None:
        with self._reached():
            self._obstore.delete(self._store, sorted(names))

    @contextmanager
    def _reached(self, then: str = LATER) -> Generator[None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, FileNotFoundError, PermissionError) as error:
            raise UnreachableError(
                f"{self.url} cannot be used now ({_reason(error)}); {then}"
            ) from None


def _reason(error: Exception) -> str:
    """Why a request failed; the same for every request that fails so, and thus told once."""
    text = str(error)
    if (request := REQUEST.search(text)) is None:
        return brief(error)
    server, fault = request.groups()
    refusal = REFUSAL.search(text)
    parts = (server, fault.rstrip(": "), *(refusal.groups() if refusal else ()))
    return brief(Exception(": ".join(parts)))
