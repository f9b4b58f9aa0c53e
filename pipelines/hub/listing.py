"""The files of a repository at a commit: list them, check their sizes, download them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.hub.errors import HubDiskError, HubHashError, HubSizeError
from pipelines.hub.snapshot import ListedFile, fault_of
from pipelines.workspace.console import growing
from pipelines.workspace.faults import NoSpaceError, require_space

if TYPE_CHECKING:
    from meteora.artifacts import AdapterRef
    from pipelines.hub.client import Hub

MAX_ENTRIES = 2_000


def where(ref: AdapterRef) -> str:
    """A repository and its commit, for messages."""
    return f"{ref.repo_id} at {ref.revision[:12]}"


def list_folder(hub: Hub, ref: AdapterRef, folder: str) -> list[ListedFile]:
    """The entries of one folder at a commit; folders have the size -1."""
    asked = {"revision": ref.revision, "folder": folder, "most": MAX_ENTRIES + 1}
    entries = hub.ask("listing", ref.repo_id, where(ref), **asked)
    if len(entries) > MAX_ENTRIES:
        raise HubSizeError(f"{where(ref)} holds more than {MAX_ENTRIES} files in one folder")
    return [ListedFile(**entry) for entry in entries]


def check_sizes(ref: AdapterRef, files: Sequence[ListedFile], limit_bytes: int) -> None:
    """Raise HubSizeError if the files together are larger than the limit."""
    total = sum(file.size for file in files)
    if total > limit_bytes:
        raise HubSizeError(
            f"{where(ref)} has {total} bytes of files that are needed, and"
            f" {limit_bytes} are taken from the Hub; download it yourself, and give its folder"
        )


def check_room(
    ref: AdapterRef, num_bytes: int, folder: Path, instead: str = "give another --home"
) -> None:
    """Raise HubDiskError if the disk of a folder, which may not exist yet, has less left."""
    try:
        require_space(folder, num_bytes, where(ref), instead)
    except NoSpaceError as error:
        raise HubDiskError(str(error)) from None


def fetch_files(hub: Hub, ref: AdapterRef, files: Sequence[ListedFile], into: Path) -> None:
    """Download files into a folder that has none of them, and check their bytes.

    Raises:
        HubDiskError: The disk has no room for them; nothing was downloaded.
        HubHashError: The bytes are not those that the repository lists.
    """
    sizes = {file.path: file.size for file in files}
    num_bytes = sum(sizes.values())
    check_room(ref, num_bytes, into.parent)
    asked = {"revision": ref.revision, "files": sizes, "into": str(into)}
    before = _bytes_in(into)
    with growing(f"downloading {ref.repo_id}", num_bytes, lambda: _bytes_in(into) - before):
        hub.for_bytes(num_bytes).ask("fetch", ref.repo_id, where(ref), **asked)
    shutil.rmtree(into / ".cache", ignore_errors=True)  # the client's notes
    for file in files:
        if fault := fault_of(file, into):
            raise HubHashError(f"{where(ref)}: {file.path} {fault}; do not use this source")


def _bytes_in(folder: Path) -> int:
    """The bytes of all files in a folder; files may appear and disappear meanwhile."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes
