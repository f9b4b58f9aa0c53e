"""Rows of text: what gates are fitted to, and what benchmarks ask."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from meteora.artifacts import MeteoraError, Noun, canonical_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
    """What judges an answer where many are right: `reasoning_gym:<name>@<seed>#<entry>`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.response, *self.references)

    @property
    def key(self) -> str:
        """What two rows share that would be the same question to a model."""
        return " ".join(self.prompt.split())

    @property
    def sha256(self) -> str:
        """Of the question, however it is spaced."""
        return canonical_sha256(self.key)

    def to_dict(self) -> dict[str, Any]:
        """Only what is set, so that a row without choices hashes as it always did."""
        at_default = {f.name for f in fields(self) if getattr(self, f.name) == f.default}
        return {name: value for name, value in super().to_dict().items() if name not in at_default}


def rows_sha256(rows: Sequence[Noun]) -> str:
    return canonical_sha256([row.to_dict() for row in rows])


def refuse_overlap(
    examples: Mapping[str, Sequence[Row]], tests: Mapping[str, Sequence[Row]]
) -> None:
    """Refuse a test row whose prompt gates were fitted to: it would measure memory."""
    fitted = {row.sha256: name for name, rows in examples.items() for row in rows}
    for task, rows in tests.items():
        for row in rows:
            if (name := fitted.get(row.sha256)) is not None:
                raise ExamplesError(
                    f"task {task}: the prompt {row.prompt[:60]!r} is also an example of expert"
                    f" {name}; take it out of one of the two"
                )
