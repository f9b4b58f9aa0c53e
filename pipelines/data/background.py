"""Text that belongs to no adapter: what the base is told by where it is one of a router's choices.

The texts are our own. Questions come without answers: the base answers them itself, since what it
would say is what must not change.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.data.rows import Row

TEXTS = Path(__file__).with_name("background.jsonl")


def background_rows() -> list[Row]:
    """Questions without an answer, and plain texts without a question."""
    found = []
    for line in TEXTS.read_text(encoding="utf-8").splitlines():
        body = json.loads(line)
        found.append(Row(body.get("prompt", ""), body.get("text", "")))
    return found
