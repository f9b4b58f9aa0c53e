"""Stack adapters along the rank into one file of experts; the base is never loaded.

    A of q_proj   [8, IN] of expert 0        B of q_proj   [OUT, 8 | OUT, 4]
                  [4, IN] of expert 1                      side by side
                  one above the other

The numbers are copied and never changed: the slice of expert e holds what its file holds, and the
scaling stays beside the tensors, in the manifest.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from meteora import checkpoint
from meteora.artifacts import MeteoraError
from meteora.checkpoint import DTYPES, ModuleEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from meteora.adapters import Adapter
    from meteora.artifacts import AdapterModule, AdapterSpec


class BadNumbersError(MeteoraError):
    """An adapter's weights hold numbers that would poison every output."""


def module_entries(specs: Sequence[AdapterSpec]) -> dict[str, ModuleEntry]:
    """Sizes, ranks and scalings of every layer that some adapter targets, sorted by path."""
    by_path: dict[str, dict[int, AdapterModule]] = {}
    for e, spec in enumerate(specs):
        for module in spec.modules:
            by_path.setdefault(module.path, {})[e] = module
    entries = {}
    for path in sorted(by_path):
        owners = by_path[path]
        first = next(iter(owners.values()))
        entries[path] = ModuleEntry(
            first.in_features,
            first.out_features,
            tuple(owners[e].r if e in owners else 0 for e in range(len(specs))),
            tuple(owners[e].scaling if e in owners else 0.0 for e in range(len(specs))),
        )
    return entries


def common_dtype(specs: Sequence[AdapterSpec]) -> str:
    """The narrowest dtype that holds every adapter's numbers exactly."""
    wide = DTYPES[specs[0].dtype]
    for spec in specs:
        wide = torch.promote_types(wide, DTYPES[spec.dtype])
    return next(name for name, dtype in DTYPES.items() if dtype == wide)


def stack(
    adapters: Sequence[Adapter],
    out: Path,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write `experts.safetensors` from adapters that `check_stackable` accepted.

    Memory holds one module's tensors at a time.

    Args:
        adapters: expert e is adapters[e]
        out: the file to write; rename it when it is whole
        progress: called with (modules done, modules in all)

    Raises:
        BadNumbersError: a tensor holds NaN or infinity.
    """
    specs = [adapter.spec for adapter in adapters]
    entries = module_entries(specs)
    shapes = {
        path: (sum(entry.ranks), entry.in_features, entry.out_features)
        for path, entry in entries.items()
    }

    dtype = common_dtype(specs)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        """Each module's A and B in the same memory: what is yielded is gone at the next."""
        sizes = [rank * (num_in + num_out) for rank, num_in, num_out in shapes.values()]
        memory = torch.empty(max(sizes), dtype=DTYPES[dtype])
        with ExitStack() as files:
            opened = [
                # pread: a file that is cut short under our feet is an error and not a crash
                files.enter_context(safe_open(adapter.weights, framework="pt", backend="pread"))
                for adapter in adapters
            ]
            for done, (path, (rank, num_in, num_out)) in enumerate(shapes.items()):
                a, b = memory[: rank * (num_in + num_out)].split([rank * num_in, rank * num_out])
                a, b = a.view(rank, num_in), b.view(num_out, rank)
                _fill(a, b, adapters, opened, path)
                yield a, b
                progress(done + 1, len(shapes))

    checkpoint.write_experts(out, shapes, dtype, pairs())


def _fill(
    stack_a: Tensor,
    stack_b: Tensor,
    adapters: Sequence[Adapter],
    opened: Sequence[safe_open],
    path: str,
) -> None:
    """Lay A and B of every adapter that has the module end to end along the rank."""
    start = 0
    for adapter, file in zip(adapters, opened, strict=True):
        if (names := adapter.tensors.get(path)) is None:
            continue
        a, b = file.get_tensor(names.a_key), file.get_tensor(names.b_key)
        for key, tensor in ((names.a_key, a), (names.b_key, b)):
            if not all(map(math.isfinite, _extremes(tensor))):
                raise BadNumbersError(
                    f"{adapter.weights}: {key} holds NaN or infinity, which would poison every"
                    " output; leave this adapter out of the recipe, or get a sound copy"
                )
        if names.transposed:
            a, b = a.T, b.T
        ranks = slice(start, start := start + len(a))
        stack_a[ranks], stack_b[:, ranks] = a, b  # a wider dtype holds them exactly


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """Least and greatest number, NaN if there is one: much faster than a mask of the finite."""
    least, greatest = tensor.aminmax()
    return least.item(), greatest.item()
