"""Stack adapters along the rank into one file of experts, without the base.

    A of q_proj   [8, IN] of expert 0        B of q_proj   [OUT, 8 | OUT, 4]
                  [4, IN] of expert 1                      side by side
                  one above the other

The numbers are copied and never changed: the slice of expert e equals the tensors of its file, and
the scaling is in the manifest, not in the tensors.
"""

import errno
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from meteora.adapters.tensors import Adapter, AdapterTensors
from meteora.adapters.weights import DTYPES, AdapterWeights
from meteora.artifacts import AdapterModule, AdapterSpec, MeteoraError
from meteora.checkpoint.interleave import StackOfB, rows_of_a, staging
from meteora.checkpoint.manifest import ModuleEntry
from meteora.checkpoint.tensors import write_experts

OTHER_FILES = 256
"""Files beside the adapters that a process may have open."""


class OpenFilesError(MeteoraError):
    """There are more adapters than files that this process may have open."""


def module_entries(specs: Sequence[AdapterSpec]) -> dict[str, ModuleEntry]:
    """Return sizes, ranks and scalings of every module that an adapter targets, sorted by path."""
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


def common_dtype(specs: Sequence[AdapterSpec]) -> torch.dtype:
    """Return the narrowest dtype that holds the numbers of all adapters exactly."""
    return reduce(torch.promote_types, (DTYPES[spec.dtype] for spec in specs))


def stack_adapters(adapters: Sequence[Adapter], out: Path) -> None:
    """Write `experts.safetensors` from adapters that `check_stackable` accepted.

    The B's of one module are in memory at a time.

    Args:
        adapters: expert e is adapters[e]
        out: the file to write; rename it when it is whole

    Raises:
        ChangedAdapterError: a file has changed since it was read and checked.
        OpenFilesError: the process may not open so many files at once.
    """
    specs = [adapter.spec for adapter in adapters]
    entries, dtype = module_entries(specs), common_dtype(specs)

    def rows() -> Iterator[tuple[Iterator[Tensor], Iterator[Tensor]]]:
        stacks_of_b = {
            sizes: StackOfB(*sizes, dtype)
            for sizes in {(_owned(entry), entry.out_features) for entry in entries.values()}
        }
        memory = staging(max(stack.num_bytes for stack in stacks_of_b.values()))
        for stack_of_b in stacks_of_b.values():
            stack_of_b.stage(memory)
        with ExitStack() as files:
            opened = _opened(adapters, files)
            for path, entry in entries.items():
                sources = [(file, names[path]) for file, names in opened if path in names]
                stack_of_b = stacks_of_b[_owned(entry), entry.out_features]
                yield rows_of_a(sources, dtype), stack_of_b.rows(sources)

    write_experts(out, entries, dtype, rows())


def _opened(
    adapters: Sequence[Adapter], files: ExitStack
) -> list[tuple[AdapterWeights, Mapping[str, AdapterTensors]]]:
    """Open every adapter's file; raise the limit of open files if it is too low."""
    wanted = len(adapters) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        return [(files.enter_context(AdapterWeights(one)), one.tensors) for one in adapters]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise OpenFilesError(
            f"{len(adapters)} adapters are open at once while they are stacked, and this process"
            f" may open {max(soft, hard)} files; raise the limit with `ulimit -n {wanted}`"
        ) from error


def _owned(entry: ModuleEntry) -> tuple[int, ...]:
    """Return the ranks of the experts that have the module."""
    return tuple(r for r in entry.ranks if r)
