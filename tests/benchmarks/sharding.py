"""How much memory a process takes until it has its part of a base that several divide.

    python -m tests.benchmarks.sharding CHECKPOINT BASE

CHECKPOINT is the quickstart's, BASE a folder with its base as safetensors. The processes have one
thread each, and gloo joins them. Printed is memory that is no file's, that of the libraries
included: the most up to then, and what is held then. Training gathers one layer at a time, and what
lies outside of the layers, such as the embeddings.

    whole        each process holds the base
    divided      each process reads the base, and then holds its part
    from files   each process reads one layer at a time, and holds its part of it
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from accelerate import Accelerator

import meteora
from meteora.base.loading import layers_on_disk
from meteora.fitting.joint import shard
from tests.benchmarks.timing import machine

WAYS = {"whole": (1,), "divided": (2,), "from files": (2, 4)}
"""In how many processes each is tried."""
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--way", choices=WAYS, help="be one of the processes")
    args = parser.parse_args()
    if args.way:
        most, now = measure(args.checkpoint, args.base, args.way)
        print(f"of {most / 1e6:.0f} {now / 1e6:.0f}\n", end="", flush=True)
        return
    print(f"{machine()}\n\n| way | processes | at most, MB | then, MB |\n|-|-|-|-|")
    for way, counts in WAYS.items():
        for count in counts:
            most, now = (max(column) for column in zip(*processes(args, way, count), strict=True))
            print(f"| {way} | {count} | {most} | {now} |", flush=True)


def processes(args: argparse.Namespace, way: str, count: int) -> list[tuple[int, int]]:
    """What `measure` finds in each of so many processes, in MB."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    asked = ["--module", "tests.benchmarks.sharding", str(args.checkpoint), str(args.base)]
    done = subprocess.run(
        [sys.executable, *launch, *asked, "--way", way],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(int(most), int(now)) for most, now in re.findall(r"of (\d+) (\d+)", done.stdout)]


def measure(checkpoint: Path, base: Path, way: str) -> tuple[int, int]:
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
    if way != "whole":
        shard(model)
    gc.collect()
    return most, held()


def held() -> int:
    """Memory of this process that is no file's, in bytes."""
    (anonymous,) = re.findall(r"RssAnon:\s+(\d+)", STATUS.read_text())
    return int(anonymous) << 10


if __name__ == "__main__":
    main()
