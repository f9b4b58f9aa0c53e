"""The files of a repository at a commit: list them, check their sizes, download them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.hub.errors import HubDiskError, HubSizeError
from pipelines.hub.snapshot import ListedFile, check_file
from pipelines.workspace.console import growing
from pipelines.workspace.faults import NoSpaceError, require_space

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from meteora.artifacts import AdapterRef
    from pipelines.hub.client import Hub

MAX_ENTRIES = 2_000
MIN_BYTES_PER_SECOND = 500_000
"""A transfer with a lower average is given up."""


def list_folder(hub: Hub, ref: AdapterRef, folder: str) -> list[ListedFile]:
    """The entries of one folder at a commit; folders have the size -1."""
    what = f"{ref.repo_id} at {ref.revision[:12]}"
    entries = hub.ask(
        "listing", what, ref.repo_id, revision=ref.revision, folder=folder, most=MAX_ENTRIES + 1
    )
    if len(entries) > MAX_ENTRIES:
        raise HubSizeError(f"{what} holds more than {MAX_ENTRIES} files in one folder")
    return [ListedFile(**entry) for entry in entries]


def check_sizes(ref: AdapterRef, files: Sequence[ListedFile], limit_bytes: int) -> None:
    """Raise HubSizeError where the files are larger than the limit, in sum."""
    total = sum(file.size for file in files)
    if total > limit_bytes:
        raise HubSizeError(
            f"{ref.repo_id} at {ref.revision[:12]} has {total} bytes of files that are needed, and"
            f" {limit_bytes} are taken from the Hub; download it yourself, and give its folder"
        )


def fetch_files(hub: Hub, ref: AdapterRef, files: Sequence[ListedFile], into: Path) -> None:
    """Download files into an empty folder, and check their bytes against the listing.

    Raises:
        HubDiskError: The disk has no room for them; nothing was downloaded.
    """
    what = f"{ref.repo_id} at {ref.revision[:12]}"
    sizes = {file.path: file.size for file in files}
    try:
        require_space(into.parent, sum(sizes.values()), what)
    except NoSpaceError as error:
        raise HubDiskError(str(error)) from None
    patient = replace(
        hub, timeout_seconds=hub.timeout_seconds + sum(sizes.values()) / MIN_BYTES_PER_SECOND
    )
    with growing(f"downloading {ref.repo_id}", sum(sizes.values()), lambda: _bytes_in(into)):
        patient.ask("fetch", what, ref.repo_id, revision=ref.revision, files=sizes, into=str(into))
    shutil.rmtree(into / ".cache", ignore_errors=True)  # the client's notes
    for file in files:
        check_file(file, into, what)


def _bytes_in(folder: Path) -> int:
    """The size of what has arrived; files may come and go meanwhile."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def some_names(names: Sequence[str] | set[str]) -> str:
    """The first eight names that can be printed, for a message."""
    shown = [name for name in sorted(names) if name.isprintable()][:8]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "") or "nothing"
