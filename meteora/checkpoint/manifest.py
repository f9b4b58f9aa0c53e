"""Read and write `meteora.json`, which describes a checkpoint; the names of all its files.

A checkpoint may come from a stranger: the type and range of each field are checked, and limits
apply before anything large is parsed. Reading needs no tensors, and so no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from meteora.artifacts import (
    NULL,
    QUANTISED,
    REPO_ID,
    ROUTER_KINDS,
    SHA256,
    SHARED,
    BaseSpec,
    Fingerprint,
    MeteoraError,
    Noun,
    RouterOptions,
)
from meteora.base.sources import PATH, REFERENCES, is_reference
from meteora.untrusted import config_fields
from meteora.untrusted.findings import MOST_NAMED, Findings, did_you_mean, listed, shortened
from meteora.untrusted.safetensors_header import MAX_SIZE, NAME
from meteora.untrusted.strict_json import StrictJSONError, parse_object

FORMAT_VERSION = 1
MANIFEST = "meteora.json"
EXPERTS = "experts.safetensors"
GATES = "gates.safetensors"
STATISTICS = "statistics.safetensors"
CARD = "README.md"
LINEAGE = "lineage.json"
CONFIG = "config.json"
CONFIG_TEXT = '{"model_type": "meteora", "architectures": ["MeteoraForCausalLM"]}\n'
FILES = (MANIFEST, CONFIG, EXPERTS, GATES, STATISTICS, CARD, LINEAGE)
"""All files that a checkpoint can have; these are published."""
TENSORS = (EXPERTS, GATES, STATISTICS)

# Bounds on what a stranger may ask for; a stack of 1,000 experts on a 70B model stays below them
MAX_BYTES = 32 << 20
MAX_TABLES = 200_000
MAX_NUMBERS = 2_500_000
MAX_QUOTES = 2_000_000
MAX_EXPERTS = 4_096
MAX_MODULES = 10_000
MAX_NAME = 128
"""Bytes of an expert's name in UTF-8; a recipe takes 64, and a file system 255."""
UNSAFE = frozenset("`|<>[]\\/")
"""Characters that no name may have: it is text on a model card, and a file in a folder."""
MIN_FACTOR = 1e-30
"""The smallest scaling or temperature: dividing by it stays finite in float32."""
MAX_TEMPERATURE = 1_000.0
MAX_MARGIN = 1_000.0
MOST_REASONS = 5
"""Most faults in one message."""

OPENINGS = ("own", "prompt", "shared")
SHARES = ("module", "point", "layer", "token", "turn")
STAND_INS = ("", "arrow", "norm")
SOURCE = re.compile(rf"{REPO_ID.pattern}(/[A-Za-z0-9_.\-/]{{1,500}})?|{PATH}[^`|]{{0,500}}")
RANKS = re.compile(r"(\d{1,5}(–\d{1,5})?)?")
METHOD = re.compile(r"[a-z_]{1,40}")
ADAPTER_ID, FUSED_ID, ROUTER_ID = (
    re.compile(rf"{kind}:[0-9a-f]{{64}}") for kind in ("adapter", "fused", "router")
)


class CheckpointError(MeteoraError):
    """A folder is not a fused checkpoint that this version can read."""


def check_name(name: object) -> str:
    """Return the reason against the name of an expert; empty if there is none."""
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not 1 <= len(name.encode()) <= MAX_NAME
    ):
        return f"{shortened(name)!r} is not a printable name of 1 to {MAX_NAME} bytes"
    if name in (NULL, SHARED) or name != name.strip() or not UNSAFE.isdisjoint(name):
        return f"{name!r} cannot be the name of an expert; letters, digits, spaces, _ . - can"
    return ""


