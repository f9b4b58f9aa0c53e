"""A row: a question and its answer. Gates are fitted to rows, and benchmarks ask them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from meteora.artifacts import MeteoraError, Noun, canonical_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ExamplesError(MeteoraError):
    """Rows cannot be read, or cannot be used together."""


@dataclass(frozen=True)
class Row(Noun):
    """A question and its right answers."""

    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    """All answers to choose from, with the right ones; empty if the answer is free."""
    references: tuple[str, ...] = ()
    """Other right answers, beside `response`."""
    checker: str = ""
    """The scorer, if many answers are right: `reasoning_gym:<name>@<seed>#<entry>`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.response, *self.references)

    @property
    def key(self) -> str:
        """The prompt with single spaces; rows with one key are the same question."""
        return " ".join(self.prompt.split())

    @property
    def sha256(self) -> str:
        """The hash of `key`."""
        return canonical_sha256(self.key)

    def to_dict(self) -> dict[str, Any]:
        """Only fields that differ from their defaults, so new fields change no hash of old rows."""
        at_default = {f.name for f in fields(self) if getattr(self, f.name) == f.default}
        return {name: value for name, value in super().to_dict().items() if name not in at_default}


def rows_sha256(rows: Sequence[Noun]) -> str:
    """The hash of rows or composites in order."""
    return canonical_sha256([row.to_dict() for row in rows])


def refuse_overlap(
    examples: Mapping[str, Sequence[Row]], tests: Mapping[str, Sequence[Row]]
) -> None:
    """Refuse test rows whose prompts are also examples: they would measure memory.

    Args:
        examples: by expert
        tests: by task

    Raises:
        ExamplesError: a prompt is in both.
    """
    expert_of = {row.sha256: name for name, rows in examples.items() for row in rows}
    for task, rows in tests.items():
        for row in rows:
            if (name := expert_of.get(row.sha256)) is not None:
                raise ExamplesError(
                    f"task {task}: the prompt {row.prompt[:60]!r} is also an example of expert"
                    f" {name}; take it out of one of the two"
                )
