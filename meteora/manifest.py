"""What a checkpoint says of itself: base, experts in order, modules, router."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from meteora.artifacts import NULL, Fingerprint, Noun

FORMAT_VERSION = 1


@dataclass(frozen=True)
class BaseEntry(Noun):
    repo_id: str
    revision: str
    fingerprint: Fingerprint
    licence: str = ""


@dataclass(frozen=True)
class ExpertEntry(Noun):
    name: str
    adapter_id: str
    source: str
    revision: str
    weights_sha256: str
    licence: str
    r: str
    """The ranks found in it, as "8" or "4–16"."""


@dataclass(frozen=True)
class ModuleEntry:
    """One routed layer: sizes, and rank and scaling of each expert in order."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]


@dataclass(frozen=True)
class RouterEntry(Noun):
    kind: str
    top_k: int
    temperature: float
    margin: float | None = None
    """Of the chosen experts, only those have a weight whose logit is this close to the best."""
    opening: str = "own"
    """Who decides for a prompt's opening: its `own` tokens, or the `prompt` as a whole."""
    null: bool = False
    """Whether one more choice, the last of every gate, is the base without any expert."""
    share: str = "module"
    """How far one gate decides: for its `module`, for the `point` where modules share an input, for
    a `layer`, or for the whole `token`."""
    stand_in: str = ""
    """`arrow` or `norm`, where experts without examples are told by their weights."""
    stand_ins: tuple[str, ...] = ()
    """The names of those experts."""


@dataclass(frozen=True)
class Manifest:
    """What `meteora.json` says."""

    base: BaseEntry
    experts: tuple[ExpertEntry, ...]
    modules: dict[str, ModuleEntry]
    router: RouterEntry
    gates: dict[str, Any] = field(default_factory=dict)
    """How the gates were made; empty for a router without gates."""
    fused_id: str = ""
    router_id: str = ""

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def choices(self) -> list[str]:
        """What a router's logits stand for, in order: the experts, and the base where it is one."""
        return [*self.names, NULL] if self.router.null else self.names

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
            router=RouterEntry.from_dict(body["router"]),
            gates=body["gates"],
            fused_id=body["fused_id"],
            router_id=body["router_id"],
        )
