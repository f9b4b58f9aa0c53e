"""The Hub's facts on a repository besides its files. Its owner wrote them; nobody checks them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.artifacts import AdapterRef, Noun, canonical_json
from meteora.untrusted.findings import shortened
from pipelines.hub.card import stated_licence
from pipelines.hub.errors import HubError
from pipelines.hub.snapshot import write_note
from store.files import read_note

if TYPE_CHECKING:
    from pipelines.hub.client import Hub

MAX_TEXT = 200
"""The characters of each text to keep."""
MAX_NAMES = 20
"""The names of bases, and of tags, to keep."""


@dataclass(frozen=True)
class HubSource(Noun):
    """The Hub's facts on a repository at a commit."""

    author: str
    licence: str
    base_models: tuple[str, ...]
    downloads: int
    """In the last 30 days, as the Hub counts them."""
    tags: tuple[str, ...]


def facts_of(ref: AdapterRef, cache_dir: Path, *, hub: Hub) -> HubSource | None:
    """Licence, author, bases and downloads of a repository.

    If the Hub does not answer, its last answer is used; None if there is none.
    """
    saved = cache_dir / ref.repo_id.replace("/", "--") / f"{ref.revision}.about"
    try:
        about = hub.ask("about", ref.repo_id, revision=ref.revision)
    except HubError:
        return read_note(saved, HubSource.from_dict)
    source = HubSource(
        shortened(about["author"], MAX_TEXT),
        stated_licence(about["licences"]),
        _names(about["base_models"]),
        about["downloads"],
        _names(about["tags"]),
    )
    write_note(saved, canonical_json(source.to_dict()))
    return source


def _names(names: list[str]) -> tuple[str, ...]:
    return tuple(shortened(name, MAX_TEXT) for name in names[:MAX_NAMES])
