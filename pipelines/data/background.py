"""Texts that belong to no adapter: examples for the base, if it is a choice of the router.

The texts were written for this package. Questions have no answers: the base answers them itself,
since routing must not change the base's own answers.
"""

import json
from pathlib import Path

from pipelines.data.rows import Row

MAX_NEW_TOKENS = 48
"""Most tokens of an answer of the base, or of an adapter, that becomes an example; this is enough
to show its style."""
TEXTS = Path(__file__).with_name("background.jsonl")
"""A line of JSON each: `prompt` for a question, `text` for a plain text."""


def background_rows() -> list[Row]:
    """Questions with an empty answer, and plain texts as answers to an empty prompt."""
    bodies = map(json.loads, TEXTS.read_text(encoding="utf-8").splitlines())
    return [Row(body.get("prompt", ""), body.get("text", "")) for body in bodies]
