"""A measurement that was stopped continues at the row, with the same answers to the last bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from meteora.base.placement import NO_MEMORY
from pipelines.data.rows import Row
from pipelines.evaluation.evaluate import TaskResult, evaluate_task
from pipelines.evaluation.harness import Harness
from pipelines.evaluation.resume import BATCHES, Log, answer_in_portions, open_log
from pipelines.evaluation.tasks import Task
from tests.pipelines.conftest import letters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from tests.conftest import World

ROWS = [
    Row(body["prompt"] * (1 + i % 5), "x", ("x", "yy"))
    for i, body in enumerate(letters("q_and_v", 3, 11))
]


class StoppedError(Exception):
    """As if the process had been killed in the middle."""


def count_asked(monkeypatch: pytest.MonkeyPatch, fails_after: int = 99) -> list[int]:
    """How many prompts each portion had that reached the model."""
    asked: list[int] = []
    for name in ("generate", "log_likelihoods"):
        real: Callable[..., Any] = getattr(Harness, name)

        def watched(self: Harness, rows: Sequence[Any], _real: Any = real, **more: Any) -> Any:
            if len(asked) == fails_after:
                raise StoppedError
            asked.append(len(rows))
            return _real(self, rows, **more)

        monkeypatch.setattr(Harness, name, watched)
    return asked


def test_answers_in_the_log_are_not_asked_again(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = world.load()
    task = Task("letters", ("exact_match", "acc"), "auto", 4, rows=ROWS)

    def measure(path: Path, done: list[int]) -> TaskResult:
        with open_log(path) as log:
            return evaluate_task(model, tokenizer, task, batch_size=1, log=log, advance=done.append)

    whole = measure(tmp_path / "whole", [])
    with monkeypatch.context() as patch:
        asked = count_asked(patch, fails_after=4)
        with pytest.raises(StoppedError):
            measure(tmp_path / "stopped", [])
    assert asked == [BATCHES, BATCHES, len(ROWS) - 2 * BATCHES, BATCHES]  # choices had begun
    with (tmp_path / "stopped").open("a") as file:
        file.write('["weigh", [[0.0, -1.')  # torn by a kill
    asked, done = count_asked(monkeypatch), []
    again = measure(tmp_path / "stopped", done)
    assert asked == [BATCHES, len(ROWS) - 2 * BATCHES]
    assert done[:2] == [len(ROWS), 2 * BATCHES]
    assert sum(done) == task.num_questions
    assert again.outputs == whole.outputs
    assert answers_in(tmp_path / "stopped") == answers_in(tmp_path / "whole")


def answers_in(path: Path) -> list[Any]:
    """Each portion of a log: its phase, and its answers."""
    return [json.loads(line)[:2] for line in path.read_text().splitlines()]


def test_the_time_of_a_measurement_is_that_of_all_its_processes(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = Task("letters", ("exact_match",), "auto", 4, rows=ROWS)
    with open_log(tmp_path / "log") as log:
        first = evaluate_task(world.load(), tokenizer, task, batch_size=1, log=log)
    took = [json.loads(line)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert 0 < sum(took) <= first.wall_seconds
    one = [["a", False]]
    earlier = [["generate", one * BATCHES], ["generate", one, 1000.0], ["generate", one, 30]]
    (tmp_path / "log").write_text("".join(f"{json.dumps(line)}\n" for line in earlier))
    with open_log(tmp_path / "log") as log:
        again = evaluate_task(world.load(), tokenizer, task, batch_size=1, log=log)
    assert 1030 < again.wall_seconds < 1030 + first.wall_seconds + 60


def test_two_processes_do_not_write_into_one_file(tmp_path: Path) -> None:
    with open_log(tmp_path / "answers") as first, open_log(tmp_path / "answers") as second:
        first.append("generate", [1, 2], 1.0)
        second.append("generate", [3, 4], 1.0)
    with open_log(tmp_path / "answers") as later:
        assert later.read("generate") == [1, 2]
        assert later.read("weigh") == []
        assert answer_in_portions(
            [0, 0, 5], list, phase="generate", batch_size=1, log=later, advance=lambda _rows: None
        ) == [1, 2, 5]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(f"x: {NO_MEMORY}")],
    ids=["GPU", "Python", "CPU"],
)
def test_where_memory_is_too_little_fewer_are_asked_at_once(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []

    def ask(rows: Sequence[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise error
        return [10 * row for row in rows]

    found = answer_in_portions(
        range(10), ask, phase="x", batch_size=8, log=Log(), advance=lambda _rows: None
    )
    assert found == [10 * row for row in range(10)]
    assert sizes == [10, 4, 2, 2, 2, 2, 2]
    assert "no memory for so many prompts at once; 2 from here on" in capsys.readouterr().err


def test_one_row_that_does_not_fit_and_other_errors_end_it() -> None:
    def refuse(error: Exception) -> Callable[[Sequence[int]], list[int]]:
        def ask(_rows: Sequence[int]) -> list[int]:
            raise error

        return ask

    for error in (torch.OutOfMemoryError("no"), RuntimeError("another")):
        with pytest.raises(RuntimeError, match=str(error)):
            answer_in_portions(
                range(3), refuse(error), phase="x", batch_size=2, log=Log(),
                advance=lambda _rows: None,
            )  # fmt: skip
