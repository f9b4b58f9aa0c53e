"""Composites: prompts with questions of several tasks; make them, and read their answers.

    1. <question of one task>          1. <its answer>
    2. <question of another>     ─▶    2. <its answer>
    3. …                               3. …

Solved composites may come before the questions; the paper has two ("2-shot").

The task of every character is known, so gates can be fitted to such prompts and routing can be
measured on them. Answers are separated by their numbers, which count only at the start of a line:
"in 2. place" does not begin a second answer. A question without an answer under its number counts
as wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from meteora.artifacts import Noun
from meteora.base.chat_template import content_places, encode_pair, encode_prompt, render_prompt
from meteora.untrusted.findings import MOST_NAMED, listed
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

OPENING = (
    "Answer each of the following questions. Begin each answer on a new line with the number of its"
    " question."
)
QUESTIONS, ANSWERS = "Questions:\n\n", "\n\nAnswers:\n\n"
"""Titles, if solved composites come before the questions."""
NUMBERED = re.compile(r"^[ \t]{0,3}(\d{1,3})[.)](?:[ \t]|$)", re.MULTILINE)

_Piece = tuple[str | None, str]
"""(task or None, text)"""


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
    """One for each question, and before them for each question and answer of the solved composites,
    in characters of `prompt`; the other text has no task."""
    response_spans: tuple[Span, ...]
    """One for each question, in characters of `response`."""
    solved: tuple[Composite, ...] = ()
    """Composites that are shown with their answers before the questions."""

    def to_dict(self) -> dict[str, Any]:
        """The questions and their tasks, also of solved ones; everything else follows from them."""
        body: dict[str, Any] = {"questions": [[q.task, q.row.to_dict()] for q in self.questions]}
        return body | ({"solved": [one.to_dict() for one in self.solved]} if self.solved else {})

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str | None]]:
        """Token ids of prompt and answer, as from `encode_pair`, and the task of each token.

        The task is None for the template and for the sentence before the questions. The end of
        sequence belongs to the last answer. A token belongs to the task of its first character.

        Raises:
            ExamplesError: the tokens of a text have no places, or the chat template changes the
                prompt.
        """
        text, plain = render_prompt(tokenizer, self.prompt), not tokenizer.chat_template
        start = self._start(tokenizer, text)
        owners = [
            *_owners(tokenizer, text, self.prompt_spans, shift=start, special=plain),
            *_owners(tokenizer, self.response, self.response_spans),
        ]
        ids = encode_pair(tokenizer, self.prompt, self.response)
        last = self.response_spans[-1].task
        return ids, [*owners, *([last] * (len(ids) - len(owners)))]

    def prompt_owners(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[str | None]:
        """The task of each token of a prompt in its template, or None; raises as `encode`."""
        return _owners(tokenizer, text, self.prompt_spans, shift=self._start(tokenizer, text))

    def _start(self, tokenizer: PreTrainedTokenizerBase, text: str) -> int:
        """The place of the prompt in a text: the chat template's words may hold it, too."""
        messages = [{"role": "user", "content": self.prompt}]
        places = content_places(tokenizer, messages, text) if tokenizer.chat_template else None
        start = places[0][0] if places else text.find(self.prompt)
        if start < 0:
            raise ExamplesError(
                f"the base's chat template changes what a prompt says ({self.prompt[:60]!r}), so"
                " composites and spans have no place in it; leave them out"
            )
        return start

    def answer_starts(
        self, tokenizer: PreTrainedTokenizerBase, form: str = "{}. "
    ) -> tuple[int, ...]:
        """Indices of the tokens of `encode` that are only the number before an answer.

        At these tokens the model has seen the previous answer, but nothing of the next one.

        Args:
            form: of what precedes an answer. `{}` is its digits alone: more may follow, so no
                question is named
        """
        shift = len(encode_prompt(tokenizer, self.prompt))
        numbers = [
            range(span.start, span.start + len(form.format(number)))
            for number, span in enumerate(self.response_spans, 1)
        ]
        return tuple(
            shift + place
            for place, (first, end) in enumerate(_offsets(tokenizer, self.response))
            if end > first and any(first in chars and end <= chars.stop for chars in numbers)
        )


def compose(
    rows_by_task: Mapping[str, Sequence[Row]], n: int, count: int, seed: int, num_solved: int = 0
) -> list[Composite]:
    """`count` composites of `n` questions, drawn at random from the tasks' rows.

    The tasks in one composite differ if there are enough tasks, and are in random order. A row is
    used again only after all other rows of its task. The questions are the same with and without
    solved composites.

    Args:
        num_solved: other composites that each prompt shows with their answers

    Raises:
        ExamplesError: a task has no row that can be in a composite, or too few for the solved ones.
    """
    rng = random.Random(f"{seed}/{n}")  # noqa: S311  (no secret)
    if not rows_by_task:
        raise ExamplesError("a composite is made of tasks' rows, and there are no tasks")
    repeats = -(-n // len(rows_by_task))
    least = repeats * (1 + num_solved) if num_solved else 1  # no question is also shown solved
    rows = {task: _dealt(task, own, rng, least) for task, own in rows_by_task.items()}
    longest = max(map(len, rows_by_task.values()))

    def draw(beside: Sequence[Question] = ()) -> tuple[Question, ...]:
        order = [task for _ in range(repeats) for task in rng.sample([*rows], len(rows))]
        used = {question.row.key for question in beside}
        return tuple(
            Question(task, _other(task, islice(rows[task], longest), used)) for task in order[:n]
        )

    drawn = [draw() for _ in range(count)]
    return [
        number_questions(one, [number_questions(draw(one)) for _ in range(num_solved)])
        for one in drawn
    ]


def mixable(examples: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """The experts with examples that can be in a composite; `ExamplesError` if there is none."""
    fit = {name: rows for name, rows in examples.items() if any(map(fits, rows))}
    if not fit:
        raise ExamplesError(
            "gates.composites: no example of any expert can stand in a mixed prompt"
            f" ({listed([*examples], MOST_NAMED)}): each answer is empty, or has lines that begin"
            " with a number; take gates.composites out"
        )
    return fit


def fits(row: Row) -> bool:
    """Whether a row's answer, with a number before it, is read back as one answer."""
    return split_answers(f"1. {row.response.strip()}", 99).keys() == {1}


def _dealt(task: str, rows: Sequence[Row], rng: random.Random, least: int) -> Iterator[Row]:
    """The rows that can be in a composite, in random order, repeated without end."""
    fit = [row for row in rows if fits(row)]
    if not fit:
        raise ExamplesError(
            f"task {task}: none of its answers can stand in a composite: each is empty, or has"
            " lines that begin with a number and would read as further answers; leave the task out"
        )
    if (count := len({row.key for row in fit})) < least:
        raise ExamplesError(
            f"task {task}: {count} different prompts of its rows can stand in a composite, and one"
            f" with its solved ones takes {least}; give it more rows, or a smaller `num_fewshot`"
        )
    return cycle(rng.sample(fit, len(fit)))


def _other(task: str, rows: Iterator[Row], used: Collection[str]) -> Row:
    """The next row whose question is not used in this prompt; tasks may share questions."""
    unused = next((row for row in rows if row.key not in used), None)
    if unused is None:
        raise ExamplesError(
            f"task {task}: each of its questions is asked in one prompt, some as another task's,"
            " so none is left to show solved; give it more rows, or leave one of the tasks out"
        )
    return unused


def number_questions(questions: Sequence[Question], solved: Sequence[Composite] = ()) -> Composite:
    """The questions as one prompt, in this order, behind solved composites, and their answers."""
    own, response = _numbered_questions(questions), _numbered_answers(questions)
    prompt: list[_Piece] = [(None, f"{OPENING}\n\n")]
    for one in solved:
        prompt += [(None, QUESTIONS), *_numbered_questions(one.questions)]
        prompt += [(None, ANSWERS), *_numbered_answers(one.questions), (None, "\n\n")]
    # no line break at the end: some chat templates cut it off
    prompt += [(None, QUESTIONS), *own, (None, ANSWERS.rstrip())] if solved else own
    return Composite(
        "".join(text for _, text in prompt),
        "".join(text for _, text in response),
        tuple(questions),
        spans_of(prompt),
        spans_of(response),
        tuple(solved),
    )


def _numbered_questions(questions: Sequence[Question]) -> list[_Piece]:
    return _numbered("\n\n", [(question.task, question.row.prompt) for question in questions])


def _numbered_answers(questions: Sequence[Question]) -> list[_Piece]:
    return _numbered("\n", [(question.task, question.row.response) for question in questions])


def _numbered(between: str, texts: Sequence[tuple[str, str]]) -> list[_Piece]:
    """Numbered texts joined by `between`, which belongs to the task of the text before it."""
    ends = [between] * (len(texts) - 1) + [""]
    return [
        (task, f"{number}. {text.strip()}{end}")
        for number, ((task, text), end) in enumerate(zip(texts, ends, strict=True), 1)
    ]


def spans_of(pieces: Iterable[_Piece]) -> tuple[Span, ...]:
    """The characters of each piece with a task, in the joined text."""
    spans, start = [], 0
    for task, text in pieces:
        if task is not None:
            spans.append(Span(task, start, start + len(text)))
        start += len(text)
    return tuple(spans)


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


def _owners(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
    *,
    shift: int = 0,
    special: bool = False,
) -> list[str | None]:
    owners: list[str | None] = []
    for first, end in _offsets(tokenizer, text, special=special):
        inside = (span.task for span in spans if span.start <= first - shift < span.end)
        owners.append(next(inside, None) if end > first else None)
    return owners


def _offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False
) -> list[tuple[int, int]]:
    """(start, end) of each token in characters; equal for a token that is not text.

    Some tokenizers (Pythia's, OPT's) leave spaces out, so a token of spaces has no characters: here
    it has its last one.
    """
    encoded = with_places(tokenizer, text, special=special)
    return [
        (first - 1, end) if 0 < first == end and not is_added else (first, end)
        for (first, end), is_added in zip(
            encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    ]


def require_places(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ExamplesError` if a tokenizer is one in Python, which gives no places of tokens."""
    if not tokenizer.is_fast:
        raise ExamplesError(
            "the base's tokenizer gives no places of its tokens in a text, which composites,"
            " conversations and spans need; leave them out"
        )


def with_places(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False
) -> BatchEncoding:
    """The tokens of a text, their places in it, and a mask of the special ones.

    Raises as `require_places`.
    """
    require_places(tokenizer)
    return tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
