import itertools
from pathlib import Path

import pytest

from pipelines.recipe.recipe import locate
from tests.quickstart.make import NUM_TEST, NUM_TRAIN, TRAININGS, seen_in_training, write_splits
from tests.quickstart.tasks import TASKS, in_words, rows

SHIPPED = locate("quickstart").parent


@pytest.mark.parametrize("task", TASKS)
def test_what_ships_is_what_the_script_writes(task: str, tmp_path: Path) -> None:
    write_splits(task, tmp_path, seen_in_training(task))
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        made = (tmp_path / "tasks" / task / f"{split}.jsonl").read_text()
        assert made == (SHIPPED / "tasks" / task / f"{split}.jsonl").read_text()
        assert len(made.splitlines()) == count


@pytest.mark.parametrize("task", TASKS)
def test_what_was_trained_on_is_never_asked(task: str, tmp_path: Path) -> None:
    write_splits(task, tmp_path, seen_in_training(task))
    trained = {row["prompt"] for row in itertools.islice(rows(task, 0), TRAININGS[task].steps * 8)}
    asked = (tmp_path / "tasks" / task / "test.jsonl").read_text()
    assert not [prompt for prompt in trained if f'"prompt": "{prompt}"' in asked]


def test_no_first_word_tells_the_tasks_apart() -> None:
    """Every task begins in at least six ways, and some of its beginnings are every task's."""
    first = {
        task: {row["prompt"].split()[0] for row in itertools.islice(rows(task, 5), 200)}
        for task in TASKS
    }
    assert min(map(len, first.values())) >= 6
    assert set.intersection(*first.values()) >= {"Please", "What", "Given"}


def test_numbers_are_spelled_as_people_spell_them() -> None:
    assert in_words(7) == "seven"
    assert in_words(42) == "forty-two"
    assert in_words(300) == "three hundred"
    assert in_words(1203) == "one thousand two hundred three"
