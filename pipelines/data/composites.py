"""Prompts that hold several tasks at once, and what becomes of their answers.

    1. <question of one task>          1. <its answer>
    2. <question of another>     ─▶    2. <its answer>
    3. …                               3. …

It is known to whom every character belongs, so that gates can be fitted to such prompts and routing
be judged on them. Answers are told apart by their numbers, and only where those begin a line: "in
2. place" is no second answer. A question without an answer of its number counts as wrong.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from meteora.artifacts import Noun
from meteora.base.chat_template import encode_pair, encode_prompt, open_prompt
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

OPENING = (
    "Answer each of the following questions. Begin each answer on a new line with the number of its"
    " question."
)
NUMBERED = re.compile(r"^[ \t]{0,3}(\d{1,3})[.)](?:[ \t]|$)", re.MULTILINE)


@dataclass(frozen=True)
class Span(Noun):
    """Characters that belong to one task: its number, its text, and the line's end."""

    task: str
    start: int
    end: int


@dataclass(frozen=True)
class Question(Noun):
    """One of a composite's questions."""

    task: str
    row: Row


@dataclass(frozen=True)
class Composite(Noun):
    prompt: str
    response: str
    questions: tuple[Question, ...]
    prompt_spans: tuple[Span, ...]
    """One a question, in characters of `prompt`; what precedes them belongs to nobody."""
    response_spans: tuple[Span, ...]
    """One a question, in characters of `response`."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """All of them, in characters of prompt and response put together."""
        shift = len(self.prompt)
        moved = (Span(s.task, s.start + shift, s.end + shift) for s in self.response_spans)
        return (*self.prompt_spans, *moved)

    def to_dict(self) -> dict[str, Any]:
        """What is asked and who is asked; everything else follows from it."""
        return {"questions": [[q.task, q.row.to_dict()] for q in self.questions]}


def compose(
    rows_by_task: Mapping[str, Sequence[Row]], n: int, count: int, seed: int
) -> list[Composite]:
    """`count` composites of `n` questions, each drawn from the tasks' rows.

    The tasks of one composite differ while there are enough of them, and their order is drawn
    too. Every task's rows are gone through once before any of them comes again.

    Raises:
        ExamplesError: a task has no row that can stand in a composite.
    """
    rng = random.Random(f"{seed}/{n}")  # noqa: S311  (a deal, no secret)
    rows = {task: _dealt(task, own, rng) for task, own in rows_by_task.items()}
    if not rows:
        raise ExamplesError("a composite is made of tasks' rows, and there are no tasks")
    composites = []
    for _ in range(count):
        order = [task for _ in range(-(-n // len(rows))) for task in rng.sample([*rows], len(rows))]
        composites.append(_put_together([Question(task, next(rows[task])) for task in order[:n]]))
    return composites


def fits(row: Row) -> bool:
    """Whether a row's answer, under a number, reads as one answer."""
    return split_answers(f"1. {row.response.strip()}", 99).keys() == {1}


