"""What the process of the stages answers when a stage fails."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from meteora.base.placement import NO_MEMORY
from pipelines.stages.worker import STAGES, _portable

if TYPE_CHECKING:
    from collections.abc import Callable


def no_cpu_memory(text: str) -> Exception:
    return RuntimeError(f"{NO_MEMORY}: you {text}")


@pytest.mark.slow
def test_torch_says_so_itself_where_a_process_may_not_have_more() -> None:
    code = (
        "import resource, torch\n"
        "limit = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, limit))\n"
        "torch.zeros(1 << 40)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert NO_MEMORY in said.stderr


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
