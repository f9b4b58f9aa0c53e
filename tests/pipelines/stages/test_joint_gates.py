"""A run whose gates are trained: killed, it goes on to the same bytes; by one process or two."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora.artifacts import short
from meteora.artifacts.routers import ANSWER_START_SHARE
from meteora.checkpoint.manifest import CARD, read_manifest
from meteora.fitting.sequences import TrainingError
from pipelines.stages import build, train_processes
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.pipelines.conftest import result_of, run
from tests.pipelines.flows.test_local_server import wait_until
from tests.pipelines.process_tree import descendants, ends

pytestmark = pytest.mark.usefixtures("prefect_server")

GATES = {
    "method": "joint",
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
}


class KilledError(BaseException):
    pass


@contextmanager
def killed_after_three(
    _what: str, _total: int, _unit: str
) -> Generator[Callable[[int, int], None]]:
    def show(done: int, _all: int) -> None:
        if done == 3:
            raise KilledError

    yield show


def test_a_killed_training_goes_on_and_ends_in_the_same_gates(
    workplace: Callable[..., RunContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workplace(
        gates=GATES | {"composites": [2]},
        benchmark={"limit": 2, "compare": [], "max_new_tokens": 1},
    )
    run(work)
    planned, summary = result_of(work)
    assert planned.router.joint is not None
    whole = work.ledger.built(planned.router.id)
    assert whole is not None
    assert whole["heldout_accuracy"] is None
    assert summary.routing is not None
    assert summary.routing.accuracy > 0.8  # after six steps
    assert planned.router.loss_opening_share == ANSWER_START_SHARE
    assert planned.router.openings_apart
    assert not planned.router.crossed  # it has no sweep to cross
    manifest = read_manifest(work.checkpoint_folder(planned.router.id))
    assert manifest.gates["composites"] == [2]
    card = (work.checkpoint_folder(planned.router.id) / CARD).read_text()
    assert "trained by gradient descent on" in card
    assert short(planned.router.id) in card
    folder = work.training_folder(planned.router.id)
    assert not folder.exists()

    stopped = replace(work, ledger=Ledger(tmp_path / "other"))
    build.build_base(stopped, planned.base)
    for expert in planned.experts:
        spec = expert.adapter.spec
        stopped.ledger.record_artifact(
            spec, weights_sha256=spec.weights_sha256, run_id=stopped.run_id
        )
    build.stack(stopped, planned)
    folder = stopped.training_folder(planned.router.id)
    with monkeypatch.context() as patch:
        patch.setattr(build, "progress_bar", killed_after_three)
        with pytest.raises(KilledError):
            build.fit_gates(stopped, planned)
    assert [path.name for path in folder.iterdir()] == ["training.safetensors"]
    made = build.fit_gates(stopped, planned)
    assert made.weights_sha256 == whole["weights_sha256"]
    assert not folder.exists()


def test_the_processes_of_a_training_meet_where_only_this_machine_gets() -> None:
    store = train_processes._store()
    socket.create_connection(("127.0.0.1", store.port)).close()
    with pytest.raises(ConnectionRefusedError):  # it listens on no other address
        socket.create_connection(("127.0.0.2", store.port))


def gates_of(work: RunContext) -> dict[str, torch.Tensor]:
    ((router_id,),) = work.ledger.query(
        "SELECT id FROM artifacts WHERE kind = 'router' AND weights_sha256 IS NOT NULL"
    ).rows
    return load_file(work.ledger.blobs.path_of(str(work.ledger.weights_of(router_id))))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_of_a_run_come_to_the_gates_of_one(
    workplace: Callable[..., RunContext], tmp_path: Path, *, sharded: bool
) -> None:
    """On a CPU they are joined by gloo, as several GPUs are by NCCL."""
    one = workplace(gates=GATES | {"sharded": sharded})  # a process alone divides nothing
    run(one, "gates")
    together = GATES | {"processes": 2, "sharded": sharded}
    two = replace(workplace(gates=together), ledger=Ledger(tmp_path / "two"))
    assert list(run(two, "gates")) == ["base", "check", "stack", "gates"]
    expected, found = gates_of(one), gates_of(two)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    assert any(tensor.abs().max() > 0.01 for tensor in found.values())

    alone = replace(
        workplace(gates=GATES | {"processes": 2, "batch_size": 1}),
        ledger=Ledger(tmp_path / "alone"),
    )
    with pytest.raises(TrainingError, match="a batch of 1 sequences cannot be shared by 2"):
        run(alone, "gates")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["one of them", "the run"])
def test_when_one_is_killed_or_the_run_is_the_others_end(
    workplace: Callable[..., RunContext], victim: str
) -> None:
    work = workplace(gates=GATES | {"processes": 2, "steps": 1_000_000})
    command = [sys.executable, "-m", "pipelines.cli", "run", str(work.path)]
    running = subprocess.Popen(
        [*command, "--home", str(work.home), "--until", "gates"], stderr=subprocess.PIPE, text=True
    )
    state = work.home / "training"
    wait_until(lambda: any(state.glob("*/training.safetensors")), seconds=300)
    both = descendants(running.pid, "pipelines.stages.train_processes")
    assert len(both) == 2
    os.kill(both[0] if victim == "one of them" else running.pid, signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert all(map(ends, both))
    if victim == "one of them":
        assert running.returncode == 1
        assert "one of the 2 processes that train the gates ended" in said
