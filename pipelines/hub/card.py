"""What the card in a downloaded folder says: its owner's words, read as text and not checked.

YAML from strangers can be a bomb, and so can a regular expression over a megabyte of it; so the two
facts that are wanted are looked for line by line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_CARD_BYTES = 1 << 20
MAX_VALUE = 200
"""Characters of a name or a licence."""


def licence_of(folder: Path) -> str:
    """The licence that it names; empty where it names none, or several."""
    return _only(_values(folder, "license"))


def base_of(folder: Path) -> str:
    """The one base that it names; empty where it names none, or several."""
    return _only(_values(folder, "base_model"))


def _only(values: list[str]) -> str:
    return values[0] if len(values) == 1 else ""


def _values(folder: Path, key: str) -> list[str]:
    """What stands under a key: `key: a`, `key: [a, b]`, or below it a line `- a` for each."""
    lines = iter(_front(folder))
    for line in lines:
        if not line.startswith(f"{key}:"):
            continue
        text = line[len(key) + 1 :].partition(" #")[0].strip()
        if text.startswith("["):
            items = text.strip("[]").split(",")
        elif text and not text.startswith("#"):
            items = [text]
        else:
            items = []
            for item in lines:
                if not item.lstrip().startswith("-"):
                    break
                items.append(item.lstrip()[1:].partition(" #")[0])
        return [value for value in (_value(item) for item in items) if value]
    return []


def _value(text: str) -> str:
    value = text.strip().strip("\"'")
    return value if len(value) <= MAX_VALUE and value.isprintable() and " " not in value else ""


def _front(folder: Path) -> list[str]:
    """The lines of metadata at the top of the card."""
    card = folder / "README.md"
    try:
        if not card.is_file():
            return []
        with card.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_CARD_BYTES).lstrip().split("\n")
    except OSError:  # without a card nothing is named
        return []
    if lines[0].rstrip() != "---":
        return []
    end = next((at for at, line in enumerate(lines) if at and line.startswith("---")), 0)
    return lines[1:end]
