"""Stack adapters along the rank into one file of experts; the base is never loaded.

    A of q_proj   [8, IN] of expert 0        B of q_proj   [OUT, 8 | OUT, 4]
                  [4, IN] of expert 1                      side by side
                  one above the other

The numbers are copied and never changed: the slice of expert e holds what its file holds, and the
scaling stays beside the tensors, in the manifest.
"""

from __future__ import annotations

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

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        with ExitStack() as files:
            opened = [
                # pread: a file that is cut short under our feet is an error and not a crash
                files.enter_context(safe_open(adapter.weights, framework="pt", backend="pread"))
                for adapter in adapters
            ]
            for done, path in enumerate(entries):
                yield _stack_module(adapters, opened, path)
                progress(done + 1, len(entries))

    checkpoint.write_experts(out, shapes, common_dtype(specs), pairs())


def _stack_module(
    adapters: Sequence[Adapter], opened: Sequence[safe_open], path: str
) -> tuple[Tensor, Tensor]:
    """A [R, IN] and B [OUT, R] of one module, of every adapter that has it."""
    parts_a, parts_b = [], []
    for adapter, file in zip(adapters, opened, strict=True):
        if (names := adapter.tensors.get(path)) is None:
            continue
        a, b = file.get_tensor(names.a_key), file.get_tensor(names.b_key)
        for key, tensor in ((names.a_key, a), (names.b_key, b)):
            if not tensor.isfinite().all():
                raise BadNumbersError(
                    f"{adapter.weights}: {key} holds NaN or infinity, which would poison every"
                    " output; leave this adapter out of the recipe, or get a sound copy"
                )
        parts_a.append(a.T if names.transposed else a)
        parts_b.append(b.T if names.transposed else b)
    wide = parts_a[0].dtype
    for part in (*parts_a, *parts_b):
        wide = torch.promote_types(wide, part.dtype)
    return torch.cat([part.to(wide) for part in parts_a]), torch.cat(
        [part.to(wide) for part in parts_b], dim=1
    )
