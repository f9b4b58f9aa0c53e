"""What the card in a downloaded folder says: its owner's words, read as text and not checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_CARD_BYTES = 1 << 20


def licence_of(folder: Path) -> str:
    """The licence that it names; empty where it names none."""
    line = re.search(r"^license:[ \t]*([^\s#]{1,100})", _front(folder), re.MULTILINE)
    return line[1].strip("\"'") if line else ""


def base_of(folder: Path) -> str:
    """The one base that it names; empty where it names none, or several."""
    front = _front(folder)
    if line := re.search(r"^base_model:[ \t]*([^\s#\[]{1,200})[ \t]*$", front, re.MULTILINE):
        return line[1].strip("\"'")
    named = re.search(r"^base_model:[ \t]*\n((?:[ \t]*-[ \t]*\S{1,200}[ \t]*\n?)+)", front, re.M)
    names = re.findall(r"-[ \t]*(\S+)[ \t]*$", named[1], re.MULTILINE) if named else []
    return names[0].strip("\"'") if len(names) == 1 else ""


def _front(folder: Path) -> str:
    """The metadata at the top of the card, as text: YAML from strangers can be a bomb."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(MAX_CARD_BYTES)
    front = re.match(r"\s*---\n(.*?)\n---", head, re.DOTALL)
    return front[1] if front else ""
