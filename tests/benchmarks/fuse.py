"""Stacking against copying the same bytes: `python -m tests.benchmarks.fuse`.

Made-up adapters of the sizes of a 7B Llama are written, read and stacked. Time is the ratio to
copying their files, each in a fresh process, by the clock and by the CPU's time, system calls
included; memory is what stacking adds to the peak of that process, in units of the tensors of the
largest module. `cat` is the same with `torch.cat` a module. No GPU takes part.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from meteora.adapters import reader
from meteora.adapters.weights import DTYPES, AdapterWeights
from meteora.checkpoint.stack import module_entries, stack_adapters
from meteora.checkpoint.tensors import write_experts
from tests.benchmarks import timing

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


def stack(folders: list[Path], out: Path) -> tuple[float, float, int]:
    """Seconds by the clock and of the CPU, and by how many bytes the peak of this process grew."""
    read = [reader.read(folder) for folder in folders]
    return timed(lambda: stack_adapters(read, out))


def cat(folders: list[Path], out: Path) -> tuple[float, float, int]:
    """The same with `torch.cat`: of one module first all A's are in memory, then all B's."""
    read = [reader.read(folder) for folder in folders]

    def run() -> None:
        with ExitStack() as files:
            opened = [files.enter_context(AdapterWeights(adapter)) for adapter in read]

            def joined(path: str, factor: str, dim: int) -> Iterator[torch.Tensor]:
                keys = [getattr(adapter.tensors[path], factor) for adapter in read]
                parts = [file.tensor(key) for file, key in zip(opened, keys, strict=True)]
                yield torch.cat(parts, dim)

            entries = module_entries([adapter.spec for adapter in read])
            pairs = ((joined(path, "a_key", 0), joined(path, "b_key", 1)) for path in entries)
            write_experts(out, entries, DTYPES[read[0].spec.dtype], pairs)

    return timed(run)


def copy(folders: list[Path], out: Path) -> tuple[float, float, int]:
    """The same for the same bytes, read into memory and written to one file."""

    def run() -> None:
        with out.open("wb") as file:
            for folder in folders:
                with (folder / "adapter_model.safetensors").open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)

    return timed(run)


def timed(run: Callable[[], object]) -> tuple[float, float, int]:
    before, start, start_of_cpu = peak_bytes(), time.perf_counter(), time.process_time()
    run()
    return (
        time.perf_counter() - start,
        time.process_time() - start_of_cpu,
        peak_bytes() - before,
    )


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
        variants = (copy, stack, cat)
        found: dict[str, list[tuple[float, float, int]]] = {run.__name__: [] for run in variants}
        for _ in range(asked.rounds):
            for run in variants:
                settle(folder / "out")
                # a fresh process: the peak of one that has already stacked grows no more
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found[run.__name__].append(pool.apply(run, (folders, folder / "out")))
    best = {name: [*map(min, zip(*taken, strict=True))] for name, taken in found.items()}
    largest = max(map(sum, SIZES.values())) * asked.rank * asked.adapters * dtype.itemsize
    num_bytes = largest / max(map(sum, SIZES.values())) * sum(map(sum, SIZES.values()))
    facts = {name: getattr(asked, name) for name in ("adapters", "layers", "rank", "dtype")}
    facts["megabytes"] = num_bytes * asked.layers / 1e6
    for at, clock in enumerate(("", "cpu_")):
        facts |= {f"{name}_{clock}seconds": best[name][at] for name in best}
        for name in ("stack", "cat"):
            facts[f"{name}_{clock}speed_of_a_copy"] = best["copy"][at] / best[name][at]
    for name in ("stack", "cat"):
        grown = max(extra for _, _, extra in found[name])
        facts[f"{name}_peak_over_largest_module"] = grown / largest
    return facts


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
        sys.stdout.write(json.dumps({**found, "machine": timing.machine()}, indent=1) + "\n")
        return
    rows = [(name, f"{x:.2f}" if isinstance(x, float) else x) for name, x in found.items()]
    timing.tell(timing.table(("", ""), rows), "cpu")


if __name__ == "__main__":
    main()
