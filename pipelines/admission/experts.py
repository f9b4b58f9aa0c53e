"""What an adapter of a recipe turns out to be: an expert, refused with reasons, or missing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meteora.adapters import reader
from meteora.adapters.compatibility import IncompatibleAdaptersError, fit_to_base
from meteora.adapters.tensors import Adapter
from meteora.artifacts import AdapterRef, BaseSpec, Reason
from meteora.artifacts.specs import place_of
from meteora.untrusted.findings import AdapterError, listed
from pipelines.admission.base_identity import LookUp, identify_base
from pipelines.hub.about import HubSource
from pipelines.hub.card import datasets_of, licence_of
from pipelines.hub.errors import UnusableRepositoryError
from pipelines.recipe.recipe import PolicySection


@dataclass(frozen=True)
class Expert:
    """An expert that was found, read and accepted."""

    name: str
    source: str
    """The adapter as the recipe names it, before a branch is resolved."""
    ref: AdapterRef
    adapter: Adapter
    licence: str
    """As its card or repository states it; empty if they state none."""
    about: HubSource | None = None
    """The Hub's facts on its repository; None for a local folder."""
    datasets: tuple[str, ...] = ()
    """The data sets of the Hub that its card names."""


@dataclass(frozen=True)
class Requirements:
    """What an adapter must fit to become an expert."""

    base: BaseSpec | None
    """None if it is not on this disk yet: then adapters are compared with no base."""
    sizes: Mapping[str, tuple[int, int]]
    """(in_features, out_features) of each linear layer of the base, by its path."""
    policy: PolicySection
    look_up: LookUp
    """Compares the base that an adapter names with ours, if the names differ."""
    in_layers: bool
    """Whether every module must lie in a numbered layer; gates are fitted layer by layer."""


@dataclass(frozen=True)
class Refusal:
    """An adapter that cannot be an expert."""

    name: str
    source: str
    """As in `Expert`."""
    ref: AdapterRef | None
    """None if the Hub has no such repository, branch or commit."""
    error: AdapterError | UnusableRepositoryError
    left_out: bool
    """Whether the run goes on without it; otherwise the run ends."""


@dataclass(frozen=True)
class Missing:
    """An adapter that a run would have to fetch first."""

    name: str
    source: str
    """As in `Expert`."""
    ref: AdapterRef | None
    """None if it cannot be pinned without the Hub."""
    reason: str


Outcome = Expert | Refusal | Missing


def read_expert(
    name: str, source: str, ref: AdapterRef, folder: Path, requirements: Requirements
) -> Expert:
    """Read the adapter in a folder; `AdapterError` if it does not meet the requirements."""
    policy = requirements.policy
    adapter = reader.read(folder, modules_to_save=policy.modules_to_save)
    reasons: tuple[Reason, ...] = ()
    if (base := requirements.base) is not None:
        adapter = fit_to_base(adapter, requirements.sizes)
        reasons = identify_base(adapter, folder, ref, base, policy, requirements.look_up)
    if requirements.in_layers:
        _require_layers(adapter, folder)
    adapter = replace(adapter, reasons=(*adapter.reasons, *reasons))
    return Expert(name, source, ref, adapter, licence_of(folder), datasets=datasets_of(folder))


def _require_layers(adapter: Adapter, folder: Path) -> None:
    """Refuse an adapter with modules outside the numbered layers of one stack."""
    places = {path: place_of(path) for path in adapter.tensors}
    stacks = sorted({place.stem for place in places.values() if place})
    if outside := [path for path, place in places.items() if place is None]:
        problem = f"{listed(outside)} is in no numbered layer"
    elif len(stacks) > 1:
        problem = f"its modules lie in several stacks of layers ({listed(stacks)})"
    else:
        return
    reason = Reason(
        "outside_layers",
        f"{problem}, and gates are fitted layer by layer; leave it out, or use a router without"
        " gates, such as arrow",
    )
    raise IncompatibleAdaptersError(str(folder), (reason,))
