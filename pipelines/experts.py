"""The experts of a recipe, each read and accepted, or refused with its reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meteora import adapters
from meteora.adapters import AdapterError, IncompatibleAdaptersError, Reason
from pipelines.hub_card import licence_of
from pipelines.hub_errors import UnusableRepositoryError
from pipelines.named_base import judge_base
from pipelines.recipe import FoundExpert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from meteora.adapters import Adapter
    from meteora.artifacts import AdapterRef, BuiltBase
    from pipelines.hub import HubSource
    from pipelines.named_base import LookUp
    from pipelines.recipe import ExpertSection, Recipe

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
class Refusal:
    """An adapter that cannot be an expert."""

    ref: AdapterRef
    error: AdapterError | UnusableRepositoryError
    left_out: bool
    """The others go on without it; else it ends the run."""

    @property
    def reasons(self) -> tuple[Reason, ...]:
        if isinstance(self.error, AdapterError):
            return self.error.reasons
        return (Reason("hub", str(self.error)),)


def gather(
    recipe: Recipe,
    folder: Path,
    built: BuiltBase,
    cache: Path,
    *,
    resolve: Resolve,
    fetch: Fetch,
    look_up: LookUp,
) -> Iterator[tuple[ExpertSection, Expert | Refusal]]:
    """Each expert of the recipe, in order, accepted or refused.

    Args:
        folder: What the recipe's paths are relative to.
        cache: Where downloaded adapters lie.
        resolve, fetch: `sources.resolve_adapter` and how to get at its files.
        look_up: What the base is that an adapter names, if it is another than the recipe's.

    Raises:
        HubError: A fault of the Hub, which says nothing about the adapter.
    """
    known: dict[str, str] = {}
    for section in recipe.experts:
        ref = resolve(recipe, section, folder)
        try:
            adapter_folder = fetch(recipe, section, ref, folder, cache)
            expert = _read(section, ref, adapter_folder, recipe, built, look_up)
            twin = known.setdefault(expert.adapter.spec.id, section.name)
            if twin != section.name and isinstance(section, FoundExpert):
                reason = Reason("same_adapter", f"it is the same adapter as {twin}")
                raise IncompatibleAdaptersError(section.name, (reason,))
        except (AdapterError, UnusableRepositoryError) as error:
            left_out = recipe.policy.on_refused == "skip" or isinstance(section, FoundExpert)
            yield section, Refusal(ref, error, left_out)
        else:
            yield section, expert


def _read(
    section: ExpertSection,
    ref: AdapterRef,
    folder: Path,
    recipe: Recipe,
    built: BuiltBase,
    look_up: LookUp,
) -> Expert:
    found = adapters.read(folder, modules_to_save=recipe.policy.modules_to_save)
    fitted = adapters.fit_to_base(found, built.sizes)
    reasons = judge_base(fitted, folder, ref, recipe, built, look_up)
    fitted = replace(fitted, reasons=(*fitted.reasons, *reasons))
    return Expert(section.name, section.adapter, ref, fitted, licence_of(folder))
