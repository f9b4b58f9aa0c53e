"""The process in which stages run: it is handed one after the other, and answers each.

Run as a module, with the number of the file descriptor to talk through; see `worker_client`.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

from meteora.adapters.update_norm import check_proportion
from meteora.artifacts import MeteoraError
from pipelines.publishing import publish
from pipelines.stages import build, measure
from pipelines.stages.train_processes import num_processes
from pipelines.stages.worker_client import StageError
from pipelines.workspace import console
from pipelines.workspace.context import RunContext
from pipelines.workspace.machine import memory_bytes
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from meteora.adapters.tensors import Adapter
    from meteora.artifacts import Reason

PROGRESS_SECONDS = 2.0


def device(_work: RunContext) -> str:
    """What the stages compute on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def memory(_work: RunContext) -> int:
    """What the device has, in bytes."""
    return memory_bytes()


def proportion(
    _work: RunContext, adapter: Adapter, base_norms: Mapping[str, float]
) -> tuple[Reason, ...]:
    """A warning where an adapter is out of all proportion to the base's weights."""
    return check_proportion(adapter, base_norms)


def slots(work: RunContext) -> list[str]:
    """By which names devices are held by one run at a time, in that order; none need be on a CPU.

    Runs that want several take them in the same order, so that none waits for another in turn.
    """
    if not torch.cuda.is_available():
        return []
    first, count = torch.cuda.current_device(), torch.cuda.device_count()
    wanted = [(first + i) % count for i in range(min(num_processes(work.recipe), count))]
    devices = map(torch.cuda.get_device_properties, wanted)
    return sorted(f"gpu-{getattr(about, 'uuid', about.name)}" for about in devices)


STAGES = {
    "device": device,
    "memory": memory,
    "proportion": proportion,
    "slots": slots,
    "build_base": build.build_base,
    "stack": build.stack,
    "fit_gates": build.fit_gates,
    "measure": measure.measure,
    "write_checkpoint": build.write_checkpoint,
    "publish": publish.publish_plan,
}


def main() -> None:
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    pipe = Connection(int(sys.argv[1]))
    home, recipe, path, run_id = pipe.recv()
    work = RunContext(Ledger(home), recipe, path, run_id)
    send = _one_at_a_time(pipe)
    console.tell(_now_and_then(lambda *done: send("progress", done)))
    with console.heard(lambda text: send("said", (text,))):
        _serve(work, pipe, send)


def _serve(work: RunContext, pipe: Connection, send: Callable[[str, object], None]) -> None:
    while True:
        try:
            stage, arguments = pipe.recv()
        except EOFError:
            return
        try:
            kind, answer = "value", STAGES[stage](work, *arguments)
        except Exception as error:
            kind, answer = "error", _portable(stage, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # whoever has the device next finds it empty
        send(kind, answer)


def _end_with_the_run() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _one_at_a_time(pipe: Connection) -> Callable[[str, object], None]:
    """What sends through the pipe; a bar may be watched by a thread of its own."""
    turn = threading.Lock()

    def send(kind: str, value: object) -> None:
        with turn:
            pipe.send((kind, value))

    return send


def _now_and_then(send: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    last = 0.0

    def told(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            send(what, done, total)

    return told


def _portable(stage: str, error: Exception) -> Exception:
    """The error as it can cross: one of ours as itself, any other with its traceback as a note."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        first = str(error).partition("\n")[0]
        return StageError(
            f"{stage}: out of memory{first and f' ({first})'}; a smaller `benchmark.batch_size` or"
            " a larger machine helps; what was finished is kept"
        )
    if not isinstance(error, MeteoraError):
        error.add_note(f"in the process of {stage}:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  (made in this line)
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(traceback.format_exc())
        return plain
    return error


if __name__ == "__main__":
    main()
