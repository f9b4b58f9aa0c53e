"""Files under the SHA-256 of their bytes: `blobs/ab/cdef…`, read-only, written once."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from store.errors import MissingBlobError, StoreError
from store.files import copy, partial_file, settle, sha256_of, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A folder of blobs. Any number of processes may write and read at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, path: Path, *, move: bool = False) -> str:
        """Take a file in; return its SHA-256. When this returns, the blob is on disk.

        The file is copied (for nothing, where the file system can share extents) and stays as it
        is: a hard link would tie the blob to whatever its owner does to the file next. With `move`
        it is taken as it lies and is gone from `path`; nobody may still have it open for writing.
        """
        if not path.is_file():
            raise StoreError(f"{path} is no file, so it cannot be kept as a blob")
        with partial_file(self.root) as partial:
            if not (move and not path.is_symlink() and _linked(path, partial)):
                copy(path, partial)
            sha256 = sha256_of(partial)
            settle(partial, self._place(sha256), root=self.root)
        if move:
            path.unlink()
        return sha256

    def put_bytes(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        write_whole(self._place(sha256), data, root=self.root)
        return sha256

    def path_of(self, sha256: str) -> Path:
        """Where the blob lies; for reading only."""
        path = self._place(sha256)
        if not path.is_file():
            raise MissingBlobError(
                f"blob {sha256} does not lie in {self.root}; make it again, or take it back from a"
                " backup"
            )
        return path

    def give(self, sha256: str, target: Path) -> None:
        """Lay the blob at `target`, a new file: shared or hard-linked where the disk can.

        A hard link is read-only and shares its bytes with the blob: copy it before changing it.
        """
        source = self.path_of(sha256)
        if target.exists():
            raise StoreError(f"{target} exists; nothing is ever overwritten here")
        if not _linked(source, target):
            copy(source, target)

    def verify(self) -> Iterator[str]:
        """The SHA-256 by which each blob is named whose bytes hash to another one."""
        return (sha256 for sha256 in self if sha256_of(self._place(sha256)) != sha256)

    def __contains__(self, sha256: str) -> bool:
        return self._place(sha256).is_file()

    def __iter__(self) -> Iterator[str]:
        """The names of all blobs, in order."""
        for path in sorted(self.root.glob("[0-9a-f][0-9a-f]/*")):
            if SHA256.fullmatch(name := path.parent.name + path.name):
                yield name

    def _place(self, sha256: str) -> Path:
        if not SHA256.fullmatch(sha256):
            raise MissingBlobError(f"{sha256!r} names no blob: 64 hex digits are needed")
        return self.root / sha256[:2] / sha256[2:]


def _linked(path: Path, target: Path) -> bool:
    """Whether `target` now is the file at `path` under a second name."""
    try:
        target.hardlink_to(path)
    except OSError:  # another file system, or one that cannot
        return False
    return True
