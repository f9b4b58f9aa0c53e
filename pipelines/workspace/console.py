"""What a person sees while a run works, on stderr: lines, and bars where it takes time.

`CONSOLE` is the console of this process, and `say`, `bar` and `growing` are its methods. The run
that goes on in this process listens to it, to pass lines and progress on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from typing import TYPE_CHECKING

from rich import console as rich_console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from meteora.untrusted.findings import for_terminal

if TYPE_CHECKING:
    MessageListener = Callable[[str], None]
    """Called with each line, without its colours."""
    ProgressListener = Callable[[str, int, int], None]
    """Called with what a bar counts, how far it is, and out of how much."""

QUIET = "METEORA_QUIET"
"""A variable of the environment; where it is not empty, only errors are shown."""
LABELS = {"error": "red", "left out": "yellow", "note": "yellow"}
"""The colour of each label."""
PATIENCE_SECONDS = 2.0
"""What takes less time gets no bar in `Console.growing`."""
LOOK_EVERY_SECONDS = 0.5
"""How often `Console.growing` measures."""


class Console:
    """Shows lines and bars on stderr, and passes them on to its listeners."""

    def __init__(self) -> None:
        self._stderr = rich_console.Console(stderr=True, highlight=False, markup=False)
        self.quiet = bool(os.environ.get(QUIET))
        """Whether only errors are shown."""
        self._on_message: MessageListener | None = None
        self._on_progress: ProgressListener | None = None

    @contextmanager
    def listening(
        self, on_message: MessageListener, on_progress: ProgressListener | None = None
    ) -> Generator[None]:
        """Pass on every line and every step of a bar, until this context ends."""
        before = self._on_message, self._on_progress
        self._on_message, self._on_progress = on_message, on_progress
        try:
            yield
        finally:
            self._on_message, self._on_progress = before

    def say(self, text: str, label: str = "") -> None:
        """Print a line without control characters; brackets are no markup, since names have some.

        Args:
            label: One of `LABELS`, before the text and in its colour.
        """
        before = [(f"{label}: ", LABELS[label])] if label else []
        line = Text.assemble(*before, for_terminal(text))
        if label == "error" or not self.quiet:
            self._stderr.print(line, soft_wrap=True)
        if self._on_message is not None:
            self._on_message(line.plain)

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """A bar with the rate and the time left; yields `advance(count)`.

        Where stderr is no terminal, one line at the end says what a bar would have shown.
        """
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(),
            _HowFar(unit),
        )
        with Progress(
            *columns, console=self._stderr, disable=self.quiet or not self._stderr.is_terminal
        ) as progress:
            shown = progress.add_task(what, total=total, at=0.0)
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress.update(shown, advance=count, at=time.perf_counter() - started)
                if self._on_progress is not None:
                    self._on_progress(what, done, total)

            yield advance
        if not self._stderr.is_terminal:
            seconds = time.perf_counter() - started
            self.say(f"{what}: {done} of {total} {unit} in {seconds:.0f} s{_rate(done / seconds)}")

    @contextmanager
    def growing(self, what: str, num_bytes: int, measure: Callable[[], int]) -> Generator[None]:
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
            with self.bar(what, max(1, round(num_bytes / size)), unit) as advance:
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


CONSOLE = Console()
say, bar, growing = CONSOLE.say, CONSOLE.bar, CONSOLE.growing


def plain_console() -> rich_console.Console:
    """A console on stdout that takes names and values as text, not as markup.

    Its lines are wider where stdout is no terminal.
    """
    return rich_console.Console(
        markup=False, highlight=False, width=None if sys.stdout.isatty() else 120
    )


class _HowFar(ProgressColumn):
    """How much is done, in which time, at which rate, and the time that is left by this rate."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """What stands beside a bar, in one line.

        Rows of a batch are done at one moment: a rate over the last few steps would be absurd.
        """
        done, total, seconds = task.completed, task.total or 0.0, task.elapsed or 0.0
        shown = f"{done:.0f} of {total:.0f} {self._unit}, {timedelta(seconds=int(seconds))}"
        at = task.fields["at"]  # of the last step: between two the time left counts down
        if done and at:
            left = timedelta(seconds=max(0, round(at * total / done - seconds)))
            shown += f"{_rate(done / at)}, {left} left"
        return Text(shown)


def _rate(per_second: float) -> str:
    if per_second <= 0:
        return ""
    slow = per_second < 1
    return f", {per_second * (60 if slow else 1):.1f} a {'minute' if slow else 'second'}"
