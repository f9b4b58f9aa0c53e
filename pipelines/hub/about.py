"""What the Hub says of a repository beside its files: its owner's words, not checked, but kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.artifacts import Noun, canonical_json
from meteora.untrusted.findings import shortened
from pipelines.hub.errors import HubError
from pipelines.hub.snapshot import write_note

if TYPE_CHECKING:
    from pathlib import Path

    from meteora.artifacts import AdapterRef
    from pipelines.hub.client import Hub

MAX_TEXT = 200
MAX_NAMES = 20


@dataclass(frozen=True)
class HubSource(Noun):
    author: str
    licence: str
    base_models: tuple[str, ...]
    downloads: int
    """In the last 30 days, as the Hub counts."""
    tags: tuple[str, ...]


def ask_about(hub: Hub, ref: AdapterRef, kept: Path) -> HubSource | None:
    """Licence, author, bases and downloads, for the record.

    Args:
        kept: The file that holds what was said last; it answers where the Hub does not.

    Returns:
        None where neither says anything.
    """
    try:
        about = hub.ask("about", ref.repo_id, ref.repo_id, revision=ref.revision)
    except HubError:
        if not kept.is_file():
            return None
        return HubSource.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    source = HubSource(
        shortened(about["author"], MAX_TEXT),
        shortened(about["licence"], MAX_TEXT),
        _names(about["base_models"]),
        about["downloads"],
        _names(about["tags"]),
    )
    write_note(kept, canonical_json(source.to_dict()))
    return source


def _names(names: list[str]) -> tuple[str, ...]:
    return tuple(shortened(name, MAX_TEXT) for name in names[:MAX_NAMES])
