"""Rank and scaling of each module: shapes from the tensors, alphas from the config, as in PEFT."""

import math
from collections.abc import Mapping, Sequence

from meteora.adapters.config import Claim
from meteora.adapters.tensors import DTYPES, AdapterTensors
from meteora.artifacts.specs import HEADS, AdapterModule, place_of
from meteora.untrusted.config_fields import ALL_LINEAR, MAX_RANK, Field
from meteora.untrusted.findings import Findings, listed, shortened
from meteora.untrusted.patterns import Budget, PatternError, matching
from meteora.untrusted.safetensors_header import TensorInfo

MAX_SCALING = 1_000
"""A larger scaling gets a warning."""


def read_modules(
    pairs: Mapping[str, AdapterTensors],
    tensors: Mapping[str, TensorInfo],
    stripped: Sequence[str],
    claim: Claim,
    found: Findings,
) -> tuple[AdapterModule, ...]:
    """Return sizes, rank and scaling of each module whose factors multiply."""
    budget = Budget()
    modules: list[AdapterModule] = []
    shapes = _shapes(pairs, tensors, found)
    try:
        alphas = _table(claim.alpha_pattern, claim.lora_alpha, list(shapes), budget)
        for path, (in_features, out_features, r) in shapes.items():
            if claim.format == "mlx":
                lora_alpha, scaling = claim.scale * r, claim.scale
            else:
                lora_alpha = alphas[path]
                scaling = lora_alpha / (math.sqrt(r) if claim.use_rslora else r)
            modules.append(AdapterModule(path, in_features, out_features, r, lora_alpha, scaling))
    except PatternError as error:
        found.refuse("pattern", f"a pattern in alpha_pattern cannot be matched: {error}")
    # other patterns are only compared with the tensors, and the tensors win: a warning is enough
    try:
        _check_ranks(claim, {path: r for path, (_, _, r) in shapes.items()}, budget, found)
    except PatternError as error:
        found.warn(
            "pattern_unchecked", f"rank_pattern is not checked, ranks are the tensors': {error}"
        )
    try:
        _check_targets(claim, list(pairs), stripped, budget, found)
    except PatternError as error:
        found.warn("pattern_unchecked", f"a pattern of what it targets is not checked: {error}")
    if large := [m.path for m in modules if m.scaling > MAX_SCALING]:
        found.warn("large_scaling", f"scaled by more than {MAX_SCALING}: {listed(large)}")
    _check_even(list(pairs), found)
    return tuple(modules)


def _shapes(
    pairs: Mapping[str, AdapterTensors], tensors: Mapping[str, TensorInfo], found: Findings
) -> dict[str, tuple[int, int, int]]:
    """IN, OUT and r of each module whose factors are matrices that multiply."""
    shapes = {}
    dtypes: list[str] = []
    mismatched: list[str] = []
    not_matrices: list[str] = []
    for path, pair in pairs.items():
        factors = tensors[pair.a_key], tensors[pair.b_key]
        others = sorted({t.dtype for t in factors} - set(DTYPES))
        dtypes += [f"{path} ({dtype})" for dtype in others]
        a, b = (t.shape[::-1] if pair.transposed else t.shape for t in factors)
        if len(a) == len(b) == 2 and a[0] == b[1]:
            shapes[path] = (a[1], b[0], a[0])
            if a[0] > MAX_RANK:
                Field(a[0], f"the rank of {shortened(path)}", found).rank()
        else:
            what = f"{path} (A {list(factors[0].shape)}, B {list(factors[1].shape)})"
            (mismatched if len(a) == len(b) == 2 else not_matrices).append(what)
    if dtypes:
        found.refuse("dtype", f"{listed(dtypes)}: only {', '.join(DTYPES)} can be used")
    if mismatched:
        found.refuse(
            "shape",
            f"{listed(mismatched)}: these do not multiply; a factor is transposed, or they are of"
            " different adapters",
        )
    if not_matrices:
        found.refuse(
            "not_linear",
            f"{listed(not_matrices)}: these are no matrices, as of a convolution or of a mixture's"
            " fused experts; only linear layers are routed here",
        )
    return shapes


