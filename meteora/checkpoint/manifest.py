"""`meteora.json`, which describes a checkpoint, and the names of all its files.

Reading it takes no tensors, and so no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from meteora.artifacts import NULL, SHARED, Fingerprint, MeteoraError, Noun, RouterOptions

if TYPE_CHECKING:
    from pathlib import Path

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


class CheckpointError(MeteoraError):
    """A folder is not a fused checkpoint that this version can read."""


@dataclass(frozen=True)
class BaseEntry(Noun):
    """The base that the experts were trained on."""

    repo_id: str
    revision: str
    fingerprint: Fingerprint
    licence: str = ""


@dataclass(frozen=True)
class ExpertEntry(Noun):
    """One expert: its name, and the adapter that it is."""

    name: str
    adapter_id: str
    source: str
    revision: str
    weights_sha256: str
    licence: str
    r: str
    """Its ranks, as "8" or "4–16"."""


@dataclass(frozen=True)
class ModuleEntry:
    """One routed layer: sizes, and rank and scaling of each expert in order."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]


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

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def choices(self) -> list[str]:
        """What a router's logits stand for, in order: the experts, their mean, and the base."""
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
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        body = json.loads(text)
        experts = tuple(ExpertEntry.from_dict(entry) for entry in body["experts"])
        modules = {}
        for path, entry in body["modules"].items():
            ranks, scaling = tuple(entry["ranks"]), tuple(entry["scaling"])
            if not len(ranks) == len(scaling) == len(experts):
                raise ValueError(f"{path} has {len(ranks)} ranks for {len(experts)} experts")
            modules[path] = ModuleEntry(entry["in"], entry["out"], ranks, scaling)
        return cls(
            base=BaseEntry.from_dict(body["base"]),
            experts=experts,
            modules=modules,
            router=RouterOptions.from_dict(body["router"]),
            gates=body["gates"],
            fused_id=body["fused_id"],
            router_id=body["router_id"],
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; raises `CheckpointError` where that is not possible."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no {MANIFEST} in it; a fused checkpoint has one, give the folder"
            " that `meteora run` printed"
        )
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)["format_version"]
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {found}, this program reads {FORMAT_VERSION};"
                " install the version of meteora-pipelines that wrote it"
            )
        return Manifest.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: it does not describe a fused checkpoint ({type(error).__name__}: {error});"
            " download or build it again"
        ) from error
