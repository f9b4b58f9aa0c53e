"""What a person sees while a run works, on stderr: a line a stage, a bar where it takes time."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rich.progress import Task

console = Console(stderr=True, highlight=False, markup=False)
LABELS = {"error": "red", "left out": "yellow", "note": "yellow"}
"""Their colours."""
PATIENCE_SECONDS = 2.0
LOOK_EVERY_SECONDS = 0.5
_told: Callable[[str, int, int], None] | None = None
_heard: Callable[[str], None] | None = None


def tell(listener: Callable[[str, int, int], None]) -> None:
    """Have every bar tell `listener`, too, what it counts, how far it is, and out of how much."""
    global _told  # noqa: PLW0603  (as the console: one for the process)
    _told = listener


@contextmanager
def heard(listener: Callable[[str], None]) -> Generator[None]:
    """Have everything that is said told to `listener`, too, without its colours."""
    global _heard  # noqa: PLW0603  (as above)
    before, _heard = _heard, listener
    try:
        yield
    finally:
        _heard = before


def say(text: str, label: str = "") -> None:
    """Print a line to people; brackets in it are no markup, since names and paths may have some.

    Args:
        label: One of `LABELS`, before the text and in its colour.
    """
    before = [(f"{label}: ", LABELS[label])] if label else []
    line = Text.assemble(*before, text)
    console.print(line, soft_wrap=True)
    if _heard is not None:
        _heard(line.plain)


def plain_console() -> Console:
    """Names and values are text: markup in them takes no effect. A pipe takes wider lines."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def bar(what: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
    """A bar with the rate and the time left; yields `advance(count)`.

    Where stderr is no terminal, one line at the end says what a bar would have shown.
    """
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} " + unit),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = progress.add_task(what, total=total)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.advance(shown, count)
            if _told is not None:
                _told(what, done, total)

        yield advance
    if not console.is_terminal:
        seconds = time.perf_counter() - started
        say(f"{what}: {done} of {total} {unit} in {seconds:.0f} s{_rate(done / seconds, unit)}")


@contextmanager
def growing(what: str, num_bytes: int, measure: Callable[[], int]) -> Generator[None]:
    """A bar over something that grows by itself, such as a download, if it takes a while.

    Args:
        num_bytes: How large it will be.
        measure: How large it is.
    """
    ended = threading.Event()

    def watch() -> None:
        if ended.wait(PATIENCE_SECONDS):
            return
        size, unit = (1_000_000, "MB") if num_bytes >= 10_000_000 else (1_000, "kB")
        with bar(what, max(1, round(num_bytes / size)), unit) as advance:
            shown, last = 0, False
            while not last:
                last = ended.wait(LOOK_EVERY_SECONDS)
                now = round(min(measure(), num_bytes) / size)
                advance(now - shown)
                shown = now

    # in the context of who waits: a run's log is found through it
    watcher = threading.Thread(target=copy_context().run, args=(watch,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class _Rate(ProgressColumn):
    """How many of a unit are done in a second, or a minute."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """What a bar shows of a rate, once there is one."""
        return Text(_rate(task.finished_speed or task.speed or 0.0, self._unit))


def _rate(per_second: float, unit: str) -> str:
    if per_second <= 0:
        return ""
    slow = per_second < 1
    return f", {per_second * (60 if slow else 1):.1f} {unit} a {'minute' if slow else 'second'}"
