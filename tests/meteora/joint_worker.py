"""Trains gates as one of the processes that were started together.

    torchrun … --module tests.meteora.joint_worker CHECKPOINT BASE OUT TOP_K [--sharded]

OUT, a safetensors file, gets the gates; the first process writes it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

import meteora
from meteora import checkpoint
from meteora.gates import gates_of
from meteora.joint import train_jointly
from tests.meteora import test_joint
from tests.meteora.test_train import examples

SETTINGS = replace(test_joint.SETTINGS, accumulate=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("top_k", type=int)
    parser.add_argument("--sharded", action="store_true")
    asked = parser.parse_args()
    model, _ = meteora.load(asked.checkpoint, base_folder=asked.base)
    train_jointly(model, examples(3), SETTINGS, top_k=asked.top_k, sharded=asked.sharded)
    if PartialState().is_main_process:
        checkpoint.write_gates(asked.out, gates_of(model))
        print(PartialState().num_processes, "processes")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
