"""Read and write `meteora.json`, which describes a checkpoint; the names of all its files.

A checkpoint may come from a stranger: the type and range of each field are checked, and limits
apply before anything large is parsed. Reading needs no tensors, and so no torch.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
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
from meteora.base.config_checks import MAX_LAYERS
from meteora.base.sources import PATH, REFERENCES, is_reference
from meteora.untrusted.config_fields import (
    MAX_ALPHA,
    MAX_RANK,
    Field,
    fields_of,
    number,
    refuse_unknown,
)
from meteora.untrusted.findings import (
    MOST_NAMED,
    Findings,
    counted,
    did_you_mean,
    listed,
    quoted,
    shortened,
)
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
SIGNATURE = "model.sig"
"""A signature over all files of the folder, if its maker signed it."""
EVAL_RESULTS = ".eval_results/meteora.yaml"
"""Scores for the Hub's leaderboards, relative to the checkpoint's folder."""
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


class UnknownExpertError(MeteoraError):
    """No expert has this name."""


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
        field = fields_of(body, found)
        name, revision = field("repo_id").text(), field("revision").text()
        if not is_reference(name, revision):
            base = f"{shortened(name)!r} at {shortened(revision)!r}"
            found.refuse("base", f"its base is {base}; possible are {REFERENCES}")
        fact = fields_of(field("fingerprint").table(), found)
        return cls(
            name,
            revision,
            Fingerprint(
                architecture=fact("architecture").text(),
                vocabulary_sha256=fact("vocabulary_sha256").matching(SHA256),
                **{
                    key: fact(key).whole(least, most)
                    for key, least, most in (
                        ("hidden_size", 1, MAX_SIZE),
                        ("intermediate_size", 1, MAX_SIZE),
                        ("num_hidden_layers", 1, MAX_LAYERS),
                        ("num_attention_heads", 0, MAX_SIZE),  # a state-space model has none
                        ("num_key_value_heads", 0, MAX_SIZE),
                        ("vocab_size", 1, MAX_SIZE),
                    )
                },
            ),
            field("licence").text(),
            field("quantise", "").one_of(QUANTISED),
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
            found.refuse("experts", f"an expert is {quoted(body)}, not a table")
            body = {}
        if reason := check_name(body.get("name")):
            found.refuse("experts", reason)
        field = fields_of(body, found)
        return cls(
            name=str(body.get("name")),
            adapter_id=field("adapter_id").matching(ADAPTER_ID),
            source=field("source").matching(SOURCE),
            revision=field("revision").text(),
            weights_sha256=field("weights_sha256").matching(SHA256),
            licence=field("licence").text(),
            r=field("r").matching(RANKS),
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
            found.refuse("modules", f"{where} is {quoted(body)}, not a table")
            body = {}
        refuse_unknown(body, where, {"in", "out", "ranks", "scaling"}, found)
        field = fields_of(body, found)
        ranks, scaling = (tuple(field(key).rows(MAX_EXPERTS)) for key in ("ranks", "scaling"))
        if not len(ranks) == len(scaling) == num_experts:
            found.refuse(
                "ranks",
                f"{where} has {counted(len(ranks), 'rank')} and"
                f" {counted(len(scaling), 'scaling')} for {counted(num_experts, 'expert')}",
            )
        # of each the first that is bad: there may be millions
        for rank in ranks:
            if type(rank) is not int or not 0 <= rank <= MAX_RANK:
                Field(rank, f"a rank of {where}", found).rank()
                break
        for rank, scale in zip(ranks, scaling, strict=False):
            least = MIN_FACTOR if rank else 0.0
            if (value := number(scale)) is None or not least <= value <= MAX_ALPHA:
                Field(scale, f"a scaling of {where}", found).real(least, MAX_ALPHA)
                break
        sizes = (field(k, where=f"{k} of {where}").whole(1, MAX_SIZE) for k in ("in", "out"))
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
        refuse_unknown(body, MANIFEST, known, found)
        field = fields_of(body, found)
        experts = tuple(ExpertEntry.read(one, found) for one in field("experts").rows(MAX_EXPERTS))
        names = [expert.name for expert in experts]
        if len({*names}) < len(names) or not names:
            found.refuse("experts", "its experts do not have different names, or it has none")
        modules = field("modules").table()
        if len(modules) > MAX_MODULES:
            found.refuse("modules", f"it has {len(modules)} modules, more than {MAX_MODULES}")
            modules = {}
        entries = {
            Field(path, "the path of a module", found).matching(NAME): ModuleEntry.read(
                path, entry, len(experts), found
            )
            for path, entry in modules.items()
        }
        used = {e for entry in entries.values() for e, rank in enumerate(entry.ranks) if rank}
        if idle := [name for e, name in enumerate(names) if e not in used]:
            found.refuse("experts", f"no module has a rank of {listed(idle)}")
        return cls(
            base=BaseEntry.read(field("base").table(), found),
            experts=experts,
            modules=entries,
            router=read_router(field("router").table(), names, found),
            gates=_read_gates(field("gates")),
            fused_id=field("fused_id").matching(FUSED_ID) if body.get("fused_id") else "",
            router_id=field("router_id").matching(ROUTER_ID) if body.get("router_id") else "",
            files=_read_files(field("files", {})),
        )


def read_router(body: Mapping[str, Any], names: Collection[str], found: Findings) -> RouterOptions:
    """Read the routing options; `names` are those of the experts."""
    refuse_unknown(body, "router", {f.name for f in fields(RouterOptions)}, found)
    field = fields_of(body, found)
    stand_in = field("stand_in", "").one_of(STAND_INS)
    stand_ins = tuple(_read_stand_ins(field("stand_ins", []), names))
    if stand_ins and not stand_in:
        found.refuse("stand_in", "stand_in is empty, and there are experts without examples")
    if stand_ins and len(stand_ins) == len(names):
        found.refuse("stand_ins", "stand_ins names all experts; one or more have examples")
    return RouterOptions(
        kind=field("kind", where="router.kind").one_of(ROUTER_KINDS),
        top_k=field("top_k").whole(1, MAX_EXPERTS),
        temperature=field("temperature").real(MIN_FACTOR, MAX_TEMPERATURE),
        margin=None if body.get("margin") is None else field("margin").real(0.0, MAX_MARGIN),
        opening=field("opening", "own").one_of(OPENINGS),
        null=field("null").flag(),
        share=field("share", "module").one_of(SHARES),
        stand_in=stand_in,
        stand_ins=stand_ins,
    )


def _read_stand_ins(field: Field, names: Collection[str]) -> list[str]:
    """Read the names of experts without examples, in the order of their columns."""
    stand_ins = field.rows(MAX_EXPERTS)
    known = [name for name in stand_ins if isinstance(name, str) and name in names]
    if len({*known}) < len(stand_ins):
        field.refuse("does not name different experts of the checkpoint")
    return known


def _read_gates(field: Field) -> dict[str, Any]:
    """Read the facts about the gates' fit; empty for a router without gates."""
    if not field.table():
        return {}
    gates = field.plain()
    fact = fields_of(gates, field.found)
    fact("method", where="gates.method").matching(METHOD)
    fact("num_tokens", where="gates.num_tokens").whole(0, 1 << 62)
    return gates


def _read_files(field: Field) -> dict[str, str]:
    files = field.table()
    if not files.keys() <= {*TENSORS}:
        field.refuse(f"names {listed([*files])}; {listed(TENSORS)} are possible")
    fact = fields_of(files, field.found)
    return {name: fact(name, where=f"files[{shortened(name)}]").matching(SHA256) for name in files}


def number_of(name: str, names: Sequence[str], owner: object) -> int:
    """The number of an expert among the names of all experts of an owner.

    Raises:
        UnknownExpertError: none has this name.
    """
    if name not in names:
        similar, known = did_you_mean(name, names), listed([*names], MOST_NAMED)
        raise UnknownExpertError(f"there is no expert {name!r}{similar}; {owner} has {known}")
    return names.index(name)


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
        missing = f"{MANIFEST} in it" if folder.is_dir() else "such folder"
        raise CheckpointError(
            f"{folder}: there is no {missing}; a fused checkpoint is a folder with {MANIFEST}, give"
            " the one that `meteora run` printed"
        )
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return Manifest.from_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
