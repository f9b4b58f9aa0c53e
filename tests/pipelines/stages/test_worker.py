"""What the process of the stages answers when a stage fails."""

from __future__ import annotations

import pytest
import torch

from pipelines.stages.worker import STAGES, _portable


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("fit_gates", "gates.examples_per_expert"),
        ("measure", "benchmark.batch_size"),
        ("stack", "larger machine"),
    ],
)
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_a_stage_without_memory_says_what_to_ask_for_less_of(
    stage: str, advice: str, kind: type[Exception]
) -> None:
    assert stage in STAGES
    message = str(_portable(stage, kind("tried to allocate 9 GiB\nand a long text")))
    assert advice in message
    assert "9 GiB" in message
    assert "long text" not in message
    assert ("batch_size" in message) == (stage != "stack")
