"""Examples whose parts belong to different experts, in a file with a line of JSON for each.

    {"prompt": [{"text": "When was it, and "}, {"text": "what is 3 + 4?", "expert": "sums"}],
     "response": [{"text": "2021-03-03", "expert": "dates"}, {"text": ", 7", "expert": "sums"}]}

From them, gates learn where in a text to switch, in addition to each expert's own examples. The
texts of the parts are joined without anything between them. A part of a prompt may have no expert;
a part of a response must have one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from meteora.artifacts import Noun
from pipelines.data.composites import Composite, Span
from pipelines.data.row_sources import json_lines
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

NEEDED = (
    '{"prompt": [{"text": "…", "expert": "…"}, …], "response": [{"text": "…", …}, …]} is needed'
)


@dataclass(frozen=True)
class Part(Noun):
    """A piece of text of one expert."""

    text: str
    expert: str = ""
    """Its name; empty if the text belongs to no expert."""


@dataclass(frozen=True)
class SpannedRow(Noun):
    """A question and its answer, in parts."""

    prompt: tuple[Part, ...]
    response: tuple[Part, ...]

    @property
    def owners(self) -> set[str]:
        """The experts of all parts."""
        return {part.expert for part in (*self.prompt, *self.response)} - {""}

    def composite(self) -> Composite:
        """The same as a composite, so that both find the experts of their tokens in one way."""
        return Composite(
            "".join(part.text for part in self.prompt),
            "".join(part.text for part in self.response),
            (),
            _spans(self.prompt),
            _spans(self.response),
        )


def prompt_parts(rows: Sequence[SpannedRow]) -> dict[str, list[Row]]:
    """Each part of a prompt as a row of its own, by its expert, to compare with tests."""
    found: dict[str, list[Row]] = {}
    for part in (part for row in rows for part in row.prompt if part.expert):
        found.setdefault(part.expert, []).append(Row(part.text.strip(), ""))
    return found


def _spans(parts: Sequence[Part]) -> tuple[Span, ...]:
    ends = list(accumulate(len(part.text) for part in parts))
    starts = [0, *ends[:-1]]
    return tuple(
        Span(part.expert, start, end)
        for part, start, end in zip(parts, starts, ends, strict=True)
        if part.expert
    )


def read_spans(source: str, folder: Path, experts: Collection[str]) -> list[SpannedRow]:
    """All rows of a source.

    Args:
        source: `jsonl:<file>`
        folder: paths are relative to it
        experts: names of the experts that have their own examples

    Raises:
        ExamplesError: the file cannot be read, or a line is not a row with spans.
    """
    kind, _, name = source.partition(":")
    if kind != "jsonl" or not name:
        raise ExamplesError(f"{source}: examples with spans come from `jsonl:<file>`")
    rows = [_row(line, place, experts) for line, place in json_lines(folder / name)]
    if not rows:
        raise ExamplesError(f"{source}: no rows in it")
    return rows


def _row(line: str, place: str, experts: Collection[str]) -> SpannedRow:
    try:
        body = json.loads(line)
        row = SpannedRow(_parts(body["prompt"]), _parts(body["response"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExamplesError(f"{place}: not a row with spans; {NEEDED}") from error
    composite = row.composite()
    if composite.prompt.strip() != composite.prompt:
        raise ExamplesError(
            f"{place}: its prompt begins or ends with white space, which chat templates remove;"
            " remove it"
        )
    if not all(part.expert for part in row.response):
        raise ExamplesError(f"{place}: a part of its response has no expert; give each part one")
    if strange := row.owners - set(experts):
        raise ExamplesError(
            f"{place}: {', '.join(sorted(strange))} is not an expert with its own examples; those"
            f" are {', '.join(experts)}"
        )
    return row


def _parts(found: Any) -> tuple[Part, ...]:  # noqa: ANN401  (JSON is what it is)
    parts = tuple(Part(one["text"], one.get("expert", "")) for one in found)
    if not parts or not all(isinstance(p.text, str) and p.text for p in parts):
        raise ValueError(found)
    if not all(isinstance(part.expert, str) for part in parts):
        raise TypeError(found)
    return parts
