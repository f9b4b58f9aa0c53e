"""Files named by the SHA-256 of their bytes: `blobs/ab/cdef…`, read-only, written once.

If homes share a storage, a blob of another home is fetched when it is first used.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from meteora.artifacts import SHA256, file_sha256
from store.errors import DamagedError, MissingBlobError, StoreError, UnreachableError
from store.files import copy, discard, partial_file, settle, write_whole
from store.remote import Remote

logger = logging.getLogger(__name__)

CHEAP_BYTES = 1 << 20
"""Blobs up to this size (a millisecond of hashing) are checked whenever they are read."""


class Blobs:
    """A folder of blobs. Any number of processes may write and read at any time."""

    def __init__(self, root: Path, remote: Remote | None = None) -> None:
        self.root = root
        self._remote = remote
        self._shared: set[str] = set()

    def put(self, path: Path, *, move: bool = False) -> str:
        """Store a file; return its SHA-256. When this returns, the blob is on disk.

        The file is copied (at no cost, if the file system can share extents) and stays as it is. It
        is not hard-linked, since later changes to the file would change the blob. With `move` it is
        linked and removed from `path`; no process may still have it open for writing.

        Raises:
            StoreError: it is not a file, or the disk is full.
        """
        if not path.is_file():
            raise StoreError(f"{path} is not a file, so it cannot be stored as a blob")
        with partial_file(self.root) as partial:
            if not (move and not path.is_symlink() and _linked(path, partial)):
                copy(path, partial)
            os.utime(partial)  # a link has the age of its source, and old files are swept
            sha256 = file_sha256(partial)
            settle(partial, self.place_of(sha256), root=self.root)
        if move:
            discard(path)
        return sha256

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; return their SHA-256. When this returns, the blob is on disk."""
        sha256 = hashlib.sha256(data).hexdigest()
        write_whole(self.place_of(sha256), data, root=self.root)
        return sha256

    def path_of(self, sha256: str) -> Path:
        """The file of the blob, for reading only. A small file is hashed first.

        Raises:
            MissingBlobError: there is no such blob.
            DamagedError: its bytes have changed. Only `verify` checks large blobs.
        """
        path = self.place_of(sha256)
        if not path.is_file() and not self._fetched(sha256):
            raise MissingBlobError(
                f"blob {sha256} is not in {self.root}; run its recipe again, which makes experts"
                " and gates anew, or restore it from a backup"
            )
        if path.stat().st_size <= CHEAP_BYTES and file_sha256(path) != sha256:
            raise DamagedError(
                f"{path}: its bytes have changed since they were written; delete it and run"
                " its recipe again, which makes experts and gates anew, or restore it from a backup"
            )
        return path

    def give(self, sha256: str, target: Path) -> None:
        """Make `target` a hard link to the blob if possible, otherwise a copy.

        A hard link is read-only and shares its bytes with the blob: copy it before changing it.

        Raises:
            StoreError: `target` exists.
            MissingBlobError: there is no such blob.
            DamagedError: see `path_of`.
        """
        source = self.path_of(sha256)
        if target.exists():
            raise StoreError(f"{target} exists, and the store overwrites nothing")
        if not _linked(source, target):
            copy(source, target)

    def verify(self) -> Iterator[str]:
        """The names of all blobs whose bytes do not hash to their name."""
        return (sha256 for sha256 in self if file_sha256(self.place_of(sha256)) != sha256)

    def push(self, sha256: str) -> None:
        """Upload a blob to the shared storage, unless it is there."""
        if self._remote is None or sha256 in self._shared:
            return
        if not self._remote.holds(_name(sha256)):
            self._remote.put(_name(sha256), self.path_of(sha256))
        self._shared.add(sha256)

    def survey(self) -> set[str]:
        """List all blobs on the shared storage at once, which saves single look-ups later."""
        if self._remote is not None:
            names = self._remote.names("blobs")
            self._shared = {name.removeprefix("blobs/").replace("/", "") for name in names}
        return self._shared

    def __contains__(self, sha256: str) -> bool:
        if self.place_of(sha256).is_file() or sha256 in self._shared:
            return True
        try:
            return self._remote is not None and self._remote.holds(_name(sha256))
        except UnreachableError as error:
            logger.warning("blob %s counts as missing: %s", sha256[:12], error)
            return False

    def __iter__(self) -> Iterator[str]:
        """The names of all blobs on this disk, in order."""
        for path in sorted(self.root.glob("[0-9a-f][0-9a-f]/*")):
            if SHA256.fullmatch(name := path.parent.name + path.name) and path.is_file():
                yield name

    def _fetched(self, sha256: str) -> bool:
        """Download a blob from the shared storage; False if it is not there or damaged."""
        return self._remote is not None and self._remote.fetch(_name(sha256), sha256, self.root)

    def place_of(self, sha256: str) -> Path:
        """The path of a blob on this disk, whether or not it is there."""
        if not SHA256.fullmatch(sha256):
            raise MissingBlobError(f"{sha256!r} is not the name of a blob, which has 64 hex digits")
        return self.root / sha256[:2] / sha256[2:]


def _name(sha256: str) -> str:
    """The name of a blob on the shared storage."""
    return f"blobs/{sha256[:2]}/{sha256[2:]}"


def _linked(path: Path, target: Path) -> bool:
    """Make `target` a hard link to `path`; False if the file system cannot."""
    try:
        target.hardlink_to(path)
    except OSError:  # another file system, or one that cannot
        return False
    return True
