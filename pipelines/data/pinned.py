"""Pin data sets of the Hub to a commit, and cache the rows that were read.

A branch moves; a commit does not. So rows are read at the present commit of a branch, and the rows
of a commit are cached beside the Hub's own files: a recipe that names a commit needs no network
again.

    HF_HOME/meteora/<hash of the request>.json
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
"""Time for an answer of the Hub."""


def pin(name: str, revision: str, token: str | None) -> str:
    """The present commit of a branch or a tag of a data set.

    Args:
        revision: empty for the branch `main`; a commit is returned without a request

    Returns:
        The commit; empty if a folder in the working folder has this name, which is read instead.

    Raises:
        Exception: one of the Hub's client, if there is no such data set or revision, or the Hub
            does not answer; `ValueError` if its answer has no commit.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if Path(name).exists():
        return ""
    options: dict[str, Any] = {"revision": revision or None, "timeout": SECONDS}
    commit = HfApi().dataset_info(name, token=token or False, **options).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise ValueError(f"it gave no commit: {shortened(commit)!r}")
    return commit


def kept(
    asked: object, make: Callable[[], list[dict[str, Any]]], read: Callable[[dict[str, Any]], T]
) -> list[T]:
    """Read entries from the cache, or else from the Hub into the cache.

    Args:
        asked: everything that the entries depend on, as JSON
        make: reads the entries from the Hub, as JSON
        read: converts an entry; raises ValueError, TypeError or KeyError for a damaged one
    """
    folder = Path(constants.HF_HOME) / "meteora"
    path = folder / f"{canonical_sha256([constants.ENDPOINT, asked])}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return [read(entry) for entry in json.loads(path.read_bytes())]
    entries = make()
    with suppress(OSError):  # a cache that cannot be written is left out
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = Path(scratch) / path.name
            file.touch(mode=0o600)  # rows may be of a private data set
            file.write_text(json.dumps(entries))
            file.replace(path)
    return [read(entry) for entry in entries]
