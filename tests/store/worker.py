"""Processes that use one home at the same time; a line for each promise kept."""

import sys
import time
from pathlib import Path

from meteora.artifacts import ArtifactId, Spec
from store.ledger import Ledger
from tests.store.conftest import adapter


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def write(ledger: Ledger, first: int, count: int) -> None:
    """Record adapters `first` … `first + count - 1`, each followed by an ingest."""
    for number in range(first, first + count):
        began = time.monotonic()
        artifact_id = record(ledger, adapter(number))
        outcome = ledger.ingest(deadline_seconds=30)
        say(artifact_id, time.monotonic() - began, outcome.reason.replace("\n", " "))


def read(ledger: Ledger, seconds: float) -> None:
    """Count the artifacts again and again."""
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        ((count,),) = ledger.query("SELECT count(*) FROM artifacts").rows
        say(count, time.monotonic() - began)


def record(ledger: Ledger, spec: Spec) -> ArtifactId:
    blob = ledger.blobs.put_bytes(spec.id.encode())
    return ledger.record_artifact(spec, weights_sha256=blob, blobs=[blob], run_id="r")


def main(task: str, home: str, *arguments: str) -> None:
    ledger = Ledger(Path(home))
    if task == "write":
        write(ledger, int(arguments[0]), int(arguments[1]))
    else:
        read(ledger, float(arguments[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
