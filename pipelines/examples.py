"""Rows of text: what gates are fitted to, and what benchmarks ask."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from meteora.artifacts import MeteoraError, Noun, canonical_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

JSONL = "jsonl:"
MAX_ROW_BYTES = 1 << 20


class ExamplesError(MeteoraError):
    """Rows cannot be read, or may not be used together."""


@dataclass(frozen=True)
class Row(Noun):
    """A question and what it is to be answered with."""

    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    """All answers to choose from, the right ones among them; empty for a free answer."""
    references: tuple[str, ...] = ()
    """Further right answers, beside `response`."""
    checker: str = ""
    """What judges an answer where there are many right ones: `reasoning_gym:<name>@<seed>#<n>`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.response, *self.references)

    def to_dict(self) -> dict[str, Any]:
        """Only what is set, so that a row without choices hashes as it always did."""
        at_default = {f.name for f in fields(self) if getattr(self, f.name) == f.default}
        return {name: value for name, value in super().to_dict().items() if name not in at_default}


def read_rows(source: str, folder: Path, limit: int) -> list[Row]:
    """The first `limit` rows of a source.

    Args:
        source: `jsonl:<file>`, one {"prompt", "response"} a line
        folder: what the file's path is relative to
    """
    if not source.startswith(JSONL):
        raise ExamplesError(f"{source}: rows come from `jsonl:<file>`")
    path = folder / source.removeprefix(JSONL)
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ExamplesError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise ExamplesError(f'{path}: no rows in it; one {{"prompt", "response"}} a line is needed')
    return rows


def _row(line: str, place: str) -> Row:
    if len(line) > MAX_ROW_BYTES:
        raise ExamplesError(f"{place}: longer than {MAX_ROW_BYTES:,} characters")
    try:
        body = json.loads(line)
        row = Row(body["prompt"], body["response"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExamplesError(
            f'{place}: not a row; {{"prompt": "…", "response": "…"}} is needed'
        ) from error
    if not (isinstance(row.prompt, str) and isinstance(row.response, str) and row.prompt.strip()):
        raise ExamplesError(f"{place}: prompt and response must be text, and the prompt not empty")
    return row


def rows_sha256(rows: Sequence[Row]) -> str:
    return canonical_sha256([row.to_dict() for row in rows])


def refuse_overlap(
    examples: Mapping[str, Sequence[Row]], tests: Mapping[str, Sequence[Row]]
) -> None:
    """Refuse a test row whose prompt gates were fitted to: it would measure memory."""
    fitted = {_key(row): name for name, rows in examples.items() for row in rows}
    for task, rows in tests.items():
        for row in rows:
            if (name := fitted.get(_key(row))) is not None:
                raise ExamplesError(
                    f"task {task}: the prompt {row.prompt[:60]!r} is also an example of expert"
                    f" {name}; take it out of one of the two"
                )


def _key(row: Row) -> str:
    return " ".join(row.prompt.split())
