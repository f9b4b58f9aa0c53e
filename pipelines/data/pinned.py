"""Pin data sets of the Hub to a commit, and cache the rows that were read.

A branch moves; a commit does not. So rows are read at the present commit of a branch, and the rows
of a commit are cached beside the Hub's own files: a recipe that names a commit needs no network
again.

    HF_HOME/meteora/<hash of the request>.json
"""

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from ctypes import c_ulong, py_object, pythonapi
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants

from meteora.artifacts import COMMIT, canonical_sha256
from meteora.untrusted.findings import shortened
from store.files import read_note, replace_text

T = TypeVar("T")

SECONDS = 60.0
"""Time for the Hub to give a commit."""
READ_SECONDS = 1800.0
"""Time to read rows: at 500 kB a second, the least rate of other downloads, these are 900 MB."""
END_SECONDS = 5.0
"""Time for a reading that is given up to end."""


def pin(name: str, revision: str, token: str | None) -> str:
    """The present commit of a branch or a tag of a data set.

    Args:
        revision: empty for the branch `main`; a commit is returned without a request

    Returns:
        The commit; empty if a folder in the working folder has this name, which is read instead.

    Raises:
        Exception: one of the Hub's client, if there is no such data set or revision, or the Hub
            does not answer; `TimeoutError` after `SECONDS`, `ValueError` if its answer has no
            commit.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if Path(name).exists():
        return ""
    ask = partial(HfApi().dataset_info, name, revision=revision or None, token=token or False)
    commit = _in_time(ask, SECONDS).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise ValueError(f"it gave no commit: {shortened(commit)!r}")
    return commit


def cached_entries(
    asked: object,
    make: Callable[[], list[dict[str, Any]]],
    read: Callable[[dict[str, Any]], T],
    seconds: float | None = None,
) -> list[T]:
    """Read entries from the cache, or else from the Hub into the cache.

    Args:
        asked: everything that the entries depend on, as JSON
        make: reads the entries from the Hub, as JSON
        read: converts an entry; raises ValueError, TypeError or KeyError for a damaged one
        seconds: the time that `make` has; None: `READ_SECONDS`

    Raises:
        TimeoutError: `make` took longer.
    """
    folder = Path(constants.HF_HOME) / "meteora"
    path = folder / f"{canonical_sha256([constants.ENDPOINT, asked])}.json"
    known = read_note(path, lambda entries: [read(entry) for entry in entries])
    if known is not None:
        return known
    entries = _in_time(make, seconds or READ_SECONDS)
    with suppress(OSError):  # a cache that cannot be written is left out
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(entries), mode=0o600)  # rows may be of a private data set
    return [read(entry) for entry in entries]


def _in_time(ask: Callable[[], T], seconds: float) -> T:
    """What `ask` returns; TimeoutError if it takes longer, since a slow transfer has no limit."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    thread = Thread(target=work, daemon=True)  # given up, it does not keep Python from ending
    thread.start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"it was not done within {seconds:g} s") from None
    finally:
        if not answer.done():  # also at Ctrl-C
            _end(thread)


def _end(thread: Thread) -> None:
    """End a thread at its next step in Python: Arrow aborts a process that ends while it reads."""
    pythonapi.PyThreadState_SetAsyncExc(c_ulong(thread.ident or 0), py_object(SystemExit))
    thread.join(END_SECONDS)
