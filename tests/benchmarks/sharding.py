"""How much memory a process takes until it has its part of a base that several divide.

    python -m tests.benchmarks.sharding CHECKPOINT BASE [--steps 2]

BASE is a folder with the checkpoint's base as safetensors. The processes have one thread each, and
gloo joins them. Printed is memory that is no file's, that of the libraries included: the most up to
then, and what is held then. With `--steps` that is after so many steps of training, of four
sequences of 16 random tokens, with two experts a token.

    whole        each process holds the base
    divided      each process reads the base, and then holds its part
    from files   each process reads one layer at a time, and holds its part of it
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

import meteora
from meteora.artifacts import JointSettings
from meteora.artifacts.routers import POINT_GATES
from meteora.base.loading import layers_on_disk
from meteora.fitting.joint import shard, train_jointly
from meteora.fitting.sequences import LabelledSequence
from meteora.model.fused import expert_names
from tests.benchmarks.timing import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = {"whole": (1,), "divided": (2,), "from files": (2, 4)}
"""In how many processes each is tried; `divided` before training alone."""
LENGTH = 16
"""Tokens of a sequence."""
STATUS = Path("/proc/self/status")
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Without it glibc keeps what is freed of tensors up to 32 MB, more with each step of training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="of training")
    parser.add_argument("--way", choices=WAYS, help="be one of the processes")
    args = parser.parse_args()
    if args.way:
        most, now = measure(args.checkpoint, args.base, args.way, args.steps)
        print(f"of {most / 1e6:.0f} {now / 1e6:.0f}\n", end="", flush=True)
        return
    print(f"{machine()}\n\n| way | processes | at most, MB | then, MB |\n|-|-|-|-|")
    for way, counts in WAYS.items():
        for count in () if args.steps and way == "divided" else counts:
            most, now = (max(column) for column in zip(*processes(args, way, count), strict=True))
            print(f"| {way} | {count} | {most} | {now} |", flush=True)


def processes(args: argparse.Namespace, way: str, count: int) -> list[tuple[int, int]]:
    """What `measure` finds in each of so many processes, in MB."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    asked = ["--module", "tests.benchmarks.sharding", str(args.checkpoint), str(args.base)]
    done = subprocess.run(
        [sys.executable, *launch, *asked, "--way", way, "--steps", str(args.steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | FREED_AT_ONCE,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(int(most), int(now)) for most, now in re.findall(r"of (\d+) (\d+)", done.stdout)]


def measure(checkpoint: Path, base: Path, way: str, steps: int) -> tuple[int, int]:
    """The most memory of this process, and what it has at the end, in bytes."""
    most = 0

    def watch() -> None:
        nonlocal most
        while True:
            most = max(most, held())
            time.sleep(0.002)

    Accelerator()  # the processes find one another
    threading.Thread(target=watch, daemon=True).start()
    spread = layers_on_disk(base, "cpu") if way == "from files" else None
    model, _ = meteora.load(checkpoint, base_folder=base, device_map=spread)
    if spread is None:  # no mapped files, as on a GPU
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if steps:
        train(model, steps, sharded=way != "whole")
    elif way != "whole":
        shard(model)
    gc.collect()
    return most, held()


def train(model: PreTrainedModel, steps: int, *, sharded: bool) -> None:
    """Train gates from zeros, on two sequences of each expert."""
    dice, size = random.Random(0), model.config.vocab_size
    sequences = [
        LabelledSequence(tuple(dice.choices(range(size), k=LENGTH)), (e,) * LENGTH)
        for e in range(len(expert_names(model)))
        for _ in range(2)
    ]
    settings = JointSettings(
        steps=steps,
        batch_size=4,
        accumulate=1,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        gate_loss_weight=50.0,
        max_grad_norm=0.3,
        start="zeros",
    )
    train_jointly(model, sequences, settings, replace(POINT_GATES, top_k=2), sharded=sharded)


def held() -> int:
    """Memory of this process that is no file's, in bytes."""
    (anonymous,) = re.findall(r"RssAnon:\s+(\d+)", STATUS.read_text())
    return int(anonymous) << 10


if __name__ == "__main__":
    main()
