"""The texts of a checkpoint's folder, which lie beside its tensors."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from meteora.checkpoint.manifest import CARD, CONFIG, CONFIG_TEXT, LINEAGE, MANIFEST
from pipelines.publishing.in_toto import write_lineage
from pipelines.reports import card

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from meteora.checkpoint.manifest import Manifest
    from pipelines.reports.summary import Summary


def write_texts(
    folder: Path,
    manifest: Manifest,
    tensors: Mapping[str, str],
    title: str,
    summary: Summary | None = None,
    recipe_sha256: str = "",
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write manifest, config, card and lineage into a folder that has the tensors.

    Args:
        tensors: SHA-256 by name of the files of tensors: experts, gates, statistics.
        title: The heading of the card.
        summary: The scores that the card shows; None where nothing was measured.
        recipe_sha256: Of the recipe that made the checkpoint; empty where none did.
        more: Other texts, by path in the folder.
    """
    texts = {
        MANIFEST: manifest.to_json(),
        CONFIG: CONFIG_TEXT,
        CARD: card.write_card(manifest, summary, title),
        LINEAGE: write_lineage(manifest, tensors, recipe_sha256),
        **more,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
