"""Write and read the tensors of experts and gates; the only module that knows their keys.

    meteora.json          base, experts in order, modules, router
    experts.safetensors   "<module path>.lora_A" [R, IN], "<module path>.lora_B" [OUT, R]
    gates.safetensors     "<module path>.gate.weight" [C, IN], "<module path>.gate.bias" [C];
                          "<module path>.gate.stand_in" [3, U] where U experts had no examples;
                          "<module path>.offsets" [C, OUT] of modules that have them;
                          of a router of kind `prompt` instead "<module path>.gate.rows" [R, IN],
                          "<module path>.gate.offset" [R], "standard" [3, C]
    statistics.safetensors  statistics of the tokens behind the gates, to add experts later
    README.md             model card
    lineage.json          in-toto statement
    config.json           for the auto classes of transformers: the model type

`manifest` has these names and reads the first file. Nothing is pickled, the base is referenced and
never copied, and new gates leave the file of experts unchanged.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meteora.adapters.weights import DTYPES, bytes_of
from meteora.artifacts import canonical_json
from meteora.artifacts.specs import place_of
from meteora.base.chat_template import Template
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    Manifest,
    ModuleEntry,
)
from meteora.checkpoint.sound_file import AGAIN, open_sound
from meteora.untrusted.config_fields import Field, fields_of, refuse_unknown
from meteora.untrusted.findings import Findings, listed, shortened
from meteora.untrusted.strict_json import StrictJSONError, parse_object

NOTES = "meteora"
"""The metadata key of a gates file that holds everything but tensors, as JSON."""

WRITE_BYTES = 1 << 20
"""Bytes of one write: one write of a whole tensor has a quarter of the speed."""
MAX_TEMPLATE = 20_000
"""Most tokens before a prompt, or after it; a long system prompt has thousands."""
MAX_TOKEN = (1 << 31) - 1


def write_experts(
    path: Path,
    modules: Mapping[str, ModuleEntry],
    dtype: torch.dtype,
    tensors: Iterable[tuple[Tensor | Iterable[Tensor], Tensor | Iterable[Tensor]]],
) -> None:
    """Write the stack a few rows at a time, so that no whole module has to be in memory.

    Args:
        path: written in place; the caller renames it when it is whole
        modules: in the order in which `tensors` yields
        dtype: one of `DTYPES`
        tensors: A [R, IN] and B [OUT, R] of each module, or pieces of rows that follow each other

    Raises:
        CheckpointError: a tensor has another shape than its module; the file is not usable.
    """
    name = next(name for name, own in DTYPES.items() if own == dtype)
    shapes = {module: _shapes_of(module, entry) for module, entry in modules.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for factors in shapes.values():
        for key, shape in factors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": name, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    # safetensors asks for multiples of 8; from multiples of 64, mapped tensors need no copy
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        _reserve(file, 8 + len(text) + end)
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (module, needed), pair in zip(shapes.items(), tensors, strict=True):
            written = [_write_rows(file, rows, dtype) for rows in pair]
            if written != [*needed.values()]:
                raise CheckpointError(
                    f"{module}: its adapters have A and B of {written}, {[*needed.values()]} is"
                    " needed; their sizes do not agree"
                )


def _shapes_of(module: str, entry: ModuleEntry) -> dict[str, tuple[int, int]]:
    """The shapes of A [R, IN] and B [OUT, R] by their keys."""
    return {
        f"{module}.lora_A": (entry.num_ranks, entry.in_features),
        f"{module}.lora_B": (entry.out_features, entry.num_ranks),
    }


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    """Claim the disk's space: a full disk shows at once, and writing takes a third less time.

    Raises:
        OSError: the disk has too little space.
    """
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:  # not every file system can
            raise


def _write_rows(
    file: BinaryIO, rows: Tensor | Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, int]:
    """Write a matrix, whole or in pieces of rows; returns its shape."""
    num_rows = num_columns = 0
    for piece in (rows,) if isinstance(rows, Tensor) else rows:
        num_rows, num_columns = num_rows + piece.shape[0], piece.shape[1]
        data = bytes_of(piece.to(dtype))
        for start in range(0, len(data), WRITE_BYTES):
            file.write(data[start : start + WRITE_BYTES])
    return num_rows, num_columns


class ExpertsFile:
    """The file of experts of a checkpoint, open."""

    def __init__(self, file: safe_open, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._file = file

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all numbers exactly; a foreign file may mix dtypes."""
        slices = map(self._file.get_slice, self._file.keys())
        return reduce(torch.promote_types, {DTYPES[one.get_dtype()] for one in slices})

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [R, IN] and B [OUT, R] of a module; refuses those of other sizes."""
        shapes = _shapes_of(module, self.manifest.modules[module])
        a, b = _read(self._file, self.folder / EXPERTS, shapes)
        return a, b

    def of_expert(self, expert: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield path, A [r, IN] and B [OUT, r] of an expert's modules; no others' are read.

        Refuses modules of other sizes.
        """
        path = self.folder / EXPERTS
        for module, entry in self.manifest.modules.items():
            if not entry.ranks[expert]:
                continue
            shapes = _shapes_of(module, entry)
            a, b = (self._file.get_slice(key) for key in shapes)
            actual = [tuple(one.get_shape()) for one in (a, b)]
            _check(path, shapes, actual, {one.get_dtype() for one in (a, b)})
            start = sum(entry.ranks[:expert])
            stop = start + entry.ranks[expert]
            yield module, a[start:stop], b[:, start:stop]


