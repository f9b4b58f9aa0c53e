"""How the benchmarks of the routed layer take time, and on what.

All variants take turns in one process, so that a busy moment meets them all, and what is told is
the ratio of the best times. One thread on a CPU is timed by the time that it computed: what others
on the machine do to it then shows in its caches alone. Threads and GPUs are timed by the clock.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from meteora.kernels import onednn


def ask(parser: argparse.ArgumentParser) -> None:
    """What every benchmark is asked."""
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--device", default="cpu", type=there, help="such as cuda")


def there(device: str) -> str:
    """The device, if this machine has it and this torch can use it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        found = torch.accelerator.current_accelerator(check_available=True)
        usable = "cpu" if found is None else f"cpu and {found.type}"
        raise argparse.ArgumentTypeError(
            f"{device!r} is not there, or torch {torch.__version__} cannot use it; name one of"
            f" {usable}"
        ) from None
    return device


NEEDED = "bare base", "meteora"
"""The variants that every table of peers has."""


def ask_which(parser: argparse.ArgumentParser) -> None:
    """What benchmarks with peers are asked besides."""
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the peers; all without it")


def built(
    made: Mapping[str, tuple[Callable[[], nn.Module], str]], only: Sequence[str] | None
) -> dict[str, tuple[nn.Module, str]]:
    """The variants that are asked for, and those alone are made.

    The linear layers of all multiply by the same library.

    Args:
        made: by name, how to make it and the name of its floor
    """
    unknown = set(only or ()) - made.keys()
    if unknown:
        raise SystemExit(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(made)}")
    variants = {
        name: (make(), floor)
        for name, (make, floor) in made.items()
        if only is None or name in {*only, *NEEDED}
    }
    for model, _ in variants.values():
        onednn.use_in(model)
    return variants


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """What one run takes, once the device has finished what it was given before."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    wait = (lambda: None) if on_cpu else torch.accelerator.synchronize
    with torch.inference_mode():
        wait()
        start = clock()
        run()
        wait()
        return clock() - start


def best_of(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    *,
    limit_seconds: float = float("inf"),
) -> dict[str, float]:
    """The shortest time of each; they take turns.

    Args:
        rounds: at most so many, after one that is not counted
        limit_seconds: begin no further round after this time, but do three
    """
    best = dict.fromkeys(runs, float("inf"))
    started = time.perf_counter()
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if number:
                best[name] = min(best[name], taken)
        if number >= 3 and time.perf_counter() - started > limit_seconds:
            break
    return best


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured with."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    found = {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)} | found
    return found


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def tell(text: str, device: str) -> None:
    """Print tables, and below them the machine."""
    facts = "".join(f"- {name}: {value}\n" for name, value in machine(device).items())
    sys.stdout.write(f"{text}\n{facts}")
