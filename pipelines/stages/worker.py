"""The process in which stages run: it receives requests one at a time, and answers each.

`worker_client` starts it.
"""

import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from meteora.adapters.update_norm import check_proportion
from meteora.artifacts import MeteoraError
from meteora.base.placement import is_out_of_memory
from pipelines.planning.plan import Plan
from pipelines.processes.child import Channel, connect_to_parent
from pipelines.publishing import publish
from pipelines.stages import build, measure, pool
from pipelines.stages.open_model import is_spread
from pipelines.stages.train_processes import num_processes
from pipelines.stages.worker_client import StageError
from pipelines.workspace.console import CONSOLE
from pipelines.workspace.context import RunContext
from pipelines.workspace.machine import choose_device, device_name, memory_bytes
from store.ledger import Ledger

PROGRESS_SECONDS = 2.0


def slots(work: RunContext, plan: Plan) -> list[str]:
    """The names of the devices that this run locks for itself; none on a CPU.

    A model that is too large for one device uses all. The names are sorted: runs that lock several
    in the same order never wait for each other in a circle.
    """
    if not torch.cuda.is_available():
        return []
    first, count = torch.cuda.current_device(), torch.cuda.device_count()
    number = count if is_spread(work, plan) else min(num_processes(work.recipe), count)
    wanted = [(first + i) % count for i in range(number)]
    devices = map(torch.cuda.get_device_properties, wanted)
    return sorted(f"gpu-{getattr(about, 'uuid', about.name)}" for about in devices)


STAGES: dict[str, Callable[..., Any]] = {
    "device": lambda _work: device_name(choose_device()),
    "memory": lambda _work: memory_bytes(),
    "proportion": lambda _work, adapter, base_norms: check_proportion(adapter, base_norms),
    "slots": slots,
    "build_base": build.build_base,
    "check_prompts": measure.check_prompts,
    "stack": build.stack,
    "divide_pool": pool.divide_pool,
    "fit_gates": build.fit_gates,
    "measure": measure.measure,
    "write_checkpoint": build.write_checkpoint,
    "publish": publish.publish_plan,
}


def main() -> None:
    run = connect_to_parent(pickled=True)
    _, (home, *fields) = run.receive()
    work = RunContext(Ledger(home), *fields)
    with CONSOLE.listening(
        on_message=lambda text: run.send("message", (text,)),
        on_progress=_less_often(lambda *step: run.send("progress", step)),
    ):
        _serve(work, run)


def _serve(work: RunContext, run: Channel) -> None:
    while True:
        try:
            _, (stage, arguments) = run.receive()
        except EOFError:
            return
        try:
            kind, value = "answer", STAGES[stage](work, *arguments)
        except Exception as error:
            kind, value = "error", _portable(stage, error)
        torch.cuda.empty_cache()  # another process may use the device next
        run.send(kind, value)


SMALLER = {
    "divide_pool": "a pool (`gates.pool`) without its longest prompts",
    "fit_gates": "a smaller `gates.examples_per_expert` (with `method: joint`, `gates.batch_size`)",
    "measure": "a smaller `benchmark.batch_size`",
}
"""The change of a recipe that saves memory, by the stage that runs out of it."""


def _less_often(send: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """`send`, but at most once in `PROGRESS_SECONDS`."""
    last = 0.0

    def send_seldom(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            send(what, done, total)

    return send_seldom


def _portable(stage: str, error: Exception) -> Exception:
    """The error in a form that can be pickled; a foreign one gets its traceback as a note."""
    if is_out_of_memory(error):
        first = str(error).partition("\n")[0]
        smaller = f"{SMALLER[stage]} or " if stage in SMALLER else ""
        return StageError(
            f"{stage}: out of memory{first and f' ({first})'}; {smaller}a larger machine helps;"
            " what was finished is kept"
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
