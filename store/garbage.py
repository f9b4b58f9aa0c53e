"""Find files that nothing refers to any more, and note blobs that were deleted on purpose."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from meteora.artifacts import SHA256
from store.blobs import Blobs
from store.errors import DamagedError
from store.files import HEX_DIGIT, STALE_SECONDS, leftovers, replace_text, size_of
from store.records import Records

STOPPED = (
    f"bases/{HEX_DIGIT * 64}.partial",
    f"adapters/*/{HEX_DIGIT * 40}*.partial",
    f"adapters/*/.*.{HEX_DIGIT * 16}.partial",
    f"runs/{'[0-9]' * 8}T{'[0-9]' * 6}-{HEX_DIGIT * 8}",
    f"training/{HEX_DIGIT * 16}",
    f"answers/{HEX_DIGIT * 32}.jsonl",
)
"""Work of runs that were stopped; a run that needs it continues it. Only what has a name of ours:
whoever gives a project's folder as home may have other files in its `runs` or `training`."""
FREED = "freed.txt"
"""The file in a home that has the SHA-256 of each blob that was deleted to free its space."""
SHA256_IN_TEXT = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class Removable:
    """A file or a folder that can be removed; finding it does not remove it."""

    name: str
    """The SHA-256 of a blob; otherwise the path."""
    path: Path
    num_bytes: int


def find_garbage(home: Path, records: Records, blobs: Blobs) -> list[Removable]:
    """Blobs that no record mentions, then files; all at least an hour old.

    The files are leftovers of killed writers, work that was stopped, and databases that were set
    aside.

    Raises:
        DamagedError: a record cannot be read, so its blobs are not known.
    """
    oldest = time.time() - STALE_SECONDS
    unused = {sha256 for sha256 in blobs if blobs.place_of(sha256).stat().st_mtime < oldest}
    try:
        _leave_out_mentioned(unused, records)
    except DamagedError as error:
        raise DamagedError(
            f"{error}; blobs that it alone names then count as unused (`verify` names all such"
            " files)"
        ) from None
    aside = [*home.glob("ledger.damaged-*"), *home.glob("ledger.rebuilt-*")]
    files = [path for path in aside if path.stat().st_mtime < oldest]
    for root in (home, records.root, records.segments.root, blobs.root):
        files += leftovers(root)
    files += leftovers(home, STOPPED)
    found = [(sha256, blobs.place_of(sha256)) for sha256 in sorted(unused)]
    found += [(str(path), path) for path in files]
    return [Removable(name, path, size_of(path, follow_symlinks=False)) for name, path in found]


def _leave_out_mentioned(unused: set[str], records: Records) -> None:
    """Take the blobs that a record mentions out of a set of SHA-256s."""
    for sha256 in records.loose():
        unused.difference_update(
            match.decode() for match in SHA256_IN_TEXT.findall(records.read_bytes(sha256))
        )
    for name in records.segments.names():
        records.segments.check(name)
    unused -= records.segments.mentioned(unused)


def freed(home: Path, blobs: Blobs) -> set[str]:
    """The blobs that are not on this disk because somebody deleted them to free their space."""
    try:
        lines = (home / FREED).read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    return {one for one in lines if SHA256.fullmatch(one) and not blobs.place_of(one).is_file()}


def note_freed(home: Path, blobs: Blobs, sha256s: Iterable[str] = ()) -> None:
    """Note blobs that are about to be deleted; those that were made again are forgotten."""
    if names := freed(home, blobs).union(sha256s):
        replace_text(home / FREED, "".join(f"{sha256}\n" for sha256 in sorted(names)))
    else:
        (home / FREED).unlink(missing_ok=True)