def _table(
    entries: Sequence[tuple[str, float]], default: float, paths: list[str], budget: Budget
) -> dict[str, float]:
    """Apply `rank_pattern` or `alpha_pattern`: the first key that matches, else the default."""
    values = dict.fromkeys(paths, default)
    for key, value in reversed(entries):
        try:
            values.update(dict.fromkeys(matching(key, paths, budget, anywhere=True), value))
        except PatternError as error:
            raise PatternError(f"{shortened(key)!r}: {error}") from None
    return values


def _check_ranks(claim: Claim, ranks: Mapping[str, int], budget: Budget, found: Findings) -> None:
    claimed = _table(claim.rank_pattern, claim.r, list(ranks), budget)
    mismatched = [
        f"{path} ({r}, not {wanted})"
        for path, r in ranks.items()
        if (wanted := claimed[path]) and wanted != r
    ]
    # of fused experts, which are refused, a factor has r rows for each one
    if mismatched and all(reason.code != "target_parameters" for reason in found.refusals):
        found.refuse(
            "rank_mismatch",
            f"tensors have other ranks than the config claims: {listed(mismatched)}",
        )


def _check_targets(
    claim: Claim, paths: list[str], stripped: Sequence[str], budget: Budget, found: Findings
) -> None:
    """Warn if the config targets other modules than the file holds; the file wins."""
    targets = claim.target_modules
    left_out = {part for key in stripped for part in key.split(".")}
    tied = HEADS if claim.ensure_weight_tying and "lora_embedding_A" in left_out else set()
    untargeted: list[str] = []
    if targets not in ((), "", ALL_LINEAR):
        named = _named(targets, paths, budget)
        untargeted = [
            path for path in paths if path not in named and path.rpartition(".")[2] not in tied
        ]
    if not isinstance(targets, str):
        idle = sorted(set(targets).difference(*map(_endings, paths)))
        excluded = _named(claim.exclude_modules, idle, budget)
        excluded.update(target for target in idle if target.rpartition(".")[2] in left_out)
        if idle := [target for target in idle if target not in excluded]:
            found.warn("idle_target", f"it targets {listed(idle)}, and no tensor is of it")
    untargeted += sorted(_named(claim.exclude_modules, paths, budget))
    if claim.layers_to_transform:
        layers = set(claim.layers_to_transform)
        untargeted += [path for path in paths if (p := place_of(path)) and p.layer not in layers]
    if untargeted:
        found.warn(
            "untargeted",
            f"{listed(untargeted)} is in the file and not targeted by the config; it is used here,"
            " where PEFT leaves it out",
        )


def _named(names: tuple[str, ...] | str, paths: list[str], budget: Budget) -> set[str]:
    """Return the modules that a list of names or a pattern targets, by PEFT's rule."""
    if isinstance(names, str):
        return matching(names, paths, budget)
    chosen = set(names)
    return {path for path in paths if not _endings(path).isdisjoint(chosen)}


def _endings(path: str) -> set[str]:
    """`a.b.c`, `b.c` and `c`: the names by which a list can target a module."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _check_even(paths: list[str], found: Findings) -> None:
    """Warn of a module that some layers lack: a file may be incomplete; hybrid models are so."""
    layers: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if place := place_of(path):
            layers.setdefault((place.stem, place.leaf), set()).add(place.layer)
    known: dict[str, set[int]] = {}
    for (stem, _), have in layers.items():
        known.setdefault(stem, set()).update(have)
    for (stem, leaf), have in sorted(layers.items()):
        if lacking := sorted(known[stem] - have):
            found.warn(
                "uneven_layers",
                f"{leaf} is in {len(have)} of {len(known[stem])} layers of {stem}; the first"
                f" without it is {lacking[0]}",
            )
            return