@dataclass(frozen=True)
class BaseEntry(Noun):
    """The base that the experts were trained on."""

    repo_id: str
    revision: str
    fingerprint: Fingerprint
    licence: str = ""
    quantise: str = ""
    """See `BaseSpec.quantise`; the way to load the base, unless the user names another."""

    @property
    def spec(self) -> BaseSpec:
        """The base as a noun of the store."""
        return BaseSpec(self.repo_id, self.revision, self.quantise)

    @classmethod
    def read(cls, body: Mapping[str, Any], found: Findings) -> Self:
        """Read the reference to a base, in a form of `REFERENCES`."""
        name, revision = (config_fields.text(body, key, found) for key in ("repo_id", "revision"))
        if not is_reference(name, revision):
            base = f"{shortened(name)!r} at {shortened(revision)!r}"
            found.refuse("base", f"its base is {base}; possible are {REFERENCES}")
        sizes = config_fields.table(body, "fingerprint", found)
        return cls(
            name,
            revision,
            Fingerprint(
                architecture=config_fields.text(sizes, "architecture", found),
                vocabulary_sha256=config_fields.matching(
                    sizes.get("vocabulary_sha256"), "vocabulary_sha256", SHA256, found
                ),
                **{
                    key: config_fields.whole(sizes.get(key), key, least, MAX_SIZE, found)
                    for key, least in (
                        ("hidden_size", 1),
                        ("intermediate_size", 1),
                        ("num_hidden_layers", 1),
                        ("num_attention_heads", 0),  # a state-space model has none
                        ("num_key_value_heads", 0),
                        ("vocab_size", 1),
                    )
                },
            ),
            config_fields.text(body, "licence", found),
            config_fields.one_of(body.get("quantise", ""), "quantise", QUANTISED, found),
        )


@dataclass(frozen=True)
class ExpertEntry(Noun):
    """One expert: its name and its adapter."""

    name: str
    adapter_id: str
    source: str
    revision: str
    weights_sha256: str
    licence: str
    r: str
    """Its ranks, as "8" or "4–16"."""

    @classmethod
    def read(cls, body: object, found: Findings) -> Self:
        """Read the entry of an expert."""
        if not isinstance(body, dict):
            found.refuse("experts", f"an expert is {shortened(body)!r}, not a table")
            body = {}
        if reason := check_name(body.get("name")):
            found.refuse("experts", reason)
        return cls(
            name=str(body.get("name")),
            adapter_id=config_fields.matching(
                body.get("adapter_id"), "adapter_id", ADAPTER_ID, found
            ),
            source=config_fields.matching(body.get("source"), "source", SOURCE, found),
            revision=config_fields.text(body, "revision", found),
            weights_sha256=config_fields.matching(
                body.get("weights_sha256"), "weights_sha256", SHA256, found
            ),
            licence=config_fields.text(body, "licence", found),
            r=config_fields.matching(body.get("r"), "r", RANKS, found),
        )


@dataclass(frozen=True)
class ModuleEntry:
    """One routed linear layer: its sizes, and the rank and scaling of each expert in order."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    """0 for an expert that lacks the module."""
    scaling: tuple[float, ...]

    @property
    def num_ranks(self) -> int:
        """R, the sum of all experts' ranks."""
        return sum(self.ranks)

    @classmethod
    def read(cls, path: str, body: object, num_experts: int, found: Findings) -> Self:
        """Read sizes, ranks and scalings of a module."""
        where = shortened(path)
        if not isinstance(body, dict):
            found.refuse("modules", f"{where} is {shortened(body)!r}, not a table")
            body = {}
        config_fields.refuse_unknown(body, where, {"in", "out", "ranks", "scaling"}, found)
        ranks, scaling = (
            tuple(config_fields.rows(body, key, MAX_EXPERTS, found)) for key in ("ranks", "scaling")
        )
        if not len(ranks) == len(scaling) == num_experts:
            found.refuse("ranks", f"{where} has {len(ranks)} ranks for {num_experts} experts")
        for rank in ranks:
            if type(rank) is not int or not 0 <= rank <= config_fields.MAX_RANK:
                config_fields.rank(rank, f"a rank of {where}", found)
        for rank, scale in zip(ranks, scaling, strict=False):
            if type(scale) is not float or not MIN_FACTOR <= scale <= config_fields.MAX_ALPHA:
                least = MIN_FACTOR if rank else 0.0
                config_fields.real(
                    scale, f"a scaling of {where}", least, config_fields.MAX_ALPHA, found
                )
        sizes = (
            config_fields.whole(body.get(key), f"{key} of {where}", 1, MAX_SIZE, found)
            for key in ("in", "out")
        )
        return cls(*sizes, ranks, scaling)


