"""Dialogues: drawn from test rows, the same for the same seed."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.conversations import Turn
from pipelines.data.dialogues import Dialogue, draw_dialogues
from pipelines.data.rows import ExamplesError, Row, rows_sha256

ROWS = {name: [Row(f"{name} {i}?", f"{name} {i}") for i in range(5)] for name in "abc"}


@given(st.integers(2, 6), st.integers(1, 30), st.integers(0, 3))
def test_the_subject_changes_at_each_turn_and_tasks_are_asked_equally_often(
    turns: int, count: int, seed: int
) -> None:
    found = draw_dialogues(ROWS, turns, count, seed)
    assert [len(dialogue.questions) for dialogue in found] == [turns] * count
    for dialogue in found:
        assert all(one.task != other.task for one, other in pairwise(dialogue.questions))
    for questions in zip(*(dialogue.questions for dialogue in found), strict=True):
        uses = Counter(question.task for question in questions)
        assert max(uses.values()) - min(uses[task] for task in ROWS) <= 2
    asked = Counter((q.task, q.row.prompt) for dialogue in found for q in dialogue.questions)
    for task, rows in ROWS.items():  # each row once, before one is asked again
        times = [asked[task, row.prompt] for row in rows]
        assert max(times) - min(times) <= 1
    assert found == draw_dialogues(ROWS, turns, count, seed)


def test_another_seed_and_another_system_prompt_are_other_rows() -> None:
    def drawn(seed: int = 0, system: str | None = None) -> str:
        return rows_sha256(draw_dialogues(ROWS, 3, 4, seed, system))

    assert len({drawn(), drawn(1), drawn(system=""), drawn(system="Be brief.")}) == 4


def test_of_one_task_the_subject_stays_and_of_none_there_is_nothing_to_ask() -> None:
    (dialogue,) = draw_dialogues({"a": ROWS["a"]}, 3, 1, seed=0)
    assert {question.task for question in dialogue.questions} == {"a"}
    with pytest.raises(ExamplesError, match="there are no tasks"):
        draw_dialogues({}, 3, 1, seed=0)


def test_answers_stay_in_the_history_and_the_next_question_is_open() -> None:
    (dialogue,) = draw_dialogues(ROWS, 3, 1, seed=0, system="Be brief.")
    first, second, third = dialogue.questions
    asked = dialogue.with_answers(["one"])
    assert asked.system == "Be brief."
    assert asked.turns == (
        Turn(first.task, first.row.prompt, "one"),
        Turn(second.task, second.row.prompt, ""),
    )
    assert dialogue.alone(2) == Dialogue((third,), "Be brief.")
