"""Licence, base and data sets in a model card: its owner's words, which nobody checks."""

from __future__ import annotations

from pathlib import Path

from meteora.artifacts import REPO_ID
from meteora.untrusted.strict_yaml import StrictYAMLError, parse_yaml

MAX_CARD_BYTES = 1 << 20
MAX_VALUE = 200
"""The most characters of a name or a licence."""
OTHER = "other"
"""The Hub's word for a licence that has no name there."""
MAX_DATASETS = 4
"""The most data sets to take from a card."""


def licence_of(folder: Path) -> str:
    """The licence that the card in a folder names, in its words; several with commas.

    `other` where they are no short text, such as the text of a licence itself.
    """
    return stated_licence(_metadata(folder).get("license"))


def stated_licence(value: object) -> str:
    """The licence of a card's metadata, as `licence_of`."""
    given = [one for one in (value if isinstance(value, list) else [value]) if one]
    licence = ", ".join(dict.fromkeys(_texts(value)))
    return licence if len(_texts(value)) == len(given) and len(licence) <= MAX_VALUE else OTHER


def base_of(folder: Path) -> str:
    """The one base that the card in a folder names; empty for none, or several."""
    value = _metadata(folder).get("base_model")
    texts = _texts(value)
    several = isinstance(value, list) and sum(bool(text) for text in value) > 1
    return "" if several or not texts or " " in texts[0] else texts[0]


def datasets_of(folder: Path) -> tuple[str, ...]:
    """The `owner/name` of the first data sets that the card in a folder names."""
    value = _metadata(folder).get("datasets")
    values = value if isinstance(value, list) else [value]
    names = [name for name in values if isinstance(name, str) and REPO_ID.fullmatch(name)]
    return tuple(dict.fromkeys(names))[:MAX_DATASETS]


def _texts(value: object) -> list[str]:
    """The short texts of a field: one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in values if isinstance(text, str)]
    return [text for text in texts if text and len(text) <= MAX_VALUE and text.isprintable()]


def _metadata(folder: Path) -> dict[str, object]:
    """The YAML at the top of the card; empty if there is no readable one."""
    card = folder / "README.md"
    try:
        if not card.is_file():
            return {}
        with card.open(encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(MAX_CARD_BYTES).lstrip().split("\n")
    except OSError:
        return {}
    end = next((at for at, line in enumerate(lines) if at and line.startswith("---")), 0)
    if lines[0].rstrip() != "---" or not end:
        return {}
    try:
        found = parse_yaml("\n".join(lines[1:end]), typed=False)
    except StrictYAMLError:
        return {}
    return found if isinstance(found, dict) else {}
