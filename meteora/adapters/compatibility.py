"""Whether an adapter fits a base, and whether several adapters can be stacked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from meteora.adapters.tensors import Adapter
from meteora.artifacts import AdapterSpec, Reason
from meteora.artifacts.specs import place_of
from meteora.untrusted.findings import AdapterError, Findings, counted, listed
from meteora.untrusted.safetensors_header import ITEMSIZE

SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""As mixtures were made up to version 4 of transformers, of a linear layer for each expert."""
ROUTERS = (".router", ".gate")
"""How the paths of a mixture's routers end; they were linear layers up to that version."""


class IncompatibleAdaptersError(AdapterError):
    """Adapters that cannot be experts of one base together; `reasons` says which and why."""


def fit_to_base(adapter: Adapter, base: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter with module paths of the base.

    A language model inside a multimodal one, or saved without its wrapper, has other paths:
    `model.language_model.layers.0` for `model.layers.0`. If one stack of layers in the base has all
    modules of the adapter, with their shapes, the modules get its paths, and a warning says so.

    Args:
        base: (in_features, out_features) of each linear layer, by module path.

    Raises:
        IncompatibleAdaptersError: The base lacks a module, or has it in another shape; or the
            adapter fits two of its stacks of layers, and only a person knows which is meant.
    """
    found = Findings()
    moves = {path: path for path in adapter.tensors}
    if not moves.keys() <= base.keys():
        moves = _moved(adapter, base, found)
    modules = tuple(
        sorted(
            (replace(module, path=moves[module.path]) for module in adapter.spec.modules),
            key=lambda module: module.path,
        )
    )
    fitted = replace(
        adapter,
        spec=replace(adapter.spec, modules=modules),
        tensors={path: adapter.tensors[old] for old, path in moves.items()},
    )
    _check_shapes(fitted, base, found)
    if found.refusals:
        raise IncompatibleAdaptersError(str(adapter.weights), tuple(found.refusals))
    _check_covered(fitted, base, found)
    return replace(fitted, reasons=(*adapter.reasons, *found.warnings))


def check_stackable(adapters: Mapping[str, Adapter], memory_limit_bytes: int) -> tuple[Reason, ...]:
    """Check that adapters that fit one base can be stacked.

    Args:
        adapters: By the names of their experts, in the order in which they will be stacked.
        memory_limit_bytes: The most that the stacked factors may take.

    Returns:
        Warnings, each naming the experts that it is about.

    Raises:
        IncompatibleAdaptersError: Two are the same, or together they exceed the limit.
    """
    found = Findings()
    before: dict[str, tuple[str, str]] = {}
    for name, adapter in adapters.items():
        check_duplicates(name, adapter.spec, before, found)
        before[name] = adapter.spec.id, adapter.spec.weights_sha256
    _check_dtypes(adapters, found)
    needs = stack_bytes([adapter.spec for adapter in adapters.values()])
    check_memory(len(adapters), needs, memory_limit_bytes, found, advice="leave some out")
    if found.refusals:
        raise IncompatibleAdaptersError("these cannot be stacked", tuple(found.refusals))
    return tuple(found.warnings)


def check_memory(
    num_experts: int, stacked_bytes: int, limit_bytes: int, found: Findings, *, advice: str
) -> None:
    """Refuse a stack whose factors alone exceed the limit; the message ends with the advice."""
    if stacked_bytes > limit_bytes:
        found.refuse(
            "memory",
            f"the stack of {counted(num_experts, 'expert')} has {stacked_bytes / 1e6:,.0f} MB, and"
            f" {limit_bytes / 1e6:,.0f} MB are there in all; {advice}",
        )


def stack_bytes(specs: Sequence[AdapterSpec]) -> int:
    """Return the size of the stacked factors, in the narrowest dtype that holds all exactly."""
    dtypes = {spec.dtype for spec in specs}
    itemsize = ITEMSIZE[dtypes.pop()] if len(dtypes) == 1 else 4
    return itemsize * sum(module.num_parameters for spec in specs for module in spec.modules)


def _moved(
    adapter: Adapter, base: Mapping[str, tuple[int, int]], found: Findings
) -> dict[str, str]:
    """Return the new path of each module, in the one stack of layers that has them all."""
    paths = {
        module.path: (module.in_features, module.out_features) for module in adapter.spec.modules
    }
    stems = {place.stem for path in base if (place := place_of(path))}
    own = {place.stem for path in paths if (place := place_of(path))}
    missing, *more = (path for path in paths if path not in base)
    candidates = []
    for stem in sorted(stems) if len(own) == 1 else []:
        old = next(iter(own))
        moves = {p: stem + p[len(old) :] if p.startswith(f"{old}.") else p for p in paths}
        if all(base.get(new) == paths[path] for path, new in moves.items()):
            candidates.append((stem, moves))
    if len(candidates) == 1:
        ((stem, moves),) = candidates
        found.warn("moved", f"its modules lie under {next(iter(own))}, the base's under {stem}")
        return moves
    if candidates:
        either = listed([stem for stem, _ in candidates])
        found.refuse("ambiguous", f"it fits several stacks of layers of the base: {either}")
    elif SINGLE_EXPERT.search(missing) and not any(map(SINGLE_EXPERT.search, base)):
        found.refuse(
            "not_in_base",
            f"{missing} is a layer of one expert of a mixture, and this base has all experts of a"
            " layer in one tensor, which is not routed; only linear layers are",
        )
    elif all(path.endswith(ROUTERS) for path in (missing, *more)):
        found.refuse(
            "not_in_base",
            f"the base has no linear layer {missing}. The router of a mixture returns its choices,"
            " too, so nothing can be added to it: train the adapter without it, or check which base"
            " it was trained on",
        )
    else:
        found.refuse(
            "not_in_base",
            f"the base has no linear layer {missing}; its layers lie under {listed(sorted(stems))}."
            " Check which base the adapter was trained on",
        )
    return {path: path for path in paths}


def _check_shapes(adapter: Adapter, base: Mapping[str, tuple[int, int]], found: Findings) -> None:
    for module in adapter.spec.modules:
        sizes = (module.in_features, module.out_features)
        if (needed := base.get(module.path, sizes)) != sizes:
            found.refuse(
                "other_base",
                f"{module.path} has {sizes[0]} inputs and {sizes[1]} outputs, in the base"
                f" {needed[0]} and {needed[1]}; check which base the adapter was trained on",
            )
            return


def _check_covered(adapter: Adapter, base: Mapping[str, tuple[int, int]], found: Findings) -> None:
    """Warn where the adapter has a kind of layer in some of the base's layers and not in all."""
    kinds = {(place.stem, place.leaf) for path in adapter.tensors if (place := place_of(path))}
    of_kind = [
        path
        for path in sorted(base)
        if (place := place_of(path)) and (place.stem, place.leaf) in kinds
    ]
    if absent := [path for path in of_kind if path not in adapter.tensors]:
        found.warn(
            "partial",
            f"of the {len(of_kind)} layers of the kinds that it targets, it has no LoRA for"
            f" {len(absent)}: {listed(absent)}",
        )


def _check_dtypes(adapters: Mapping[str, Adapter], found: Findings) -> None:
    dtypes: dict[str, str] = {}
    for name, adapter in adapters.items():
        dtypes.setdefault(adapter.spec.dtype, name)
    if len(dtypes) > 1:
        kinds = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        found.warn("dtype_mix", f"experts of several dtypes: {kinds}; the widest holds them all")


def check_duplicates(
    name: str, spec: AdapterSpec, others: Mapping[str, tuple[str, str]], found: Findings
) -> None:
    """Refuse an adapter that is an expert already; warn where only its weights are the same.

    Args:
        others: By the names of the experts, the id of each adapter and the hash of its weights.
    """
    for one, (adapter_id, weights_sha256) in others.items():
        if adapter_id == spec.id:
            found.refuse("same_adapter", f"{one} and {name} are the same adapter; leave one out")
        elif weights_sha256 == spec.weights_sha256:
            found.warn(
                "same_weights",
                f"{one} and {name} have the same weights under configs that differ; no router can"
                " tell them apart by what they do",
            )
