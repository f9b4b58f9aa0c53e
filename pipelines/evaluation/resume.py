"""Answers of an asking that is not finished yet, kept as they come.

A benchmark of a large model asks for hours. What was answered before a run was stopped is not asked
again: rows go through the model in portions of whole batches, each portion is written down when it
is there, and whoever asks the same again goes on after the last one. The portions are the same
whether a run was stopped or not, and so are the batches, to the last bit.
"""

from __future__ import annotations

import fcntl
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path
    from typing import TextIO

BATCHES = 4
"""In a portion."""


class Keeping(Protocol):
    """Where portions are found again, and left."""

    def found(self, phase: str, /) -> list[Any]:
        """What was answered before, row by row."""

    def keep(self, phase: str, answers: Sequence[Any], /) -> None:
        """Write down one more portion."""


class Nowhere:
    """For what cannot be gone on with: a router that draws its choices, for one."""

    def found(self, _phase: str, /) -> list[Any]:
        return []

    def keep(self, _phase: str, _answers: Sequence[Any], /) -> None:
        pass


class InFile:
    """A line of JSON a portion; a line that a kill left torn is dropped, and what follows it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._found: dict[str, list[Any]] = {}
        file.seek(0)
        whole = 0
        for line in file.read().splitlines(keepends=True):
            try:
                phase, answers = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n"):
                break
            whole += len(line)
            self._found.setdefault(phase, []).extend(answers)
        file.truncate(whole)  # ASCII: as many bytes as characters

    def found(self, phase: str, /) -> list[Any]:
        return self._found.get(phase, [])

    def keep(self, phase: str, answers: Sequence[Any], /) -> None:
        self._file.write(json.dumps([phase, list(answers)]) + "\n")
        self._file.flush()


@contextmanager
def keeping(path: Path) -> Generator[Keeping]:
    """Keep answers in a file; while another process has it, nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Nowhere()
        else:
            yield InFile(file)


def in_portions(
    asked: Sequence[Any],
    ask: Callable[[Any], Sequence[Any]],
    *,
    phase: str,
    batch_size: int,
    kept: Keeping,
    advance: Callable[[int], None],
    parts_of: Callable[[Any], int] = lambda _asked: 1,
) -> list[Any]:
    """Ask everything that was not answered before, portion by portion.

    Args:
        ask: answers one portion, in its order
        phase: tells askings of the same rows apart
        advance: told how much was answered before
        parts_of: how much of that one of `asked` is
    """
    answers = kept.found(phase)[: len(asked)]
    if answers:
        advance(sum(map(parts_of, asked[: len(answers)])))
    step = BATCHES * batch_size
    for start in range(len(answers), len(asked), step):
        portion = list(ask(asked[start : start + step]))
        kept.keep(phase, portion)
        answers += portion
    return answers
