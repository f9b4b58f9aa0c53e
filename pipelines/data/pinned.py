"""Ask for data sets of the Hub in a process of its own, pin them to a commit, and cache their rows.

A data set may be a stranger's: a small file can hold one row of gigabytes, a server may never end.
A branch moves; a commit does not. So rows are read at the present commit of a branch, and the rows
of a commit are cached beside the Hub's own files: a recipe that names a commit needs no network
again.

    HF_HOME/meteora/<hash of the request>.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from httpx2 import TransportError  # what huggingface_hub speaks HTTP with
from huggingface_hub import HfApi, constants

from meteora.artifacts import COMMIT, canonical_sha256
from meteora.untrusted.findings import brief, causes, shortened
from pipelines.data.rows import ExamplesError
from pipelines.processes import isolated
from pipelines.processes.child import ChildDiedError, ChildError, ChildTimeoutError
from store.files import read_note, replace_text

T = TypeVar("T")

SECONDS = 60.0
"""Time for the Hub to give a commit."""
READ_SECONDS = 1800.0
"""Time to read rows: at 500 kB a second, the least rate of other downloads, these are 900 MB."""


class DataSetError(Exception):
    """A data set of the Hub cannot be read; the message is a clause that says why."""

    def __init__(self, why: str, *, is_fault_of_hub: bool = False, is_hidden: bool = False) -> None:
        super().__init__(why)
        self.is_fault_of_hub = is_fault_of_hub
        """The Hub was not reached, or had a fault of its own: no verdict on a data set."""
        self.is_hidden = is_hidden
        """It may be gated or private."""


def ask(function: FunctionType, *arguments: object, seconds: float | None = None) -> Any:  # noqa: ANN401
    """What a function returns that asks the Hub for a data set, and reads it.

    Args:
        function: as `isolated.call` takes it
        seconds: the time that it has; None: `READ_SECONDS`

    Raises:
        ExamplesError: the function raised it, since the rows are not as they are asked for.
        DataSetError: it raised another error, took longer, or needed too much memory.
    """
    seconds = READ_SECONDS if seconds is None else seconds
    try:
        return isolated.call(function, *arguments, seconds=seconds, describe=_describe)
    except ChildTimeoutError:
        late = f"it was not done within {seconds:g} s"
        raise DataSetError(late, is_fault_of_hub=True) from None
    except ChildDiedError as error:
        raise DataSetError(str(error)) from None
    except ChildError as error:
        (told,) = error.args
        if (refusal := told.pop("refusal", None)) is not None:
            raise ExamplesError(refusal) from None
        raise DataSetError(**told) from None


def _describe(error: Exception) -> dict[str, Any]:
    """The message of an `ExamplesError`, or else the arguments of a `DataSetError`."""
    if isinstance(error, ExamplesError):
        return {"refusal": str(error)}
    chain = [*_with_status(error)]
    transient = (ConnectionError, TimeoutError, TransportError)
    why = "it needs more memory than it may take" if isinstance(error, MemoryError) else ""
    return {
        "why": why or brief(error),
        "is_fault_of_hub": any(
            isinstance(one, transient) or status == 429 or status >= 500 for one, status in chain
        ),
        "is_hidden": any(
            status in (401, 403) or type(one).__name__ == "DatasetNotFoundError"  # of `datasets`
            for one, status in chain
        ),
    }


def _with_status(error: BaseException | None) -> Iterator[tuple[BaseException, int]]:
    """An error and its causes, each with the HTTP status of its answer, or 0."""
    for one in causes(error, hidden=True):  # `datasets` hides what it met on the Hub
        yield one, getattr(getattr(one, "response", None), "status_code", 0)


def pin(name: str, revision: str, token: str | None) -> str:
    """The present commit of a branch or a tag of a data set.

    Args:
        revision: empty for the branch `main`; a commit is returned without a request

    Returns:
        The commit; empty if a folder in the working folder has this name, which is read instead.

    Raises:
        DataSetError: there is no such data set or revision, or the Hub does not answer.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if Path(name).exists():
        return ""
    return ask(present_commit, name, revision, token, seconds=SECONDS)


def present_commit(name: str, revision: str, token: str | None) -> str:
    """The commit that the Hub gives; ValueError if its answer has none."""
    commit = HfApi().dataset_info(name, revision=revision or None, token=token or False).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise ValueError(f"it gave no commit: {shortened(commit)!r}")
    return commit


def cached_entries(
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
    known = read_note(path, lambda entries: [read(entry) for entry in entries])
    if known is not None:
        return known
    entries = make()
    with suppress(OSError):  # a cache that cannot be written is left out
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(entries), mode=0o600)  # rows may be of a private data set
    return [read(entry) for entry in entries]
