"""A folder with files of one commit: whole or absent, every file as the repository lists it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from meteora.artifacts import file_sha256
from pipelines.hub.errors import HubTimeoutError
from store.errors import BusyError
from store.files import locked as hold
from store.files import read_note, replace_text, sync


@dataclass(frozen=True)
class ListedFile:
    """A file as the Hub lists it: large ones have a SHA-256, others only a git blob id."""

    path: str
    size: int
    git_sha1: str
    sha256: str


def cached(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """A file in the cache of the Hub's own client, or None; without the network.

    Without a revision it is that of `main`, as of the last download.
    """
    found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fault_of(file: ListedFile, folder: Path) -> str:
    """How a file differs from its listing; empty if not. The client compares only the size."""
    path = folder / file.path
    if not path.is_file() or path.is_symlink():
        return "is not a file"
    if (size := path.stat().st_size) != file.size:
        return f"has {size} bytes, and the repository lists {file.size}"
    if file_sha256(path) != file.sha256 if file.sha256 else git_sha1(path) != file.git_sha1:
        return "does not hold the bytes that the repository lists"
    return ""


def git_sha1(path: Path) -> str:
    """The hash by which git, and so the Hub, names the bytes of a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()


def has_size(file: ListedFile, folder: Path) -> bool:
    """Whether a folder has a file of this name and length; its bytes are not read."""
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.size


def keep_whole(files: Sequence[ListedFile], folder: Path) -> list[ListedFile]:
    """Remove all from a folder but complete files; return the files that are still missing."""
    left = [file for file in files if fault_of(file, folder)]
    whole = {file.path for file in files} - {file.path for file in left}
    for path in folder.iterdir():
        if path.name not in whole:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return left


@contextmanager
def locked(folder: Path, timeout_seconds: float) -> Generator[None]:
    """Hold the lock of a snapshot's folder, so only one process downloads it."""
    lock = folder.with_name(f"{folder.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(hold(lock, deadline_seconds=timeout_seconds))
        except BusyError:
            raise HubTimeoutError(
                f"{folder}: another process has been downloading it for {timeout_seconds:g} s; wait"
                " for it, or end it"
            ) from None
        yield


def read_manifest(folder: Path) -> list[ListedFile] | None:
    """The files of a snapshot's folder, by its note; None without a folder or a readable note."""
    if not folder.is_dir():
        return None
    manifest = folder.with_name(f"{folder.name}.json")
    return read_note(manifest, lambda entries: [ListedFile(**entry) for entry in entries])


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """An empty folder beside a snapshot's; files of an earlier process in it are removed."""
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_note(path: Path, text: str) -> None:
    """Write a small file, by `replace_text`, in a folder that is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def put_in_place(staged: Path, folder: Path, files: Sequence[ListedFile]) -> None:
    """Give a snapshot's folder its name; its note is written first, and counts only with it.

    The bytes are on the disk before that, so a power cut leaves none of them in part.
    """
    for path in (*(staged / file.path for file in files), staged):
        sync(path)
    manifest = folder.with_name(f"{folder.name}.json")
    write_note(manifest, json.dumps([asdict(file) for file in files], indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    sync(folder.parent)
