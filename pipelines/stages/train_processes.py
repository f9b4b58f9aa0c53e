"""Gates by gradient descent: in this process, or in several that share every batch.

Several are started as `accelerate launch` starts them, one a GPU, and Accelerate joins them; on a
CPU it does so over gloo. Each connects to the one that started them, is told what to do, and ends
when that one does; the first tells how far they are, and writes the gates.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from meteora.artifacts import MeteoraError
from meteora.checkpoint import tensors
from meteora.fitting import joint
from meteora.routing.gates import gates_of
from pipelines.recipe.gates import JointSection
from pipelines.stages.open_model import opened
from pipelines.stages.worker_client import StageError
from pipelines.workspace.context import RunContext
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel

    from meteora.artifacts import BuiltBase, RouterSpec
    from meteora.base.chat_template import Template
    from meteora.fitting.sequences import LabelledSequence
    from pipelines.planning.plan import Plan
    from pipelines.recipe.recipe import Recipe

LOOK_SECONDS = 0.5
"""How often it is seen whether those that were started live."""
WORDS_SECONDS = 60.0
"""For the last of them to end after the first is done."""


def num_processes(recipe: Recipe) -> int:
    """How many processes train the gates: what the recipe says, else one a GPU."""
    gates = recipe.gates
    if recipe.router.kind != "gate" or not isinstance(gates, JointSection):
        return 1
    return gates.processes or max(1, min(torch.cuda.device_count(), gates.batch_size))


def train(
    work: RunContext,
    router: RouterSpec,
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    template: Template | None,
    scratch: Path,
    progress: Callable[[int, int], None],
) -> joint.Training:
    """Go on from the state that a stopped run left; it is removed once the gates are recorded."""
    settings, asked = router.joint, work.recipe.gates
    if settings is None or not isinstance(asked, JointSection):
        raise MeteoraError(f"{router.id} is asked for by a recipe without `method: joint`")
    return joint.train_jointly(
        model,
        sequences,
        settings,
        router.options,
        template=template,
        seed=router.seed,
        folder=work.training_folder(router.id),
        checkpoint_every=asked.checkpoint_every,
        gradient_checkpointing=asked.gradient_checkpointing,
        sharded=asked.sharded,
        scratch=scratch,
        progress=progress,
    )


def train_together(
    work: RunContext,
    plan: Plan,
    built: BuiltBase,
    sequences: Sequence[LabelledSequence],
    template: Template | None,
    out: Path,
    progress: Callable[[int, int], None],
) -> joint.Training:
    """Train in several processes, each with a model of its own; the gates are written to `out`.

    Raises:
        StageError: One of them died.
        MeteoraError: There are fewer GPUs than processes; or what `train` says, by whichever said
            it first.
    """
    count = num_processes(work.recipe)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise MeteoraError(
            f"{count} processes are to train the gates, and there are {torch.cuda.device_count()}"
            " GPUs for them, one each; lower `processes` in the recipe's `gates`, or leave it out"
        )
    task = (
        (work.home, work.recipe, work.path, work.run_id),
        (plan, built, sequences, template, str(out)),
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
        "--nproc-per-node", str(count), "--module", "pipelines.stages.train_processes",
    ]  # fmt: skip
    device = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    with Listener(family="AF_UNIX") as listener:  # in a folder of this process's own
        pipes: list[Connection] = []
        threading.Thread(target=_receive, args=(listener, task, count, pipes), daemon=True).start()
        launched = subprocess.Popen([*command, str(listener.address)], env=os.environ | device)  # noqa: S603
        try:
            while launched.poll() is None or pipes:
                ready = wait(list(pipes), timeout=LOOK_SECONDS)
                for pipe in [pipe for pipe in pipes if pipe in ready]:
                    try:
                        kind, value = pipe.recv()
                    except (EOFError, ConnectionError):
                        pipes.remove(pipe)
                        continue
                    if kind == "error":
                        raise value
                    if kind == "done":
                        launched.wait(timeout=WORDS_SECONDS)
                        return value
                    progress(*value)
        finally:
            launched.kill()
            launched.wait()
            for pipe in pipes:
                pipe.close()
    raise StageError(
        f"one of the {count} processes that train the gates ended without an answer; what it said"
        " stands above, and what they had saved is kept: run again to go on"
    )


def _receive(listener: Listener, task: Any, count: int, pipes: list[Connection]) -> None:  # noqa: ANN401  (what goes through a pipe)
    """Tell each that comes what is to be done."""
    for _ in range(count):
        try:
            pipe = listener.accept()
        except OSError:  # nobody waits for them any more
            return
        pipe.send(task)
        pipes.append(pipe)


def main() -> None:
    pipe = Client(sys.argv[1], "AF_UNIX")
    (home, recipe, path, run_id), (plan, built, sequences, template, out) = pipe.recv()
    threading.Thread(target=_end_with_the_stage, args=(pipe,), daemon=True).start()
    work = RunContext(Ledger(home), recipe, path, run_id)
    together = Accelerator()  # each has a GPU of its own from here on
    first = together.is_main_process

    def tell(done: int, total: int) -> None:
        if first:
            pipe.send(("progress", (done, total)))

    try:
        with opened(work, plan, built, gates=None) as (model, _), work.scratch() as scratch:
            made = train(work, plan.router, model, sequences, template, scratch, tell)
    except MeteoraError as error:
        pipe.send(("error", error))
        raise
    if first:
        tensors.write_gates(Path(out), gates_of(model))
        pipe.send(("done", made))
    together.wait_for_everyone()
    together.end_training()


def _end_with_the_stage(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, ConnectionError):
        os._exit(1)


if __name__ == "__main__":
    main()
