"""Gates that several processes train together are those that one trains."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora.artifacts.routers import POINT_GATES
from meteora.checkpoint import tensors
from meteora.fitting.joint import train_jointly
from meteora.routing.gates import gates_of
from tests.conftest import World
from tests.meteora.fitting.joint_worker import SETTINGS, sequences

ROOT = Path(__file__).parents[3]
# what `accelerate launch` starts for several GPUs; for several CPUs it would ask for MPI
LAUNCH = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "--module", "tests.meteora.fitting.joint_worker",
)  # fmt: skip


def launched(world: World, out: Path, *asked: str) -> str:
    """What two processes print."""
    done = subprocess.run(
        [*LAUNCH, str(world.checkpoint), str(world.base), str(out), *asked],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_all_processes_of_a_training_that_diverges_wait_for_its_state(world, tmp_path):
    """In a run the first error ends all of them."""
    assert launched(world, tmp_path, "1", "--poisoned") == "True\nTrue\n"


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    "more",
    [[], ["--sharded"], ["--sharded", "--from-files"], ["--lists"]],
    ids=["whole", "sharded", "from files", "lists"],
)
def test_two_processes_come_to_the_gates_of_one(world, tmp_path, top_k, more):
    model = world.load()
    train_jointly(model, sequences("--lists" in more), SETTINGS, replace(POINT_GATES, top_k=top_k))
    tensors.write_gates(tmp_path / "one", gates_of(model))
    said = launched(world, tmp_path / "two", str(top_k), *more)
    assert said == f"2 processes {'divide' if '--sharded' in more else 'have'} the base\n"
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    assert any(tensor.abs().max() > 0.01 for tensor in two.values())