def _dealt(task: str, rows: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """The rows that can stand in a composite, in a drawn order, over and over."""
    fit = [row for row in rows if fits(row)]
    if not fit:
        raise ExamplesError(
            f"task {task}: none of its answers can stand in a composite: each is empty, or has"
            " lines that begin with a number and would read as further answers; leave the task out"
        )
    return cycle(rng.sample(fit, len(fit)))


def _put_together(questions: Sequence[Question]) -> Composite:
    prompt, prompt_spans = _numbered(OPENING, "\n\n", [(q.task, q.row.prompt) for q in questions])
    response, response_spans = _numbered("", "\n", [(q.task, q.row.response) for q in questions])
    return Composite(prompt, response, tuple(questions), prompt_spans, response_spans)


def _numbered(
    opening: str, between: str, texts: Sequence[tuple[str, str]]
) -> tuple[str, tuple[Span, ...]]:
    """Texts under each other with their numbers; what parts two of them belongs to the former."""
    whole = opening + between if opening else ""
    spans = []
    for number, (task, text) in enumerate(texts, 1):
        end = between if number < len(texts) else ""
        piece = f"{number}. {text.strip()}{end}"
        spans.append(Span(task, len(whole), len(whole) + len(piece)))
        whole += piece
    return whole, tuple(spans)


def split_answers(output: str, n: int) -> dict[int, str]:
    """Each answer of an output by its number.

    A number counts where it begins a line, is no larger than `n`, and is larger than the ones
    before it; so an answer that is skipped is missing, and none is taken for another. An answer
    that is empty is missing too.
    """
    marks = _marks(output, n)
    ends = [*(start for _, start, _ in marks[1:]), len(output)]
    answers = {
        number: output[text:end].strip()
        for (number, _, text), end in zip(marks, ends, strict=False)
    }
    return {number: answer for number, answer in answers.items() if answer}


def last_number(output: str, n: int) -> int:
    """The number of the answer that an unfinished output has come to; 0 before the first.

    A line that so far is nothing but a number is taken to begin an answer.
    """
    begun = output.rpartition("\n")[2].strip().isdecimal()
    return next((number for number, _, _ in reversed(_marks(output + ". " * begun, n))), 0)


def _marks(output: str, n: int) -> list[tuple[int, int, int]]:
    """Of each number that counts: itself, and where it and its answer's text begin."""
    marks, last = [], 0
    for match in NUMBERED.finditer(output):
        number = int(match[1])
        if last < number <= n:
            marks.append((number, match.start(), match.end()))
            last = number
    return marks


def encode_composite(
    tokenizer: PreTrainedTokenizerBase, composite: Composite
) -> tuple[list[int], list[str | None]]:
    """Token ids of prompt and answer, as `encode_pair` gives them, and each token's task.

    None stands for what belongs to nobody: the template and the sentence before the questions. The
    end of sequence belongs to the last answer. A token belongs to the task of its first character.
    """
    text = open_prompt(tokenizer, composite.prompt)
    owners = [
        *prompt_owners(tokenizer, composite, text, special=not tokenizer.chat_template),
        *_owners(tokenizer, composite.response, composite.response_spans),
    ]
    ids = encode_pair(tokenizer, composite.prompt, composite.response)
    last = composite.response_spans[-1].task
    return ids, [*owners, *([last] * (len(ids) - len(owners)))]


def answer_openings(tokenizer: PreTrainedTokenizerBase, composite: Composite) -> tuple[int, ...]:
    """Which of `encode_composite`'s tokens are nothing but the number that an answer begins with.

    They follow the answer before, and what is to follow them is not there yet.
    """
    shift = len(encode_prompt(tokenizer, composite.prompt))
    encoded = tokenizer(composite.response, add_special_tokens=False, return_offsets_mapping=True)
    numbers = [
        range(span.start, span.start + len(f"{number}. "))
        for number, span in enumerate(composite.response_spans, 1)
    ]
    return tuple(
        shift + place
        for place, (first, end) in enumerate(encoded["offset_mapping"])
        if end > first and any(first in chars and end <= chars.stop for chars in numbers)
    )


def prompt_owners(
    tokenizer: PreTrainedTokenizerBase, composite: Composite, text: str, *, special: bool = False
) -> list[str | None]:
    """The task of each token of `text`, which is a composite's prompt in its template.

    Args:
        special: whether the tokenizer adds tokens of its own
    """
    start = text.index(composite.prompt)
    return _owners(tokenizer, text, composite.prompt_spans, shift=start, special=special)


def _owners(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
    *,
    shift: int = 0,
    special: bool = False,
) -> list[str | None]:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    owners: list[str | None] = []
    for first, end in encoded["offset_mapping"]:
        inside = (span.task for span in spans if span.start <= first - shift < span.end)
        owners.append(next(inside, None) if end > first else None)
    return owners
