"""What the kernels become for a GPU that is not there.

    python -m tests.meteora.kernels.triton_ahead ARCHITECTURE RANK...

`triton_launch` itself launches them, with tensors on the CPU, through a driver that compiles for
the architecture (80, 90, …) and runs nothing. It prints one line of JSON for each kernel that was
compiled: its name, the dtype and the largest rank that it was first launched for, the shared memory
that it needs, in bytes, and whether it multiplies on tensor cores.
"""

import json
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore")  # Triton 3.9 tells of a default of 3.10

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from meteora.kernels import reference, triton_launch  # noqa: E402
from meteora.kernels.stack import ExpertStack  # noqa: E402

NUM_IN, NUM_OUT, TOP_K = 640, 384, 2
LAUNCHES = ("gather", 1), ("gather", 40), ("grouped", 40), ("grouped", 47), ("grouped", 128)
"""Kernels and numbers of tokens: where these are few, tiles are others."""


class CompilesOnly:
    """What Triton asks of a driver."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.utils = self

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def launcher_cls(self, _source, _metadata):
        return lambda *_launch: None

    def get_device_properties(self, _device):
        return {"max_shared_mem": sys.maxsize}

    def load_binary(self, *_kernel):
        return object(), object(), 0, 0, 1024

    def unload_module(self, _module):
        pass


def launch(kernel, num_tokens, r, dtype):
    """On experts of rank r, 0 and 1."""
    x = torch.zeros(num_tokens, NUM_IN, dtype=dtype)
    a, b = torch.zeros(r + 1, NUM_IN, dtype=dtype), torch.zeros(r + 1, NUM_OUT, dtype=dtype).T
    stack = ExpertStack(a, b, [r, 0, 1], [1.0] * 3)
    routes = reference.route(torch.randn(num_tokens, stack.num_choices), TOP_K)
    getattr(triton_launch, f"lora_delta_{kernel}")(x, stack, *routes)


def main():
    architecture, *ranks = map(int, sys.argv[1:])
    stand_in: Any = CompilesOnly(architecture)
    driver.set_active(stand_in)
    launched_for = {}

    def tell(_module, _function, name, files, _hash):
        made = {Path(path).suffix: Path(path) for path in files.values()}
        told = {
            "kernel": name,
            **launched_for,
            "shared": json.loads(made[".json"].read_text())["shared"],
            "tensor_cores": "mma" in made[".ptx"].read_text(),
        }
        sys.stdout.write(json.dumps(told) + "\n")

    when_loaded: Any = knobs.runtime.kernel_load_start_hook
    when_loaded.add(tell)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, r, (kernel, num_tokens) in product(dtypes, ranks, LAUNCHES):
        launched_for |= {"dtype": str(dtype).removeprefix("torch."), "r": r}
        launch(kernel, num_tokens, r, dtype)


if __name__ == "__main__":
    main()