@contextmanager
def open_experts(folder: Path, manifest: Manifest) -> Generator[ExpertsFile]:
    """Open the file of experts.

    Raises:
        CheckpointError: the file is damaged, or holds tensors that the manifest does not name.
    """
    with open_sound(folder, EXPERTS, manifest, dtypes=DTYPES) as file:
        named = {f"{module}.lora_{factor}" for module in manifest.modules for factor in "AB"}
        _refuse_others(folder / EXPERTS, file, named)
        yield ExpertsFile(file, folder, manifest)


def read_experts(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each module's path with its A [R, IN] and B [OUT, R], in the dtype of the file.

    The whole file is checked before the first is yielded.
    """
    with open_experts(folder, manifest) as file:
        for module in manifest.modules:
            yield module, *file.factors(module)


def _refuse_others(path: Path, file: safe_open, named: AbstractSet[str]) -> None:
    """Refuse a file with tensors other than `named`."""
    if others := sorted(set(file.keys()) - named):
        raise CheckpointError(
            f"{path}: it holds {listed(others)}, which {MANIFEST} does not name; the two files do"
            f" not belong together, {AGAIN}"
        )


def _read(file: safe_open, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Read tensors by their keys; refuses other shapes than these, and several dtypes."""
    tensors = [file.get_tensor(key) for key in shapes]
    _check(path, shapes, [tuple(one.shape) for one in tensors], {one.dtype for one in tensors})
    return tensors


def _check(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    actual: list[tuple[int, ...]],
    dtypes: AbstractSet[object],
) -> None:
    """Refuse tensors whose actual shapes are not these, by key, and tensors of several dtypes."""
    if actual != (needed := [*shapes.values()]) or len(dtypes) > 1:
        raise CheckpointError(
            f"{path}: {listed([*shapes])} has the shapes {actual}, {MANIFEST} asks for {needed} of"
            f" one type; the two files do not belong together, {AGAIN}"
        )


@dataclass(frozen=True)
class Gates:
    """The gates of a model, with the template and the offsets that they need to run."""

    own: dict[str, tuple[Tensor, Tensor]]
    """G [C, IN] and c [C] of each module that has a gate."""
    follows: dict[str, str] = field(default_factory=dict)
    """For each module without a gate, the earlier module whose gate decides for it."""
    template: Template = field(default_factory=Template)
    """The tokens around every prompt; empty if each token is routed by itself."""
    stand_ins: dict[str, Tensor] = field(default_factory=dict)
    """[3, U] float32 of each module with a gate, if U experts had no examples: see
    `meteora.routing.weight_scores`."""
    without_examples: tuple[int, ...] = ()
    """The numbers of the experts without examples."""
    offsets: dict[str, Tensor] = field(default_factory=dict)
    """[C, OUT] float32 of modules that have offsets: see `meteora.model.opening_offsets`."""


@dataclass(frozen=True)
class PromptGates:
    """The tensors of a model's routers of kind `prompt`: see `meteora.model.prompt_choice`."""

    rows: dict[str, Tensor]
    """R_c A_c (Σ + λ I)^-½ of each module, [R, IN] in bfloat16 (float32 in checkpoints of earlier
    versions): the experts end to end along the rank."""
    offsets: dict[str, Tensor]
    """The products of these rows with μ, [R] float32."""
    standard: Tensor
    """[3, C] intercept, slope and deviation of each choice's size on background texts. The base has
    the size 0 and an intercept below zero, so its logit is constant."""
    template: Template
    """The tokens around every prompt."""


def write_gates(path: Path, gates: Gates) -> None:
    """Write the weights as tensors, and the rest as metadata of the same file."""
    tensors = {f"{module}.gate.weight": weight for module, (weight, _) in gates.own.items()}
    tensors |= {f"{module}.gate.bias": bias for module, (_, bias) in gates.own.items()}
    tensors |= {f"{module}.gate.stand_in": rows for module, rows in gates.stand_ins.items()}
    tensors |= {f"{module}.offsets": rows for module, rows in gates.offsets.items()}
    notes = {"follows": gates.follows, "template": _template_notes(gates.template)}
    _save(path, tensors, notes)


def _save(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    own = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    # one key: safetensors writes several keys in an order that varies
    save_tensors(path, own, {NOTES: canonical_json(notes)})


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that may be read as any new file: the library's is the owner's."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_gates(folder: Path, manifest: Manifest) -> Gates:
    """Read the gates of a checkpoint; raises `CheckpointError` if they do not fit it."""
    path, num_choices, lacking = folder / GATES, len(manifest.choices), manifest.router.stand_ins
    own: dict[str, tuple[Tensor, Tensor]] = {}
    stand_ins: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    with open_sound(folder, GATES, manifest) as file:
        follows, template = _read_notes(file, path, manifest)
        parts = ("weight", "bias", *(["stand_in"] if lacking else []))
        leaders = manifest.modules.keys() - follows.keys()
        named = {f"{module}.gate.{part}" for module in leaders for part in parts}
        _refuse_others(path, file, named | {f"{module}.offsets" for module in manifest.modules})
        held = set(file.keys())
        for module, entry in manifest.modules.items():
            if module in leaders:
                shapes = {
                    f"{module}.gate.weight": (num_choices, entry.in_features),
                    f"{module}.gate.bias": (num_choices,),
                }
                weight, bias = _read(file, path, shapes)
                own[module] = weight, bias
                if lacking:
                    key = f"{module}.gate.stand_in"
                    (stand_ins[module],) = _read(file, path, {key: (3, len(lacking))})
            if (key := f"{module}.offsets") in held:
                (offsets[module],) = _read(file, path, {key: (num_choices, entry.out_features)})
    without = tuple(manifest.names.index(name) for name in lacking)
    return Gates(own, follows, template, stand_ins, without, offsets)


def write_prompt_gates(path: Path, gates: PromptGates) -> None:
    """Write the tensors of routers of kind `prompt`."""
    tensors = {f"{module}.gate.rows": rows for module, rows in gates.rows.items()}
    tensors |= {f"{module}.gate.offset": offset for module, offset in gates.offsets.items()}
    notes = {"template": _template_notes(gates.template)}
    _save(path, tensors | {"standard": gates.standard}, notes)


def read_prompt_gates(folder: Path, manifest: Manifest) -> PromptGates:
    """Read the tensors of `prompt` routers; raises `CheckpointError` if they do not fit."""
    path = folder / GATES
    rows: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    with open_sound(folder, GATES, manifest) as file:
        _, template = _read_notes(file, path, manifest)
        named = {
            f"{module}.gate.{part}" for module in manifest.modules for part in ("rows", "offset")
        }
        _refuse_others(path, file, named | {"standard"})
        standard = file.get_tensor("standard")
        if standard.shape != (3, len(manifest.choices)) or not (standard[2] > 0).all():
            raise CheckpointError(
                f"{path}: its standard is {tuple(standard.shape)}, and intercepts, slopes"
                f" and deviations above zero of {len(manifest.choices)} choices are needed; {AGAIN}"
            )
        for module, entry in manifest.modules.items():
            rank = sum(min(one, entry.out_features) for one in entry.ranks)
            shape = rank, entry.in_features
            (rows[module],) = _read(file, path, {f"{module}.gate.rows": shape})
            (offsets[module],) = _read(file, path, {f"{module}.gate.offset": shape[:1]})
    return PromptGates(rows, offsets, standard, template)


def _read_notes(file: safe_open, path: Path, manifest: Manifest) -> tuple[dict[str, str], Template]:
    """Read the leader of each module without a gate, and the tokens around every prompt."""
    found = Findings()
    try:
        notes = parse_object((file.metadata() or {}).get(NOTES, "{}").encode())
    except StrictJSONError as error:
        raise CheckpointError(f"{path}: its notes are damaged: {error}; {AGAIN}") from None
    refuse_unknown(notes, "its notes", ("follows", "template"), found)
    note = fields_of(notes, found)
    follows = note("follows", {}).table()
    for module, leader in follows.items():
        if not _can_follow(module, leader, follows, manifest):
            found.refuse(
                "follows",
                f"{shortened(module)} follows {shortened(leader)}, which is no earlier gate",
            )
    template = note("template", {}).table()
    parts = [one.name for one in fields(Template)]
    refuse_unknown(template, "the template", parts, found)
    field = fields_of(template, found)
    tokens = {
        part: tuple(
            Field(token, f"a token of {part}", found).whole(0, MAX_TOKEN)
            for token in field(part, []).rows(MAX_TEMPLATE)
        )
        for part in parts
    }
    if found.refusals:
        reasons = "; ".join(reason.message for reason in found.refusals)
        raise CheckpointError(f"{path}: its notes are damaged: {reasons}; {AGAIN}")
    return follows, Template(**tokens)


def _template_notes(template: Template) -> dict[str, Any]:
    """The parts of a template; an empty header or footer is left out, as older versions did."""
    parts = template.to_dict().items()
    return {part: ids for part, ids in parts if ids or part in {"opening", "closing"}}


def _can_follow(
    module: str, leader: object, follows: Mapping[str, Any], manifest: Manifest
) -> bool:
    """Whether a module can use the decision of a gate: one of an earlier layer, or its own."""
    if not isinstance(leader, str) or leader in follows:
        return False
    if not {module, leader} <= manifest.modules.keys():
        return False
    first, second = place_of(leader), place_of(module)
    return first is None or second is None or first.layer <= second.layer