@dataclass(frozen=True)
class Manifest:
    """The content of `meteora.json`."""

    base: BaseEntry
    experts: tuple[ExpertEntry, ...]
    modules: dict[str, ModuleEntry]
    router: RouterOptions
    gates: dict[str, Any] = field(default_factory=dict)
    """How the gates were made; empty for a router without gates."""
    fused_id: str = ""
    router_id: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of tensors, by name; empty in checkpoints of earlier versions."""

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def choices(self) -> list[str]:
        """The choices of a router, in the order of its logits: experts, their mean, the base."""
        shared = [SHARED] if self.router.opening == "shared" else []
        return [*self.names, *shared, *([NULL] if self.router.null else [])]

    def to_json(self) -> str:
        modules = {
            path: {
                "in": entry.in_features,
                "out": entry.out_features,
                "ranks": entry.ranks,
                "scaling": entry.scaling,
            }
            for path, entry in self.modules.items()
        }
        body = {"format_version": FORMAT_VERSION, **asdict(self), "modules": modules}
        if not self.base.quantise:  # as older versions write it
            base = self.base.to_dict()
            body["base"] = {key: value for key, value in base.items() if key != "quantise"}
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a manifest of unknown origin.

        Raises:
            CheckpointError: it is not one, or a field has another type or is out of its range; the
                message is a clause.
        """
        body = _parse(data)
        if (version := body.get("format_version")) != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {shortened(version)}, this program reads {FORMAT_VERSION};"
                " install the version of meteora-pipelines that wrote it"
            )
        found = Findings()
        read = cls._read(body, found)
        if found.refusals:
            reasons = "; ".join(reason.message for reason in found.refusals[:MOST_REASONS])
            raise CheckpointError(
                f"it does not describe a fused checkpoint: {reasons}; download or build it again"
            )
        return read

    @classmethod
    def _read(cls, body: Mapping[str, Any], found: Findings) -> Self:
        known = {field.name for field in fields(cls)} | {"format_version"}
        config_fields.refuse_unknown(body, MANIFEST, known, found)
        experts = tuple(
            ExpertEntry.read(entry, found)
            for entry in config_fields.rows(body, "experts", MAX_EXPERTS, found)
        )
        names = [expert.name for expert in experts]
        if len({*names}) < len(names) or not names:
            found.refuse("experts", "its experts do not have different names, or it has none")
        modules = config_fields.table(body, "modules", found)
        if len(modules) > MAX_MODULES:
            found.refuse("modules", f"it has {len(modules)} modules, more than {MAX_MODULES}")
            modules = {}
        entries = {
            config_fields.matching(path, "the path of a module", NAME, found): ModuleEntry.read(
                path, entry, len(experts), found
            )
            for path, entry in modules.items()
        }
        used = {e for entry in entries.values() for e, rank in enumerate(entry.ranks) if rank}
        if idle := [name for e, name in enumerate(names) if e not in used]:
            found.refuse("experts", f"no module has a rank of {listed(idle)}")
        return cls(
            base=BaseEntry.read(config_fields.table(body, "base", found), found),
            experts=experts,
            modules=entries,
            router=read_router(config_fields.table(body, "router", found), names, found),
            gates=_read_gates(body, found),
            fused_id=_text_of(body, "fused_id", FUSED_ID, found),
            router_id=_text_of(body, "router_id", ROUTER_ID, found),
            files=_read_files(body, found),
        )


