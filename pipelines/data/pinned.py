"""Data sets of the Hub at one commit, and what was read of them.

A branch moves; a commit does not. So rows are read at the commit that a branch means now, and what
was read of a commit is kept beside the Hub's own files: a recipe that names a commit needs no
network again.

    HF_HOME/meteora/<hash of what was asked>.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants

from meteora.artifacts import COMMIT, canonical_sha256
from meteora.untrusted.findings import shortened

T = TypeVar("T")

SECONDS = 60.0
"""For an answer of the Hub."""


def pin(name: str, revision: str, token: str | None) -> str:
    """The commit that a branch or a tag of a data set means now.

    Args:
        revision: empty for the branch `main`; a commit is itself, and nobody is asked

    Returns:
        The commit; empty where the name is that of a folder here, which is read in its place.

    Raises:
        Exception: one of the Hub's client, where there is no such data set or revision, or the Hub
            does not answer; `ValueError` where it gives no commit.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if Path(name).exists():
        return ""
    asked: dict[str, Any] = {"revision": revision or None, "timeout": SECONDS}
    commit = HfApi().dataset_info(name, token=token or False, **asked).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise ValueError(f"it gave no commit: {shortened(commit)!r}")
    return commit


def kept(
    asked: object, make: Callable[[], list[dict[str, Any]]], read: Callable[[dict[str, Any]], T]
) -> list[T]:
    """What was read of a commit before, or what is read now.

    Args:
        asked: everything that decides what is read, as JSON
        make: reads it from the Hub, as JSON
        read: makes of an entry what is wanted; raises ValueError, TypeError or KeyError for one
            that is damaged
    """
    folder = Path(constants.HF_HOME) / "meteora"
    path = folder / f"{canonical_sha256([constants.ENDPOINT, asked])}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return [read(entry) for entry in json.loads(path.read_bytes())]
    found = make()
    with suppress(OSError):  # a cache that cannot be written to is none
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = Path(scratch) / path.name
            file.touch(mode=0o600)  # rows may be of a private data set
            file.write_text(json.dumps(found))
            file.replace(path)
    return [read(entry) for entry in found]
