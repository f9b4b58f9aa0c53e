"""Add or drop one expert of a checkpoint, without the adapters that it was made from."""

from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from meteora.adapters.tensors import Adapter
from meteora.adapters.weights import DTYPES, AdapterWeights
from meteora.artifacts import MeteoraError
from meteora.checkpoint.manifest import (
    ExpertEntry,
    Manifest,
    ModuleEntry,
    check_name,
    number_of,
    read_manifest,
)
from meteora.checkpoint.tensors import ExpertsFile, open_experts, write_experts


class EditError(MeteoraError):
    """This expert cannot be added to the checkpoint, or cannot be dropped from it."""


def check_new_name(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise `EditError` if no expert of that name can be added."""
    if reason := check_name(name):
        raise EditError(f"{folder}: {reason}; give another name")
    if name in manifest.names:
        raise EditError(f"{folder}: there is an expert {name!r} already; give another name")


def add_expert(folder: Path, adapter: Adapter, entry: ExpertEntry, out: Path) -> Manifest:
    """Write the stack of a checkpoint with one more adapter, the last in order.

    Args:
        folder: the checkpoint; it stays as it is
        adapter: read, and fitted to the base of the checkpoint
        out: the file of experts to write

    Returns:
        The manifest of the larger stack, without gates.

    Raises:
        EditError: the checkpoint has an expert of that name, or a module of another size; or the
            name is not one that a checkpoint can have.
        ChangedAdapterError: the adapter's file has changed since it was read and checked.
    """
    manifest = read_manifest(folder)
    check_new_name(folder, manifest, entry.name)
    own = {module.path: module for module in adapter.spec.modules}
    none = (0,) * len(manifest.experts)
    known = {
        path: ModuleEntry(new.in_features, new.out_features, none, tuple(map(float, none)))
        for path, new in own.items()
    } | manifest.modules
    modules = {}
    for path, old in sorted(known.items()):
        new = own.get(path)
        if new and (new.in_features, new.out_features) != (old.in_features, old.out_features):
            raise EditError(
                f"{path}: {entry.name} takes {new.in_features} inputs and gives {new.out_features},"
                f" the checkpoint has {old.in_features} and {old.out_features}; it was trained for"
                " another base"
            )
        modules[path] = replace(
            old,
            ranks=(*old.ranks, new.r if new else 0),
            scaling=(*old.scaling, new.scaling if new else 0.0),
        )
    larger = _changed(manifest, (*manifest.experts, entry), modules)
    with open_experts(folder, manifest) as before, AdapterWeights(adapter) as file:

        def factors(path: str) -> tuple[Tensor, Tensor]:
            parts = [before.factors(path)] if path in manifest.modules else []
            if path in own:
                parts.append(file.factors(adapter.tensors[path]))
            return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)

        write_experts(out, larger.modules, _wider(before, adapter), map(factors, larger.modules))
    return larger


def larger_bytes(folder: Path, adapter: Adapter) -> int:
    """Return the bytes of the factors that `add_expert` would write."""
    numbers = sum(module.num_parameters for module in adapter.spec.modules)
    manifest = read_manifest(folder)
    for entry in manifest.modules.values():
        numbers += entry.num_ranks * (entry.in_features + entry.out_features)
    with open_experts(folder, manifest) as before:
        return numbers * _wider(before, adapter).itemsize


def drop_expert(
    folder: Path,
    name: str,
    out: Path,
    *,
    keep: AbstractSet[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> Manifest:
    """Write the stack of a checkpoint without one expert, and without modules that only it has.

    Args:
        keep: modules that stay even without ranks, since their gates decide for others or they
            have offsets
        dtype: of the new file; None: that of the stack

    Raises:
        UnknownExpertError: there is no such expert.
        EditError: there is no other.
    """
    manifest = read_manifest(folder)
    gone = number_of(name, manifest.names, folder)
    if len(manifest.experts) == 1:
        raise EditError(
            f"{name!r} is the only expert of {folder}, and a checkpoint needs one; `meteora add` a"
            " second one first"
        )
    kept = [e for e in range(len(manifest.experts)) if e != gone]
    modules = {
        path: replace(
            entry,
            ranks=tuple(entry.ranks[e] for e in kept),
            scaling=tuple(entry.scaling[e] for e in kept),
        )
        for path, entry in manifest.modules.items()
        if path in keep or entry.num_ranks > entry.ranks[gone]
    }
    smaller = _changed(manifest, tuple(manifest.experts[e] for e in kept), modules)
    with open_experts(folder, manifest) as before:

        def factors(path: str) -> tuple[Tensor, Tensor]:
            ranks = manifest.modules[path].ranks
            start, stop = sum(ranks[:gone]), sum(ranks[: gone + 1])
            a, b = before.factors(path)
            return torch.cat([a[:start], a[stop:]]), torch.cat([b[:, :start], b[:, stop:]], dim=1)

        write_experts(out, smaller.modules, dtype or before.dtype, map(factors, smaller.modules))
    return smaller


def _changed(
    manifest: Manifest, experts: tuple[ExpertEntry, ...], modules: dict[str, ModuleEntry]
) -> Manifest:
    return replace(
        manifest, experts=experts, modules=modules, gates={}, fused_id="", router_id="", files={}
    )


def _wider(file: ExpertsFile, adapter: Adapter) -> torch.dtype:
    """Return the narrowest dtype that holds the stack and the adapter exactly."""
    return torch.promote_types(file.dtype, DTYPES[adapter.spec.dtype])
