"""A row: a question and its answer. Gates are fitted to rows, and benchmarks ask them."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from os.path import commonprefix
from typing import Any

from meteora.artifacts import MeteoraError, Noun, canonical_sha256

MOST_SHOWN = 80
"""Most characters of a prompt in a message."""


class ExamplesError(MeteoraError):
    """Rows cannot be read, or cannot be used together."""


@dataclass(frozen=True)
class Row(Noun):
    """A question and its right answers."""

    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    """All answers to choose from, right ones included; empty if the answer is free."""
    references: tuple[str, ...] = ()
    """Further right answers, beside `response`."""
    checker: str = ""
    """The scorer, if many answers are right: `reasoning_gym:<name>@<seed>#<entry>`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.response, *self.references)

    @property
    def key(self) -> str:
        """The prompt with single spaces; rows with equal keys are the same question."""
        return " ".join(self.prompt.split())

    @property
    def question(self) -> str:
        """The key in Unicode NFC, to compare rows of two files: é can be one character or two."""
        return unicodedata.normalize("NFC", self.key)

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
    examples: Mapping[str, Sequence[Row]],
    tests: Mapping[str, Sequence[Row]],
    example_place: Callable[[str, int], str] = lambda _name, number: f"row {number + 1}",
    test_place: Callable[[str, int], str] = lambda _name, number: f"row {number + 1}",
    advice: str = "take it out of one of the two",
    kind: str = "an example of expert {expert}",
) -> None:
    """Refuse test rows whose prompts are also examples: they would measure memorisation.

    Args:
        examples: by expert
        tests: by task
        example_place: the place of an example, from its expert and its number, for the message
        test_place: the same for a task and one of its rows
        kind: a description of the examples in the message

    Raises:
        ExamplesError: a prompt is in both.
    """
    known: dict[str, tuple[str, int]] = {}
    for name, rows in examples.items():
        for number, row in enumerate(rows):
            known.setdefault(row.question, (name, number))
    overlaps = [
        (task, number, row)
        for task, rows in tests.items()
        for number, row in enumerate(rows)
        if row.question in known
    ]
    if not overlaps:
        return
    task, test, row = overlaps[0]
    expert, example = known[row.question]
    others = [other.prompt for other in (*tests[task], *examples[expert])]
    shown = differing_part(row.prompt, others)
    count = f"; there are {len(overlaps):,} such test rows" if len(overlaps) > 1 else ""
    raise ExamplesError(
        f"task {task}: {test_place(task, test)} with the prompt {shown!r} is also"
        f" {kind.format(expert=expert)}, {example_place(expert, example)}; {advice}{count}"
    )


def differing_part(prompt: str, others: Sequence[str]) -> str:
    """The part of a prompt that differs from the others, since prompts often begin alike."""
    alike = [prompt, *(other for other in others if other != prompt)]
    start = len(commonprefix(alike))  # noqa: RUF071  (by characters, which are no paths)
    if len(prompt) <= MOST_SHOWN or len(others) < 2:
        start = 0
    part = prompt[start : start + MOST_SHOWN]
    return f"{'…' if start else ''}{part}{'…' if start + MOST_SHOWN < len(prompt) else ''}"
