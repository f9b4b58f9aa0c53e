"""Composites: prompts with questions of several tasks, and how their answers are read.

    1. <question of one task>          1. <its answer>
    2. <question of another>     ─▶    2. <its answer>
    3. …                               3. …

The task of every character is known, so gates can be fitted to such prompts and routing can be
measured on them. Answers are separated by their numbers, which count only at the start of a line:
"in 2. place" does not begin a second answer. A question without an answer under its number counts
as wrong.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from meteora.artifacts import Noun
from meteora.base.chat_template import encode_pair, encode_prompt, render_prompt
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
    """Characters of one task, from `start` to before `end`: number, text, and line break."""

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
    """A prompt of several questions, and its right answer."""

    prompt: str
    response: str
    questions: tuple[Question, ...]
    prompt_spans: tuple[Span, ...]
    """One for each question, in characters of `prompt`; the text before them has no task."""
    response_spans: tuple[Span, ...]
    """One for each question, in characters of `response`."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Prompt and response spans, in characters of the prompt followed by the response."""
        shift = len(self.prompt)
        moved = (Span(s.task, s.start + shift, s.end + shift) for s in self.response_spans)
        return (*self.prompt_spans, *moved)

    def to_dict(self) -> dict[str, Any]:
        """The questions and their tasks; everything else follows from them."""
        return {"questions": [[q.task, q.row.to_dict()] for q in self.questions]}


def compose(
    rows_by_task: Mapping[str, Sequence[Row]], n: int, count: int, seed: int
) -> list[Composite]:
    """`count` composites of `n` questions, drawn at random from the tasks' rows.

    The tasks in one composite differ if there are enough tasks, and are in random order. A row is
    used again only after all other rows of its task.

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
        asked = [Question(task, next(rows[task])) for task in order[:n]]
        composites.append(number_questions(asked))
    return composites


def fits(row: Row) -> bool:
    """Whether a row's answer, under a number, is read back as one answer."""
    return split_answers(f"1. {row.response.strip()}", 99).keys() == {1}


def _dealt(task: str, rows: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """The rows that can be in a composite, in random order, again and again."""
    fit = [row for row in rows if fits(row)]
    if not fit:
        raise ExamplesError(
            f"task {task}: none of its answers can stand in a composite: each is empty, or has"
            " lines that begin with a number and would read as further answers; leave the task out"
        )
    return cycle(rng.sample(fit, len(fit)))


def number_questions(questions: Sequence[Question]) -> Composite:
    """The questions as one prompt, in this order, and their answers."""
    prompt, prompt_spans = _numbered(OPENING, "\n\n", [(q.task, q.row.prompt) for q in questions])
    response, response_spans = _numbered("", "\n", [(q.task, q.row.response) for q in questions])
    return Composite(prompt, response, tuple(questions), prompt_spans, response_spans)


def _numbered(
    opening: str, between: str, texts: Sequence[tuple[str, str]]
) -> tuple[str, tuple[Span, ...]]:
    """Numbered texts joined by `between`, which belongs to the span of the text before it."""
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

    A number counts if it begins a line, is at most `n`, and is larger than the numbers before it.
    So a skipped answer is missing and cannot be confused with another. An empty answer is missing,
    too.
    """
    marks = _marks(output, n)
    ends = [*(start for _, start, _ in marks[1:]), len(output)]
    answers = {
        number: output[text:end].strip()
        for (number, _, text), end in zip(marks, ends, strict=False)
    }
    return {number: answer for number, answer in answers.items() if answer}


def last_number(output: str, n: int) -> int:
    """The number of the answer that an unfinished output is writing; 0 before the first.

    A last line that is only a number so far counts as the start of an answer.
    """
    begun = output.rpartition("\n")[2].strip().isdecimal()
    return next((number for number, _, _ in reversed(_marks(output + ". " * begun, n))), 0)


def _marks(output: str, n: int) -> list[tuple[int, int, int]]:
    """Each number that counts, with the start of the number and of its answer's text."""
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
    """Token ids of prompt and answer, as from `encode_pair`, and the task of each token.

    The task is None for the template and for the sentence before the questions. The end of sequence
    belongs to the last answer. A token belongs to the task of its first character.
    """
    text = render_prompt(tokenizer, composite.prompt)
    owners = [
        *prompt_owners(tokenizer, composite, text, special=not tokenizer.chat_template),
        *_owners(tokenizer, composite.response, composite.response_spans),
    ]
    ids = encode_pair(tokenizer, composite.prompt, composite.response)
    last = composite.response_spans[-1].task
    return ids, [*owners, *([last] * (len(ids) - len(owners)))]


def answer_openings(tokenizer: PreTrainedTokenizerBase, composite: Composite) -> tuple[int, ...]:
    """Indices of the tokens of `encode_composite` that are only the number in front of an answer.

    At these tokens the model has seen the answer before, but nothing of the answer that begins.
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
    """The task of each token of a composite's prompt; None for tokens of no task.

    Args:
        text: the prompt in its template
        special: whether the tokenizer adds its special tokens
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
