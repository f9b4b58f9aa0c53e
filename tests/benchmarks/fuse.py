"""Stacking against copying the same bytes: `python -m tests.benchmarks.fuse`.

Made-up adapters of the sizes of a 7B Llama are written, read and stacked. Time is the ratio to
copying their files; memory is what stacking adds to the peak of a process that does nothing else,
in units of the tensors of the largest module.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from meteora import adapters, fuse
from tests.benchmarks.layer import machine

HIDDEN, INTERMEDIATE = 4096, 11008
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


def make(folder: Path, layers: int, r: int, dtype: torch.dtype) -> None:
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (num_in, num_out) in SIZES.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(r, num_in).to(dtype)
            tensors[f"{path}.lora_B.weight"] = torch.randn(num_out, r).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.partition(".")[2] for name in SIZES]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stack(folders: list[Path], out: Path) -> tuple[float, int]:
    """Seconds, and by how much the peak of this process grew."""
    read = [adapters.read(folder) for folder in folders]
    before, start = peak_bytes(), time.perf_counter()
    fuse.stack(read, out)
    return time.perf_counter() - start, peak_bytes() - before


def copy(folders: list[Path], out: Path) -> float:
    """Seconds for the same bytes, read into memory and written to one file."""
    start = time.perf_counter()
    with out.open("wb") as file:
        for folder in folders:
            with (folder / "adapter_model.safetensors").open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
    return time.perf_counter() - start


def settle(out: Path) -> None:
    """Let the disk finish, so that neither pays for what the other wrote."""
    out.unlink(missing_ok=True)
    os.sync()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, dtype = Path(name), getattr(torch, asked.dtype)
        folders = [folder / f"adapter_{e}" for e in range(asked.adapters)]
        for one in folders:
            make(one, asked.layers, asked.rank, dtype)
        copies, stacks, grown = [], [], 0
        for _ in range(asked.rounds):
            settle(folder / "copy")
            copies.append(copy(folders, folder / "copy"))
            settle(folder / "stack")
            # a fresh process: the peak of one that has already stacked grows no more
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                taken, extra = pool.apply(stack, (folders, folder / "stack"))
            stacks.append(taken)
            grown = max(grown, extra)
    largest = max(map(sum, SIZES.values())) * asked.rank * asked.adapters * dtype.itemsize
    num_bytes = largest / max(map(sum, SIZES.values())) * sum(map(sum, SIZES.values()))
    return {
        **{name: getattr(asked, name) for name in ("adapters", "layers", "rank", "dtype")},
        "megabytes": num_bytes * asked.layers / 1e6,
        "copy_seconds": min(copies),
        "stack_seconds": min(stacks),
        "speed_of_a_copy": min(copies) / min(stacks),
        "peak_over_largest_module": grown / largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the 32: time is linear in them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="for machines")
    asked = parser.parse_args()
    found = measure(asked)
    if asked.json:
        sys.stdout.write(json.dumps({**found, "machine": machine()}, indent=1) + "\n")
        return
    rows = "".join(
        f"| {name} | {value if isinstance(value, (int, str)) else f'{value:.2f}'} |\n"
        for name, value in found.items()
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in machine().items())
    sys.stdout.write(f"| | |\n|---|---|\n{rows}\n{facts}")


if __name__ == "__main__":
    main()