def read_router(body: Mapping[str, Any], names: Collection[str], found: Findings) -> RouterOptions:
    """Read the routing options.

    Args:
        names: of the experts
    """
    config_fields.refuse_unknown(body, "router", {f.name for f in fields(RouterOptions)}, found)
    margin = body.get("margin")
    stand_in = config_fields.one_of(body.get("stand_in", ""), "stand_in", STAND_INS, found)
    stand_ins = tuple(_read_stand_ins(body, names, found))
    if stand_ins and not stand_in:
        found.refuse("stand_in", "stand_in is empty, and there are experts without examples")
    if stand_ins and len(stand_ins) == len(names):
        found.refuse("stand_ins", "stand_ins names all experts; one or more have examples")
    return RouterOptions(
        kind=config_fields.one_of(body.get("kind"), "router.kind", ROUTER_KINDS, found),
        top_k=config_fields.whole(body.get("top_k"), "top_k", 1, MAX_EXPERTS, found),
        temperature=config_fields.real(
            body.get("temperature"), "temperature", MIN_FACTOR, MAX_TEMPERATURE, found
        ),
        margin=margin
        if margin is None
        else config_fields.real(margin, "margin", 0.0, MAX_MARGIN, found),
        opening=config_fields.one_of(body.get("opening", "own"), "opening", OPENINGS, found),
        null=config_fields.flag(body, "null", found),
        share=config_fields.one_of(body.get("share", "module"), "share", SHARES, found),
        stand_in=stand_in,
        stand_ins=stand_ins,
    )


def _read_stand_ins(body: Mapping[str, Any], names: Collection[str], found: Findings) -> list[str]:
    """Read the names of experts without examples, in the order of their columns."""
    stand_ins = config_fields.rows({"stand_ins": [], **body}, "stand_ins", MAX_EXPERTS, found)
    known = [name for name in stand_ins if isinstance(name, str) and name in names]
    if len({*known}) < len(stand_ins):
        found.refuse("stand_ins", "stand_ins does not name different experts of the checkpoint")
    return known


def _read_gates(body: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Read the facts about the gates' fit; empty for a router without gates."""
    gates = config_fields.plain(config_fields.table(body, "gates", found), "gates", found)
    if not isinstance(gates, dict) or not gates:
        return {}
    config_fields.matching(gates.get("method"), "gates.method", METHOD, found)
    config_fields.whole(gates.get("num_tokens"), "gates.num_tokens", 0, 1 << 62, found)
    return gates


def _read_files(body: Mapping[str, Any], found: Findings) -> dict[str, str]:
    files = config_fields.table(body, "files", found) if "files" in body else {}
    if not files.keys() <= {*TENSORS}:
        found.refuse("files", f"files names {listed([*files])}; {listed(TENSORS)} are possible")
    return {
        name: config_fields.matching(sha256, f"files[{shortened(name)}]", SHA256, found)
        for name, sha256 in files.items()
    }


def _text_of(body: Mapping[str, Any], key: str, pattern: re.Pattern[str], found: Findings) -> str:
    """Read a text of a given form; empty where the field is not set."""
    return config_fields.matching(body[key], key, pattern, found) if body.get(key) else ""


def no_expert(folder: Path, manifest: Manifest, name: str) -> str:
    """Return the message that a checkpoint has no expert of this name."""
    names = manifest.names
    return (
        f"there is no expert {name!r}{did_you_mean(name, names)}; {folder} has"
        f" {listed(names, MOST_NAMED)}"
    )


def _parse(data: bytes) -> dict[str, Any]:
    # counted before it is parsed: a table takes 30 times the bytes of its text
    most = {b"[": MAX_TABLES, b"{": MAX_TABLES, b",": MAX_NUMBERS, b'"': MAX_QUOTES}
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"it has more than {MAX_BYTES} bytes; download or build it again")
    if any(data.count(mark) > limit for mark, limit in most.items()):
        raise CheckpointError("it lists more than any checkpoint has; download or build it again")
    try:
        return parse_object(data)
    except StrictJSONError as error:
        raise CheckpointError(
            f"it does not describe a fused checkpoint: {error}; download or build it again"
        ) from None


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; raises `CheckpointError` if that is not possible."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no {MANIFEST} in it; a fused checkpoint has one, give the folder"
            " that `meteora run` printed"
        )
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return Manifest.from_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
