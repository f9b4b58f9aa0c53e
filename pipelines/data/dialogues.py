"""Dialogues: the questions of a conversation in a benchmark; each turn has another subject.

    user     Convert this date: March 3, 2021.       iso_dates
    ...      (the model's answer)
    user     What is 12 plus 30?                     arithmetic
    ...      (the model's answer, with its own first answer in the prompt)

Unlike a `Conversation`, to which gates are fitted, a dialogue has no answers before it is asked.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Self

from meteora.artifacts import Noun
from pipelines.data.composites import Question
from pipelines.data.conversations import Conversation, Turn
from pipelines.data.rows import ExamplesError, Row


@dataclass(frozen=True)
class Dialogue(Noun):
    """Questions to ask one after the other, each with its task."""

    questions: tuple[Question, ...]
    system: str | None = None
    """The system prompt; None: that of the chat template; empty: no system prompt."""

    def to_dict(self) -> dict[str, Any]:
        """The questions and their tasks, and the system prompt if there is one."""
        body: dict[str, Any] = {"questions": [[q.task, q.row.to_dict()] for q in self.questions]}
        return body if self.system is None else body | {"system": self.system}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        questions = (Question(task, Row.from_dict(row)) for task, row in body["questions"])
        return cls(tuple(questions), body.get("system"))

    def with_answers(self, answers: Sequence[str]) -> Conversation:
        """The turns with these answers, and the next question with an empty answer."""
        pairs = zip(self.questions, [*answers, ""], strict=False)
        turns = (Turn(question.task, question.row.prompt, answer) for question, answer in pairs)
        return Conversation(tuple(turns), self.system)

    def alone(self, place: int) -> "Dialogue":
        """The question at a place, without those before it."""
        return Dialogue((self.questions[place],), self.system)


def draw_dialogues(
    rows_by_task: Mapping[str, Sequence[Row]],
    turns: int,
    count: int,
    seed: int,
    system: str | None = None,
) -> list[Dialogue]:
    """`count` dialogues of `turns` questions, drawn from the tasks' rows.

    Neighbouring questions are of different tasks, if there are two. Every task is asked equally
    often at every turn, as far as possible, so that scores of turns can be compared. A row is used
    again only after all other rows of its task.

    Raises:
        ExamplesError: there are no tasks.
    """
    if not rows_by_task:
        raise ExamplesError("a conversation is made of tasks' rows, and there are no tasks")
    rng = random.Random(f"{seed}/{turns} turns")  # noqa: S311  (no secret)
    rows = {task: cycle(rng.sample(own, len(own))) for task, own in rows_by_task.items()}
    uses: list[Counter[str]] = [Counter() for _ in range(turns)]
    dialogues = []
    for _ in range(count):
        questions: list[Question] = []
        for used in uses:
            before = questions[-1].task if questions else ""
            others = [task for task in rows if task != before] or [*rows]
            fewest = min(used[task] for task in others)
            task = rng.choice([task for task in others if used[task] == fewest])
            used[task] += 1
            questions.append(Question(task, next(rows[task])))
        dialogues.append(Dialogue(tuple(questions), system))
    return dialogues
