"""Gates by gradient descent: in this process, or in several that share every batch.

There is one process a GPU. Each has the environment variables of `torchrun`, so Accelerate joins
them; on a CPU it uses gloo. The first process reports the progress, and writes the gates.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch.distributed import TCPStore

from meteora.artifacts import MeteoraError, RouterSpec
from meteora.checkpoint import tensors
from meteora.fitting import joint
from meteora.routing.gates import gates_of
from pipelines.processes.child import ChildDiedError, ChildProcess, answers, connect_to_parent
from pipelines.recipe.gates import JointSection
from pipelines.stages.open_model import map_to_divide, opened
from pipelines.stages.worker_client import StageError
from pipelines.workspace.context import RunContext
from store.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.base.chat_template import Template
    from meteora.fitting.sequences import LabelledSequence
    from meteora.fitting.statistics import Fit
    from pipelines.planning.plan import Plan
    from pipelines.recipe.recipe import Recipe

HOST = "127.0.0.1"


def num_processes(recipe: Recipe) -> int:
    """The number of processes that train the gates: the recipe's, else one a GPU."""
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
) -> Fit:
    """Train, from the saved state of a stopped run if there is one.

    The state is removed once the gates are recorded.
    """
    settings, section = router.joint, work.recipe.gates
    assert settings is not None  # noqa: S101  (it is the spec of that section)
    assert isinstance(section, JointSection)  # noqa: S101  (the caller checks it)
    return joint.train_jointly(
        model,
        sequences,
        settings,
        router.options,
        template=template,
        offsets=router.offsets,
        seed=router.seed,
        folder=work.training_folder(router.id),
        checkpoint_every=section.checkpoint_every,
        gradient_checkpointing=section.gradient_checkpointing,
        sharded=section.sharded,
        scratch=scratch,
        progress=progress,
    )


def train_together(
    work: RunContext,
    plan: Plan,
    sequences: Sequence[LabelledSequence],
    template: Template | None,
    out: Path,
    progress: Callable[[int, int], None],
) -> Fit:
    """Train in several processes, each with a model of its own; the gates are written to `out`.

    Raises:
        StageError: One of them died.
        MeteoraError: There are fewer GPUs than processes; or the first error of `train` in a
            process.
    """
    count = num_processes(work.recipe)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise MeteoraError(
            f"{count} processes are to train the gates, and there are {torch.cuda.device_count()}"
            " GPUs for them, one each; lower `processes` in the recipe's `gates`, or leave it out"
        )
    task = (
        (work.home, work.recipe, work.path, work.run_id),
        (plan, sequences, template, str(out)),
    )
    store = _store()
    with ExitStack() as started:
        children = [
            started.enter_context(
                ChildProcess(
                    "pipelines.stages.train_processes",
                    pickled=True,
                    environment=_environment(rank, count, store.port),
                )
            )
            for rank in range(count)
        ]
        try:
            for child in children:
                child.send(task)
            return answers(children, {"progress": progress})[0]
        except ChildDiedError as error:
            raise StageError(
                f"one of the {count} processes that train the gates ended: {error}; its messages"
                " stand above, and what was saved is kept: run again to go on"
            ) from None


def _store() -> TCPStore:
    """Where the processes meet, on a free port that only this machine reaches."""
    # without a socket of ours it would listen on every network, and it asks for no password
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The variables of `torchrun` for one machine, and the one that selects the device."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    address = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    device = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    return {name: str(value) for name, value in (numbers | address | threads | device).items()}


def main() -> None:
    stage = connect_to_parent(pickled=True)
    _, ((home, recipe, path, run_id), (plan, sequences, template, out)) = stage.receive()
    work = RunContext(Ledger(home), recipe, path, run_id)
    together = Accelerator()  # each has a GPU of its own from here on
    first = together.is_main_process

    def report(done: int, total: int) -> None:
        if first:
            stage.send("progress", (done, total))

    try:
        spread = map_to_divide(work, plan)
        with opened(work, plan, spread) as (model, _), work.scratch() as scratch:
            made = train(work, plan.router, model, sequences, template, scratch, report)
    except MeteoraError as error:
        stage.send("error", error)
        raise
    if first:
        tensors.write_gates(Path(out), gates_of(model))
    together.wait_for_everyone()
    together.end_training()
    stage.send("answer", made)


if __name__ == "__main__":
    main()
