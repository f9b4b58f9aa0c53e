"""Read an adapter as it was published, or say why it cannot be an expert.

The safetensors header is the truth, and the config is a claim about it. Nothing that came with an
adapter is run, and importing this module loads no tensor library.
"""

import hashlib
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from meteora.adapters import finite
from meteora.adapters.config import Claim, OnExtras
from meteora.adapters.files import CONFIG, find_files, is_regular, other_format, read_claim
from meteora.adapters.modules import read_modules
from meteora.adapters.tensors import Adapter, AdapterTensors, Stamp, refuse_variants, sort_tensors
from meteora.artifacts import AdapterSpec, Reason
from meteora.untrusted.findings import AdapterError, Findings, listed
from meteora.untrusted.safetensors_header import HeaderError, TensorInfo, read_header

MAX_BYTES = 64 << 30
"""All weights are read and hashed, and a file that is all hole may have any size. A LoRA of rank
256 on every linear layer of a 70B model has 7 GB in 16 bits."""
TICK_NS = 100_000_000
"""File systems have coarse clocks: a change so soon after another may leave the same time."""


@dataclass(frozen=True)
class Verdict:
    """The result of `check` for one adapter."""

    path: str
    verdict: Literal["accept", "warn", "refuse"]
    reasons: tuple[Reason, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """Sizes, ranks, scalings and the like, as far as they could be read."""

    def to_dict(self) -> dict[str, Any]:
        reasons = [reason.to_dict() for reason in self.reasons]
        return {"path": self.path, "verdict": self.verdict, "reasons": reasons, **self.facts}


def read(folder: Path, *, modules_to_save: OnExtras = "refuse") -> Adapter:
    """Read the adapter in `folder`; every byte of its weights is hashed and checked.

    Args:
        folder: Holds `adapter_config.json` and the weights.
        modules_to_save: What to do with whole modules that it saved beside its LoRA (a head, an
            embedding): refuse the adapter, or leave them out and list them in `spec.stripped`.

    Raises:
        AdapterError: It cannot be an expert, for the reasons that the error carries.
    """
    found = Findings()
    adapter, _ = _judged(Path(folder), modules_to_save, found)
    if adapter is None and not found.refusals:
        found.refuse("no_weights", "there are no weights beside this config")
    if found.refusals or adapter is None:
        raise AdapterError(str(folder), tuple(found.refusals))
    return adapter


def check_config(folder: Path, where: str, *, modules_to_save: OnExtras = "refuse") -> None:
    """Raise what `read` would raise for the config alone, before the weights are downloaded.

    What the config claims about tensors beside the LoRA is left to `read`: the file may lack them.

    Args:
        folder: Holds `adapter_config.json`.
        where: The name of the adapter in the error.

    Raises:
        AdapterError: It cannot be an expert, whatever its weights are.
    """
    found = Findings()
    with _refused_if_unreadable(found):
        read_claim(folder / CONFIG, modules_to_save, found)
    if found.refusals:
        raise AdapterError(where, tuple(found.refusals))


def check(path: Path, *, modules_to_save: OnExtras = "refuse") -> Verdict:
    """Judge the file or folder at `path`; never raises an error about its content.

    A config without weights is judged by its claims; the facts then have `judged_by: claims`.
    """
    found = Findings()
    _, facts = _judged(Path(path), modules_to_save, found)
    verdict = "refuse" if found.refusals else "warn" if found.warnings else "accept"
    return Verdict(str(path), verdict, (*found.refusals, *found.warnings), facts)


def _judged(path: Path, extras: OnExtras, found: Findings) -> tuple[Adapter | None, dict[str, Any]]:
    """As `_examine`; an error of the file system is a refusal."""
    with _refused_if_unreadable(found):
        return _examine(path, extras, found)
    return None, {}


@contextmanager
def _refused_if_unreadable(found: Findings) -> Generator[None]:
    try:
        yield
    except OSError as error:
        found.refuse("unreadable", f"it cannot be read: {error.strerror or error}")


def _examine(
    path: Path, extras: OnExtras, found: Findings
) -> tuple[Adapter | None, dict[str, Any]]:
    config, weights = find_files(path, found)
    claim = read_claim(config, extras, found) if config else None
    facts = _claimed_facts(claim) if claim else {}
    if weights is None:
        if claim is not None:
            _judge_by_claims(claim, extras, found)
        return None, {**facts, "judged_by": "claims"}
    facts |= {"judged_by": "tensors", "weights": weights.name}
    if not is_regular(weights, found):
        return None, facts
    with weights.open("rb") as file:
        stamp, seen_ns = Stamp.of(file), time.time_ns()
        num_bytes = stamp.num_bytes
        tensors = _read_tensors(file, num_bytes, weights.name, found)
        if tensors is not None and config is None:
            refuse_variants(tensors, found)
        if tensors is None or claim is None:
            return None, {**facts, "weights_bytes": num_bytes}
        pairs, stripped = sort_tensors(tensors, claim, extras, found)
        modules = read_modules(pairs, tensors, stripped, claim, found)
        if claim.modules_to_save and not stripped and not found.refusals:
            found.warn(
                "modules_to_save",
                f"its config names modules to save ({listed(claim.modules_to_save)}), and the file"
                " holds none of them",
            )
        if not found.refusals:
            _check_numbers(file, pairs, tensors, found)
        used = [tensors[key] for pair in pairs.values() for key in (pair.a_key, pair.b_key)]
        dtypes = sorted({tensor.dtype for tensor in used})
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if Stamp.of(file) != stamp:
            found.refuse("truncated", f"{weights.name} changed while it was read")
    if len(dtypes) > 1:
        found.warn("dtype_mix", f"its factors are of {' and '.join(dtypes)}; they are kept as F32")
    spec = AdapterSpec(
        weights_sha256=digest,
        base_model=claim.base_model,
        use_rslora=claim.use_rslora,
        dtype=dtypes[0] if len(dtypes) == 1 else "F32",
        modules=modules,
        stripped=stripped,
    )
    settled = stamp if seen_ns - stamp.written_ns > TICK_NS else None
    adapter = Adapter(spec, weights, pairs, tuple(found.warnings), settled)
    return adapter, {**facts, "weights_bytes": num_bytes, **_measured_facts(spec)}


def _read_tensors(
    file: BufferedReader, num_bytes: int, name: str, found: Findings
) -> dict[str, TensorInfo] | None:
    if num_bytes == 0:
        found.refuse("empty", f"{name} is empty")
        return None
    if num_bytes > MAX_BYTES:
        found.refuse(
            "weights_size",
            f"{name} has {num_bytes} bytes, more than the {MAX_BYTES} that a LoRA may have;"
            " download it again",
        )
        return None
    try:
        return read_header(file, num_bytes)
    except HeaderError as error:
        # only then: the size of a sound header may be the first bytes of a pickle
        file.seek(0)
        if other := other_format(file.read(64)):
            found.refuse(other[0], f"{name} is {other[1]}")
        else:
            found.refuse("safetensors", f"{name} is not a sound safetensors file: {error}")
    return None


def _check_numbers(
    file: BufferedReader,
    modules: Mapping[str, AdapterTensors],
    tensors: Mapping[str, TensorInfo],
    found: Findings,
) -> None:
    not_finite, large, idle = [], [], []
    try:
        for path, pair in modules.items():
            numbers = {key: finite.scan(file, tensors[key]) for key in (pair.a_key, pair.b_key)}
            not_finite += [key for key, of in numbers.items() if not of.finite]
            large += [key for key, of in numbers.items() if not of.moderate]
            idle += [path] if any(of.zero for of in numbers.values()) else []
    except EOFError as error:
        found.refuse("truncated", str(error))
        return
    if not_finite:
        found.refuse("not_finite", f"NaN or infinity is in {listed(not_finite)}")
    elif large:
        found.warn(
            "large_numbers",
            f"numbers of {finite.LARGE} and more, where trained ones stay below 10, are in"
            f" {listed(large)}",
        )
    if idle and len(idle) == len(modules):
        found.refuse("no_op", "a factor of every module is zero: it was saved before any training")
    elif idle:
        found.warn("zero_modules", f"{listed(idle)} changes nothing: one of its factors is zero")


def _judge_by_claims(claim: Claim, extras: OnExtras, found: Findings) -> None:
    """Take the config at its word, since there are no tensors."""
    if claim.bias != "none":
        found.refuse("bias", f"bias is {claim.bias}: it trained biases of the base")
    if claim.modules_to_save:
        message = f"it replaces whole modules of the base: {listed(claim.modules_to_save)}"
        (found.refuse if extras == "refuse" else found.warn)("modules_to_save", message)


def _claimed_facts(claim: Claim) -> dict[str, Any]:
    facts = {
        "format": claim.format,
        "base_model": claim.base_model,
        "base_revision": claim.base_revision,
        "task_type": claim.task_type,
        "use_rslora": claim.use_rslora,
        "target_modules": claim.target_modules,
        "r": claim.r,
    }
    return facts | (
        {"scale": claim.scale} if claim.format == "mlx" else {"lora_alpha": claim.lora_alpha}
    )


def _measured_facts(spec: AdapterSpec) -> dict[str, Any]:
    if not spec.modules:
        return {}
    ranks = [module.r for module in spec.modules]
    scalings = [module.scaling for module in spec.modules]
    return {
        "num_modules": len(spec.modules),
        "targets": sorted({module.path.rsplit(".", 1)[-1] for module in spec.modules}),
        "r_min": min(ranks),
        "r_max": max(ranks),
        "scaling_min": min(scalings),
        "scaling_max": max(scalings),
        "num_parameters": sum(module.num_parameters for module in spec.modules),
        "dtype": spec.dtype,
        "stripped": spec.stripped,
        "weights_sha256": spec.weights_sha256,
    }
