"""Strike each act of the store at one call after the other, and see what is left of its promises.

`python -m tests.store.faulty FOLDER ACT KIND FIRST STRIDE`, with `faults.c` in LD_PRELOAD. Every
strike happens in a process of its own, on a home of its own, and so does the look at what is left:
the process that forks never uses DuckDB.
"""

import ctypes
import hashlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from meteora.artifacts import MeteoraError, Spec
from store.index import STORAGE_VERSION
from store.ledger import Ledger
from store.query import memory, quoted
from store.schema import sources
from tests.store.conftest import BASE, adapter
from tests.store.worker import say

NEVER = 1 << 40
PROMISES = 3
"""The file descriptor of the pipe that promises go to."""


def promise(spec: Spec) -> None:
    os.write(PROMISES, f"{spec.id}\n".encode())


def keep(ledger: Ledger) -> None:
    """Keep a blob and record it; then, and only then, say so."""
    blob = ledger.blobs.put_bytes(b"weights of the base")
    ledger.record_artifact(BASE, weights_sha256=blob, blobs=[blob], run_id="r")
    promise(BASE)


def make(ledger: Ledger) -> None:
    ledger.home.mkdir(exist_ok=True)
    (ledger.home / "made").write_bytes(b"weights" * 1000)


def move(ledger: Ledger) -> None:
    """The same with a file that is taken as it lies."""
    blob = ledger.blobs.put(ledger.home / "made", move=True)
    ledger.record_artifact(adapter(1), weights_sha256=blob, blobs=[blob], run_id="r")
    promise(adapter(1))


def ingest(ledger: Ledger) -> None:
    ledger.ingest()


def outdate(ledger: Ledger) -> None:
    """Leave an index as the first release made it."""
    name, sql = sources()[1]
    with memory() as connection:
        connection.execute(
            f"ATTACH {quoted(ledger.index.live)} AS ledger (STORAGE_VERSION '{STORAGE_VERSION}')"
        )
        connection.execute("USE ledger")
        connection.execute(sql)
        digest = hashlib.sha256(sql.encode()).hexdigest()
        connection.execute("INSERT INTO migrations VALUES (1, ?, ?)", [name, digest])


def pack(ledger: Ledger) -> None:
    ledger.pack()


def rebuild(ledger: Ledger) -> None:
    ledger.rebuild()


def run(ledger: Ledger) -> None:
    """What a run does by itself: close what was killed, sweep, and go on."""
    with ledger.running("nightly"):
        keep(ledger)


ACTS: dict[str, tuple[Callable[[Ledger], object], ...]] = {
    "keep": (keep,),
    "move": (keep, make, move),
    "create": (keep, ingest),
    "ingest": (keep, ingest, make, move, ingest),
    "upgrade": (keep, outdate, ingest),
    "pack": (keep, ingest, make, move, pack),
    "pack again": (keep, pack, ingest, make, move, pack),
    "pack and ingest": (keep, ingest, make, move, pack, ingest),
    "rebuild": (keep, ingest, make, move, rebuild),
    "run": (make, move, ingest, run),
}
"""Acts by name; all but the last of each happen before the strikes, and are not struck."""


def survives(ledger: Ledger, promised: set[str]) -> None:
    """Whoever comes next finds all that was promised, and can go on."""
    with ledger.running("nightly"):
        pass
    if reason := ledger.ingest().reason:
        raise AssertionError(reason)
    recorded = {row[0] for row in ledger.query("SELECT id FROM artifacts").rows}
    if missing := promised - recorded:
        raise AssertionError(f"promised, and not there: {missing}")
    if findings := ledger.verify().findings:
        raise AssertionError(findings)


def apart(task: Callable[[], None]) -> tuple[int, set[str], str]:
    """Do it in a process of its own: its exit status, what it promised, how it failed."""
    promises, trouble = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            os.dup2(promises[1], PROMISES)
            task()
        except MeteoraError as error:
            status = 1
            os.write(trouble[1], str(error).encode()[:4000])
        except BaseException:
            status = 2
            os.write(trouble[1], traceback.format_exc().encode()[-4000:])
        os._exit(status)
    os.close(promises[1])
    os.close(trouble[1])
    told = []
    for end in (promises[0], trouble[0]):
        with os.fdopen(end) as pipe:
            told.append(pipe.read())
    _, status = os.waitpid(child, 0)
    return status, set(told[0].split()), told[1]


def main(folder: str, act: str, kind: str, first: str, stride: str) -> None:
    """Print a line a strike; the last one says how many calls the act makes."""
    faults = ctypes.CDLL(None)
    faults.faults_arm.argtypes = (ctypes.c_long, ctypes.c_char)
    faults.faults_count.restype = ctypes.c_long
    start, home = Path(folder, "start"), Path(folder, "home")
    *before, struck = ACTS[act]

    def prepare() -> None:
        for step in before:
            step(Ledger(start))

    status, kept, trouble = apart(prepare)
    start.mkdir(exist_ok=True)
    if status:
        raise SystemExit(trouble)
    at, last = int(first), False
    while not last:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(start, home)

        def strike(at: int = at) -> None:
            ledger = Ledger(home)
            faults.faults_arm(at, kind.encode())
            try:
                struck(ledger)
            finally:
                reached = faults.faults_count() >= at
                faults.faults_arm(NEVER, kind.encode())
                if not reached:
                    os.write(PROMISES, b"last\n")

        status, promised, trouble = apart(strike)
        last = "last" in promised
        bad = status == 2 << 8 or (last and status)
        if not bad:
            expected = kept | promised - {"last"}
            left, _, why = apart(partial(survives, Ledger(home), expected))
            bad, trouble = bool(left), trouble + why
        if bad:
            say(f"broken at call {at} ({kind}): {trouble}")
        else:
            say(f"survived {at}: {trouble}".replace("\n", " "))
        at += int(stride)


if __name__ == "__main__":
    main(*sys.argv[1:])
