"""Processes that use one home at the same time, or die in it; a line for each promise kept."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from store.ledger import Ledger
from tests.store.conftest import BASE, adapter, fused, router

if TYPE_CHECKING:
    from collections.abc import Callable

    from meteora.artifacts import ArtifactId, Spec


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def write(ledger: Ledger, first: int, count: int) -> None:
    """Record adapters `first` … `first + count - 1`, each followed by an ingest."""
    for number in range(first, first + count):
        began = time.monotonic()
        spec = adapter(number)
        blob = ledger.blobs.put_bytes(spec.id.encode())
        ledger.record_artifact(spec, weights_sha256=blob, blobs=[blob], run_id="w")
        outcome = ledger.ingest(deadline_seconds=30)
        say(spec.id, time.monotonic() - began, outcome.reason.replace("\n", " "))


def read(ledger: Ledger, seconds: float) -> None:
    """Count the artifacts again and again."""
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        ((count,),) = ledger.query("SELECT count(*) FROM artifacts").rows
        say(count, time.monotonic() - began)


def story(ledger: Ledger) -> None:
    """A run in small: everything is promised only once it has been said."""
    stack = fused(adapter(1))
    for spec in (BASE, adapter(1), stack, router(stack)):
        say(record(ledger, spec))
        ledger.ingest(deadline_seconds=5)
    ledger.pack()
    ledger.ingest(deadline_seconds=5)
    say(record(ledger, adapter(2)))
    ledger.pack()
    ledger.ingest(deadline_seconds=5)


def record(ledger: Ledger, spec: Spec) -> ArtifactId:
    blob = ledger.blobs.put_bytes(spec.id.encode())
    return ledger.record_artifact(spec, weights_sha256=blob, blobs=[blob], run_id="r")


def dying_at(step: int) -> Callable[..., None]:
    """Let the process end without a word at the `step`-th call that changes or secures a name."""
    left = step

    def watch(name: str) -> None:
        call = getattr(os, name)

        def watched(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*arguments, **named)

        setattr(os, name, watched)

    for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir", "chmod"):
        watch(name)
    return story


def main(task: str, home: str, *arguments: str) -> None:
    ledger = Ledger(Path(home))
    if task == "write":
        write(ledger, int(arguments[0]), int(arguments[1]))
    elif task == "read":
        read(ledger, float(arguments[0]))
    else:
        dying_at(int(arguments[0]))(ledger)


if __name__ == "__main__":
    main(*sys.argv[1:])
