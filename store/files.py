"""Write files that are complete or absent, even after a crash; locks that end with their process.

A file becomes visible by a rename, after its bytes have reached the disk:

    temporary name ─▶ write ─▶ fsync ─▶ rename ─▶ fsync of the folder

A killed process leaves its files in a `tmp` folder, which `sweep` empties. Locks are `flock`s, and
need a local disk: several network file systems ignore them.
"""

import fcntl
import json
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from store.errors import BusyError, StoreError

T = TypeVar("T")

READ_ONLY = 0o444
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file, copy on write
CHUNK_BYTES = 1 << 20
STALE_SECONDS = 3600.0
"""A temporary file older than this counts as a leftover."""
HEX_DIGIT = "[0-9a-f]"
LOG = ".wal"
"""Ends the name of DuckDB's write-ahead log, which lies beside a database."""
PARTIAL = tuple(f"tmp/[0-9]*-{HEX_DIGIT * 16}{end}" for end in ("", LOG))
"""The paths of `partial_file`, as patterns: a home may lie in a folder whose `tmp` has others."""


@contextmanager
def partial_file(root: Path) -> Generator[Path]:
    """A path below `root` that no other writer uses, for a file, a folder or a database.

    It is removed when the block ends, unless `settle` has moved it; so is a database's log.

    Raises:
        StoreError: the disk is full, or the folder cannot be written to.
        OSError: of the block, about a file elsewhere, such as one that it reads.
    """
    partial = root / "tmp" / f"{os.getpid()}-{random.getrandbits(64):016x}"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        places = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        if places and not any(Path(name).is_relative_to(root) for name in places):
            raise
        raise StoreError(
            f"{root} cannot be written to ({error.strerror or error}); free some space or make it"
            " writable, then run again: what was recorded before is safe"
        ) from error
    finally:
        for path in (partial, partial.with_name(partial.name + LOG)):
            with suppress(StoreError):
                discard(path)


def write_whole(path: Path, data: bytes, *, root: Path) -> None:
    """Write `data` to `path`, below `root`; when this returns, it is on disk and read-only."""
    with partial_file(root) as partial:
        partial.write_bytes(data)
        settle(partial, path, root=root)


def replace_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file of text whole, in place of any older one; several writers may do so at once.

    On an error the older one stays. The mode is that of the new file, less the process's umask.
    """
    for left in leftovers(path.parent, [f".{escape(path.name)}.{HEX_DIGIT * 16}.partial"]):
        with suppress(OSError):
            left.unlink()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    partial.touch(mode, exist_ok=False)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_note(path: Path, read: Callable[[Any], T]) -> T | None:
    """What a small file of JSON holds; None if it is not there, damaged, or of another form."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return read(json.loads(path.read_bytes()))
    return None


def settle(partial: Path, path: Path, *, root: Path) -> None:
    """Move a written file to its name, so that it survives a crash from now on."""
    partial.chmod(READ_ONLY)
    os.utime(partial)  # new, even if it is a link to an old file: see `STALE_SECONDS`
    sync(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)  # atomic: a reader sees the complete file or none
    sync(path.parent)
    _secure(path.parent, root)


@cache
def _secure(folder: Path, root: Path) -> None:
    """Sync the parents of `folder` up to `root`, so that its name is on disk; once per process."""
    while folder != root.parent:
        folder = folder.parent
        sync(folder)


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    """Copy `source` to a new file; the two share extents if the file system can."""
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:  # another file system, or one that cannot
            shutil.copyfileobj(reader, writer, CHUNK_BYTES)


def size_of(path: Path, *, follow_symlinks: bool = True) -> int:
    """Bytes of a file, or of all files in a folder; of a link, those of its target or its own."""
    return sum(
        part.stat(follow_symlinks=follow_symlinks).st_size
        for part in (path, *path.rglob("*"))
        if part.is_file()
    )


def discard(path: Path) -> None:
    """Remove a file, or a folder and all in it, if it is there; `StoreError` if it cannot be."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{path} is not needed any more and cannot be removed ({error.strerror or error})"
        ) from error


def leftovers(root: Path, patterns: Iterable[str] = PARTIAL) -> list[Path]:
    """Leftovers of killed writers: paths of these patterns that have not changed for an hour."""
    oldest = time.time() - STALE_SECONDS
    stale = []
    for path in chain.from_iterable(map(root.glob, patterns)):
        with suppress(FileNotFoundError):  # its writer has just finished
            if all(part.lstat().st_mtime < oldest for part in (path, *path.rglob("*"))):
                stale.append(path)
    return stale


def sweep(root: Path) -> None:
    """Remove the leftovers below `root`, as far as possible."""
    for path in leftovers(root):
        with suppress(StoreError):
            discard(path)


@contextmanager
def locked(
    path: Path, *, deadline_seconds: float, shared: bool = False, message: str = ""
) -> Generator[None]:
    """Hold the lock file `path`.

    The kernel frees the lock when the process ends, however it ends: there are no stale locks.

    Args:
        shared: other shared locks may be held at the same time, but no exclusive one
        message: the beginning of the `BusyError`

    Raises:
        BusyError: the lock is not free within the deadline.
        StoreError: the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = os.O_RDONLY if shared else os.O_RDWR  # a reader may not have write permission
        descriptor = os.open(path, mode | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be opened ({error.strerror}), so the files beside it cannot be used"
        ) from error
    try:
        if not _waited(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, deadline_seconds):
            holder = os.pread(descriptor, 32, 0).decode()
            seen = f" (last seen: process id {holder})" if holder else ""
            why = f"{path.name} is held by another process{seen}; try again when it is done"
            raise BusyError(f"{message} ({why})" if message else why)
        if shared:
            yield
            return
        with suppress(OSError):  # only a hint for others: a full disk may refuse it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):  # else who holds it shared next would be taken for this one
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _waited(descriptor: int, operation: int, deadline_seconds: float) -> bool:
    """Wait for a lock; whether it is held then."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(random.uniform(0.005, 0.02))  # noqa: S311  (a pause, no secret)
        else:
            return True
