"""Trains gates as one of the processes that were started together.

    torchrun … --module tests.meteora.fitting.joint_worker CHECKPOINT BASE OUT TOP_K
        [--sharded] [--from-files] [--lists] [--poisoned]

OUT, a safetensors file, gets the gates; the first process writes it. With `--poisoned` the base has
a NaN after three steps, and OUT is the folder of the state, which is slow to write: each process
prints whether it is there when its training ends.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

import meteora
from meteora.artifacts.routers import POINT_GATES
from meteora.base.loading import layers_on_disk
from meteora.checkpoint import tensors
from meteora.fitting.joint import DivergedError, train_jointly
from meteora.fitting.training_state import FILE, TrainingState
from meteora.routing.gates import gates_of
from tests.meteora.fitting import test_joint
from tests.meteora.fitting.test_calibrate import examples, lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.fitting.sequences import LabelledSequence

SETTINGS = replace(test_joint.SETTINGS, accumulate=2)


def sequences(with_lists: bool) -> list[LabelledSequence]:
    """What is learned from, in one process and in several."""
    return [*examples(3), *(lists(4) if with_lists else [])]


def diverge(model: PreTrainedModel, top_k: int, folder: Path) -> bool:
    """Train until the base has a NaN; whether the state is there when this process knows of it."""
    write = TrainingState.write

    def write_slowly(*asked: Any) -> None:
        time.sleep(2)
        write(*asked)

    def poison(done: int, _total: int) -> None:
        if done == 3:
            model.get_parameter("model.layers.1.input_layernorm.weight").data[0] = torch.nan

    options = replace(POINT_GATES, top_k=top_k)
    with patch.object(TrainingState, "write", write_slowly), suppress(DivergedError):
        train_jointly(model, sequences(False), SETTINGS, options, folder=folder, progress=poison)
    return (folder / FILE).is_file()


def is_divided(model: PreTrainedModel) -> bool:
    """Whether no matrix of the base is whole in this process."""
    matrices = [p for path, p in model.named_parameters() if ".router." not in path and p.ndim > 1]
    return all(isinstance(matrix, DTensor) for matrix in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("top_k", type=int)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--from-files", action="store_true")
    parser.add_argument("--lists", action="store_true")
    parser.add_argument("--poisoned", action="store_true")
    asked = parser.parse_args()
    spread = layers_on_disk(asked.base, "cpu") if asked.from_files else None
    model, _ = meteora.load(asked.checkpoint, base_folder=asked.base, device_map=spread)
    if asked.poisoned:
        print(f"{diverge(model, asked.top_k, asked.out)}\n", end="", flush=True)
        PartialState().wait_for_everyone()
        return
    found = sequences(asked.lists)
    train_jointly(
        model, found, SETTINGS, replace(POINT_GATES, top_k=asked.top_k), sharded=asked.sharded
    )
    if PartialState().is_main_process:
        tensors.write_gates(asked.out, gates_of(model))
        share = "divide" if is_divided(model) else "have"
        print(f"{PartialState().num_processes} processes {share} the base")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
