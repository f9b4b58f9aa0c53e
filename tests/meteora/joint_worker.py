"""Trains gates as one of the processes that were started together.

    torchrun … --module tests.meteora.joint_worker CHECKPOINT BASE OUT TOP_K [--sharded]

OUT, a safetensors file, gets the gates; the first process writes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import PartialState

import meteora
from meteora import checkpoint
from meteora.artifacts import JointSettings
from meteora.gates import gates_of
from meteora.joint import train_jointly
from tests.meteora.test_train import examples

SETTINGS = JointSettings(
    steps=6,
    batch_size=4,
    accumulate=2,
    learning_rate=1e-2,
    warmup_ratio=0.34,
    gate_loss_weight=50.0,
    max_grad_norm=1.0,
    start="zeros",
)


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
