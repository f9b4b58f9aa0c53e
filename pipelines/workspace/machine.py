"""The device that models run on, and its speed: measured in a second, for estimates."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from meteora.artifacts import MeteoraError
from meteora.kernels.onednn import linear
from meteora.untrusted.findings import counted

SECONDS = 0.15
"""For each of the measurements."""
SIZE = 2048
"""Rows and columns of the matrices."""
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, and the names of those that this process is in."""
MOST = 0.6
"""The largest share of the memory for the weights of a model."""


class DeviceError(MeteoraError):
    """The machine has no such device."""


@dataclass(frozen=True)
class Machine:
    """Throughputs of the device that a run would compute on."""

    name: str
    flops_per_second: float
    """Of matrix products in the base's dtype, with 512 tokens at a time."""
    read_bytes_per_second: float
    """Of products with one token: nearly all their time goes to reading the weights."""
    call_seconds: float
    """The time of the smallest operation: the overhead of Python and the device."""
    hash_bytes_per_second: float
    memory_bytes: float
    is_cpu: bool = False

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.name}: {self.flops_per_second / 1e9:,.0f} GFLOP/s,"
            f" {self.read_bytes_per_second / 1e9:,.1f} GB/s,"
            f" {self.call_seconds * 1e6:.1f} µs a call"
        )


LARGE = Machine("one H100, by its data sheet", 700e12, 3.3e12, 6e-6, 1e9, 80e9)
"""For plans that are made on a machine without a GPU; not measured."""


@cache
def measure_machine(dtype: torch.dtype) -> Machine:
    """Time a few operations on the device that a run would use, once a process."""
    device = torch.device(choose_device())
    # eight matrices, so that no cache holds them all
    weights = [torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(8)]
    batch, token = (torch.randn(n, SIZE, device=device).to(dtype) for n in (512, 1))
    small = torch.zeros(1, device=device)
    data = bytes(8 << 20)
    with torch.inference_mode():
        flops = _rate(device, lambda i: linear(batch, weights[i % 8])) * 2 * 512 * SIZE * SIZE
        reads = _rate(device, lambda i: linear(token, weights[i % 8])) * weights[0].nbytes
        calls = _rate(device, lambda _: small.add_(1.0))
    hashed = _rate(torch.device("cpu"), lambda _: hashlib.sha256(data)) * len(data)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu with {counted(torch.get_num_threads(), 'thread')}"
    is_cpu = device.type == "cpu"
    return Machine(name, flops, reads, 1 / calls, hashed, memory_bytes(device), is_cpu)


def choose_device(name: str = "auto") -> str:
    """The device for models, as torch names it.

    Args:
        name: `auto` for the GPU if there is one; or a name such as `cpu`, `cuda`, `cuda:1`, `mps`

    Raises:
        DeviceError: There is no such device here.
    """
    if name == "auto":
        return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DeviceError(
            f"torch finds no device {name!r} on this machine, only {', '.join(_devices())}; name"
            " one of these, or `auto`"
        ) from None
    return name


def device_name(device: torch.device | str, dtype: str = "auto") -> str:
    """The name of the GPU, or the kind of another device; with the dtype if a person named one."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if dtype == "auto" else f"{name}, {dtype}"


def _devices() -> list[str]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def is_too_large(num_bytes: float, memory_bytes: float) -> bool:
    """Whether weights of this size leave too little memory for the computation."""
    return num_bytes > MOST * memory_bytes


def memory_bytes(device: str | torch.device | None = None) -> int:
    """The total memory of a device; of the CPU, at most what this process may use.

    Args:
        device: a name from `choose_device`; None for the device that a run would use
    """
    place = torch.device(device or choose_device())
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> Iterator[int]:
    """The limits of memory, in bytes, of this process's control groups, such as a container's."""
    lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines() if OWN_GROUPS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not there, or `max`
                yield int((folder / name).read_text(encoding="utf-8"))


def _rate(device: torch.device, do: Callable[[int], object]) -> float:
    """Calls per second."""
    do(0)
    _wait(device)
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < SECONDS:
        for i in range(4):
            do(i)
        _wait(device)
        done += 4
    return done / spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
