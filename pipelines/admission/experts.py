"""The experts of a recipe, each read and accepted, or refused with its reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meteora.adapters import reader
from meteora.adapters.compatibility import IncompatibleAdaptersError, fit_to_base
from meteora.adapters.tensors import place_of
from meteora.artifacts import Reason
from meteora.untrusted.findings import AdapterError, listed
from pipelines.admission.base_identity import judge_base
from pipelines.hub.card import licence_of
from pipelines.hub.errors import UnusableRepositoryError
from pipelines.recipe.recipe import FoundExpert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from meteora.adapters.tensors import Adapter
    from meteora.artifacts import AdapterRef, BaseSpec
    from pipelines.admission.base_identity import LookUp
    from pipelines.hub.about import HubSource
    from pipelines.recipe.recipe import ExpertSection, PolicySection, Recipe

    Resolve = Callable[[Recipe, ExpertSection, Path], AdapterRef]
    Fetch = Callable[[Recipe, ExpertSection, AdapterRef, Path, Path], Path]


@dataclass(frozen=True)
class Expert:
    """An expert that was found, read and accepted."""

    name: str
    source: str
    """As the recipe names it, before a branch was resolved."""
    ref: AdapterRef
    adapter: Adapter
    licence: str
    """As its card or repository says; empty where nothing is said."""
    about: HubSource | None = None
    """What the Hub says of its repository; None where nobody was asked."""


@dataclass(frozen=True)
class Ground:
    """What adapters are to lie on, and on which terms."""

    base: BaseSpec
    sizes: Mapping[str, tuple[int, int]]
    """Of each linear layer's path, (in_features, out_features)."""
    policy: PolicySection
    look_up: LookUp
    """What the base is that an adapter names, if it is another."""
    in_layers: bool
    """Only numbered layers of one stack can be routed, as where gates are fitted one by one."""


@dataclass(frozen=True)
class Refusal:
    """An adapter that cannot be an expert."""

    ref: AdapterRef
    error: AdapterError | UnusableRepositoryError
    left_out: bool
    """The others go on without it; else it ends the run."""


def reasons_of(error: AdapterError | UnusableRepositoryError) -> tuple[Reason, ...]:
    """Why an adapter is refused."""
    if isinstance(error, AdapterError):
        return error.reasons
    return (Reason("hub", str(error)),)


def gather(
    recipe: Recipe,
    folder: Path,
    ground: Ground,
    cache: Path,
    *,
    resolve: Resolve,
    fetch: Fetch,
) -> Iterator[tuple[ExpertSection, Expert | Refusal]]:
    """Each expert of the recipe, in order, accepted or refused.

    Args:
        folder: What the recipe's paths are relative to.
        cache: Where downloaded adapters lie.
        resolve, fetch: `sources.resolve_adapter` and how to get at its files.

    Raises:
        HubError: A fault of the Hub, which says nothing about the adapter.
    """
    known: dict[str, str] = {}
    for section in recipe.experts:
        ref = resolve(recipe, section, folder)
        try:
            adapter_folder = fetch(recipe, section, ref, folder, cache)
            expert = read_expert(section.name, section.adapter, ref, adapter_folder, ground)
            twin = known.setdefault(expert.adapter.spec.id, section.name)
            if twin != section.name and isinstance(section, FoundExpert):
                reason = Reason("same_adapter", f"it is the same adapter as {twin}")
                raise IncompatibleAdaptersError(section.name, (reason,))
        except (AdapterError, UnusableRepositoryError) as error:
            left_out = recipe.policy.on_refused == "skip" or isinstance(section, FoundExpert)
            yield section, Refusal(ref, error, left_out)
        else:
            yield section, expert


def read_expert(name: str, source: str, ref: AdapterRef, folder: Path, ground: Ground) -> Expert:
    """Read an adapter in a folder, and judge it beside the base that it is to lie on.

    Raises:
        AdapterError: It cannot be an expert there.
    """
    found = reader.read(folder, modules_to_save=ground.policy.modules_to_save)
    fitted = fit_to_base(found, ground.sizes)
    reasons = judge_base(fitted, folder, ref, ground.base, ground.policy, ground.look_up)
    if ground.in_layers:
        _check_in_layers(fitted, folder)
    fitted = replace(fitted, reasons=(*fitted.reasons, *reasons))
    return Expert(name, source, ref, fitted, licence_of(folder))


def _check_in_layers(adapter: Adapter, folder: Path) -> None:
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
