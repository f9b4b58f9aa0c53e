"""What the process of the stages answers when a stage fails."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meteora.base.placement import NO_MEMORY
from pipelines.stages.worker import STAGES, _portable
from pipelines.stages.worker_client import StageProcess
from pipelines.workspace.context import RunContext
from pipelines.workspace.environment import SETTINGS


def no_cpu_memory(text: str) -> Exception:
    return RuntimeError(f"{NO_MEMORY}: you {text}")


def test_torch_says_so_itself_where_a_process_may_not_have_more() -> None:
    """A petabyte is more than a process has addresses for."""
    with pytest.raises(RuntimeError, match=re.escape(NO_MEMORY)):
        torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("fit_gates", "gates.examples_per_expert"),
        ("measure", "benchmark.batch_size"),
        ("stack", "larger machine"),
    ],
)
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, no_cpu_memory])
def test_a_stage_without_memory_says_what_to_ask_for_less_of(
    stage: str, advice: str, kind: Callable[[str], Exception]
) -> None:
    assert stage in STAGES
    message = str(_portable(stage, kind("tried to allocate 9 GiB\nand a long text")))
    assert advice in message
    assert "9 GiB" in message
    assert "long text" not in message
    assert ("batch_size" in message) == (stage != "stack")


def test_a_worker_of_a_cluster_lets_no_library_send_the_saved_token_in_a_stage(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "0")  # what the user says, counts
    with StageProcess(workplace(), on_progress=lambda *_: None) as child:
        environment = Path(f"/proc/{child.pid}/environ")
        while not (has := os.fsdecode(environment.read_bytes())):  # empty until it has begun
            time.sleep(0.01)
    assert {"HF_HUB_DISABLE_IMPLICIT_TOKEN=1", "TQDM_DISABLE=0"} <= {*has.split("\0")}
