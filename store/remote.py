"""Storage that several homes share: S3, or whatever speaks its language.

    s3://bucket/prefix/records/ab/cdef….json
                       records/packed/….parquet
                       blobs/ab/cdef…

The layout is that of a home. Nothing there is ever changed: a name is the hash of what it holds,
and it is only given to an object that is not there yet (`If-None-Match: *`), whole, so nobody can
tear what another one reads. Credentials and endpoint come from where S3's own tools take them:
`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so on, or the machine's role.
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from store.errors import StoreError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Collection, Generator
    from pathlib import Path

    from obstore.store import ClientConfig, RetryConfig

SINGLE_PUT_BYTES = 1 << 30
"""Below S3's limit for one request; what is larger goes up in parts, and appears whole."""
RETRY_SECONDS = 30.0


class Remote:
    """Objects below one URL, by the names that files have in a home."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import obstore  # noqa: PLC0415  (an extra: most homes lie on one machine)
            from obstore.store import from_url  # noqa: PLC0415
        except ImportError:
            raise StoreError(
                f"{url} is reached through obstore: pip install 'meteora-pipelines[shared]'"
            ) from None
        self._obstore = obstore
        client: ClientConfig = {"connect_timeout": "5s", "allow_http": True}
        retries: RetryConfig = {
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        }
        try:
            self._store = from_url(url, client_options=client, retry_config=retries)
        except obstore.exceptions.BaseError as error:
            raise StoreError(f"{url} is no storage that can be shared: {_brief(error)}") from None

    def prove(self) -> None:
        """Try whether a second writer of a name is refused.

        Raises:
            StoreError: it is not, so one home could overwrite what another one reads.
            UnreachableError: the storage does not answer, or refuses.
        """
        name = f"tmp/{secrets.token_hex(8)}"
        with self._reached():
            self._obstore.put(self._store, name, b"first", mode="create")
            try:
                self._obstore.put(self._store, name, b"second", mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return
            finally:
                self._obstore.delete(self._store, [name])
        raise StoreError(
            f"{self.url} ignores `If-None-Match`, so homes could overwrite each other's objects;"
            " take a storage that has conditional puts"
        )

    def put(self, name: str, path: Path) -> None:
        """Give `name` to the bytes of a file; does nothing where it is given already.

        Raises:
            UnreachableError: the storage does not answer, or refuses.
        """
        size = path.stat().st_size
        with self._reached():
            if size > SINGLE_PUT_BYTES:
                if not self.holds(name):
                    self._obstore.put(self._store, name, path)
                return
            try:
                self._obstore.put(self._store, name, path, mode="create", use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return

    def get(self, name: str, target: Path) -> str | None:
        """Lay an object's bytes at `target`; return their SHA-256, None where there is no object.

        Raises:
            UnreachableError: the storage does not answer, or refuses.
        """
        digest = hashlib.sha256()
        with self._reached():
            try:
                found = self._obstore.get(self._store, name)
            except FileNotFoundError:
                return None
            with target.open("wb") as file:
                for chunk in found.stream():
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    def holds(self, name: str) -> bool:
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
    def _reached(self) -> Generator[None, None, None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, FileNotFoundError, PermissionError) as error:
            raise UnreachableError(
                f"{self.url} cannot be used now ({_brief(error)}); what was recorded is safe on"
                " this machine, and is shared by the next ingest that can"
            ) from None


def _brief(error: Exception) -> str:
    """The first line: the rest shows how the library saw it."""
    return str(error).partition("\n")[0]
