"""A log of the answers of an unfinished measurement.

Measuring a large model takes hours. When a run is stopped, the next one continues at the first row
without an answer: rows go through the model in portions of whole batches, and the log gets each
portion as soon as it is answered. A stopped measurement has the same portions, and so the same
batches, as one that was never stopped; its answers are equal to the last bit. (Batches become
smaller if memory runs out.)
"""

import fcntl
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import torch

from meteora.base.placement import is_out_of_memory
from pipelines.workspace.console import say

BATCHES = 4
"""Batches in a portion."""


class Log:
    """The answers of one measurement, in phases that follow each other.

    One portion a line, as JSON, with the seconds that it took. A line that a kill cut short is
    dropped, and all later ones.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        """Read the portions of earlier processes.

        Args:
            file: open for reading and appending, ASCII; None keeps nothing after this process, for
                systems that cannot continue, such as a router with random choices
        """
        self._file = file = file or StringIO()
        self._read: dict[str, list[Any]] = {}
        self.earlier_seconds = 0.0
        """The time that earlier processes took for the portions that are read from the file."""
        file.seek(0)
        whole = 0
        for line in file.read().splitlines(keepends=True):
            try:
                phase, answers, *seconds = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n"):
                break
            whole += len(line)
            self._read.setdefault(phase, []).extend(answers)
            self.earlier_seconds += sum(seconds)  # none where an older version began
        file.truncate(whole)  # ASCII: as many bytes as characters

    def read(self, phase: str) -> list[Any]:
        """The answers of an earlier process, in the order of the rows."""
        return self._read.get(phase, [])

    def append(self, phase: str, answers: Sequence[Any], seconds: float) -> None:
        """Add the answers of one more portion, which took so many seconds."""
        self._file.write(json.dumps([phase, list(answers), seconds]) + "\n")
        self._file.flush()


@contextmanager
def open_log(path: Path) -> Generator[Log]:
    """The log in a file, made if needed; one without a file while another process has it open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Log()
        else:
            yield Log(file)


def answer_in_portions(
    items: Sequence[Any],
    ask: Callable[[Any], Sequence[Any]],
    *,
    phase: str,
    batch_size: int,
    log: Log,
    advance: Callable[[int], None],
    parts_of: Callable[[Any], int] = lambda _item: 1,
) -> list[Any]:
    """One answer for each item, from the log if it has one.

    If memory runs out, later portions are smaller: at first half a batch, then half of that.

    Args:
        ask: answers the items of one portion, in order
        phase: a name for this use of the log; other uses on the same rows have other names
        advance: called once with the number of parts in the log; `ask` reports the others
        parts_of: the number of parts of an item, such as its choices
    """
    answers = log.read(phase)[: len(items)]
    if answers:
        advance(sum(map(parts_of, items[: len(answers)])))
    step = BATCHES * batch_size
    while len(answers) < len(items):
        began = time.perf_counter()
        portion = _ask(ask, items[len(answers) : len(answers) + step])
        if portion is None:
            # a portion has several batches, so only less than a batch takes less memory
            step = max(1, min(step, batch_size) // 2)
            say(f"no memory for so many prompts at once; {step} from here on", "note")
            torch.cuda.empty_cache()
            continue
        log.append(phase, portion, time.perf_counter() - began)
        answers += portion
    return answers


def _ask(ask: Callable[[Any], Sequence[Any]], portion: Sequence[Any]) -> list[Any] | None:
    """The answers of a portion; None if it has several items and memory runs out."""
    try:
        return list(ask(portion))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(portion) == 1:
            raise
        return None
