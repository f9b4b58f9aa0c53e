"""Messages and progress bars for a person, on stderr.

`CONSOLE` is the console of this process, and `say`, `bar`, `progress_bar` and `growing` are its
methods. A run in this process listens to it, to pass lines and progress on.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from datetime import timedelta
from typing import IO, Any, cast

from rich import console as rich_console
from rich.cells import cell_len
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from meteora.untrusted.findings import for_terminal

MessageListener = Callable[[str], None]
"""Called with each line, without its colours."""
ProgressListener = Callable[[str, int, int], None]
"""Called with a bar's name, the units done, and all units."""

QUIET = "METEORA_QUIET"
"""An environment variable; if it is not empty, only errors are shown."""
LABELS = {"error": "red", "left out": "yellow", "note": "yellow"}
"""The colour of each label."""
PATIENCE_SECONDS = 2.0
"""Shorter work gets no bar in `Console.growing`."""
WORD = re.compile(r"(?:`[^`\n]*`|\S)+")
"""What no line break divides."""
LOOK_EVERY_SECONDS = 0.5
"""The time between two measurements of `Console.growing`."""
SILENT_SECONDS = 600.0
"""The same warning is shown again only after this time."""

# on some CPUs it tells users to install a package that would run code from the Hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Stderr:
    """Stderr, or nothing: a reader that has gone, a full disk or a closed terminal ends no run."""

    @property
    def rich_proxied_file(self) -> "_Stderr":
        """Itself: while a bar is shown, rich writes to this of a file."""
        return self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (as of any stream)
        return getattr(_real_stderr(), name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            _real_stderr().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            _real_stderr().flush()


def _real_stderr() -> IO[str]:
    """While a bar is shown, `sys.stderr` is rich's, which prints above the bar."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


class Console:
    """Shows lines and bars on stderr, and passes them on to its listeners."""

    def __init__(self) -> None:
        stderr = cast("IO[str]", _Stderr())
        self._stderr = rich_console.Console(file=stderr, highlight=False, markup=False)
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
        """Print a line without control characters, behind one of `LABELS`; brackets are text."""
        before = [(f"{label}: ", LABELS[label])] if label else []
        line = Text.assemble(*before, for_terminal(text))
        said = line.plain
        if self._stderr.is_terminal:
            line.plain = at_spaces(said, self._stderr.width)
        if label == "error" or not self.quiet:
            self._stderr.print(line, soft_wrap=True)
        if self._on_message is not None:
            self._on_message(said)

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """A bar with the rate and the time left; yields `advance(count)`.

        If stderr is no terminal, one line at the end replaces the bar.
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
    def progress_bar(
        self, what: str, total: int, unit: str
    ) -> Generator[Callable[[int, int], None]]:
        """A bar for work that may begin in its middle; yields `show(done, all)`."""
        shown = 0
        with self.bar(what, total, unit) as advance:

            def show(done: int, _all: int) -> None:
                nonlocal shown
                advance(done - shown)
                shown = done

            yield show

    @contextmanager
    def growing(self, what: str, num_bytes: int, measure: Callable[[], int]) -> Generator[None]:
        """A bar over something that grows by itself, such as a download, if it takes a while.

        At last it has `num_bytes`; `measure` returns how many it has now.
        """
        ended = threading.Event()

        def watch() -> None:
            if ended.wait(PATIENCE_SECONDS):
                return
            size, unit = (1_000_000, "MB") if num_bytes >= 10_000_000 else (1_000, "kB")
            most = max(1, round(num_bytes / size))
            with self.progress_bar(what, most, unit) as show:
                last = False
                while not last:
                    last = ended.wait(LOOK_EVERY_SECONDS)
                    show(round(min(measure(), num_bytes) / size), most)

        # in the caller's context, which leads to the run's log
        watcher = threading.Thread(target=copy_context().run, args=(watch,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


CONSOLE = Console()
say, bar, progress_bar, growing = CONSOLE.say, CONSOLE.bar, CONSOLE.progress_bar, CONSOLE.growing


class _Warnings(logging.Handler):
    """Shows the warnings of this program, in a run too: Prefect's own handlers print none.

    A run ingests many times, and each time meets the same damaged record: it is shown once.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown_at: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning, unless it was shown in the last `SILENT_SECONDS`."""
        text, now = record.getMessage(), time.monotonic()
        self._shown_at = {t: at for t, at in self._shown_at.items() if now - at < SILENT_SECONDS}
        if text not in self._shown_at:
            self._shown_at[text] = now
            say(text, "note")


WARNINGS = _Warnings()
for room in ("meteora", "pipelines", "store"):
    logging.getLogger(room).addHandler(WARNINGS)


def at_spaces(text: str, width: int) -> str:
    """The text, of the same length, with line breaks in place of spaces where a line is too wide.

    Paths stay whole, and so do `commands`, which a person may copy.
    """
    characters, end, column = [*text], 0, 0
    for word in WORD.finditer(text):
        gap, end = text[end : word.start()], word.end()
        begun = column > 0 and "\n" not in gap
        column = (column if begun else 0) + len(gap.rpartition("\n")[2])
        if begun and column + cell_len(word[0]) > width:
            characters[word.start() - 1], column = "\n", 0
        column += cell_len(word[0])
    return "".join(characters)


class _PlainConsole(rich_console.Console):
    """Prints strings without control characters, those in the cells of a table among them.

    Long lines break at spaces in a terminal, which itself breaks them anywhere.
    """

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:  # noqa: ANN401
        if soft_wrap and self.is_terminal and all(isinstance(one, str) for one in objects):
            objects = (at_spaces(" ".join(objects), self.width),)
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401  (rich's own)
        return super().render_str(for_terminal(text), **options)


def plain_console() -> rich_console.Console:
    """A console on stdout that prints names and values as text, not as markup.

    Its lines have 120 characters if stdout is no terminal.
    """
    return _PlainConsole(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


class _HowFar(ProgressColumn):
    """The units done, the time taken, the rate, and the time left at this rate."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The text beside a bar, in one line.

        The rate is over the whole time: the rows of a batch end at one moment, so a rate over the
        last few steps would jump.
        """
        done, total, seconds = task.completed, task.total or 0.0, task.elapsed or 0.0
        shown = f"{done:.0f} of {total:.0f} {self._unit}, {timedelta(seconds=int(seconds))}"
        at = task.fields["at"]  # the time of the last step; between steps the time left counts down
        if done and at:
            left = timedelta(seconds=max(0, round(at * total / done - seconds)))
            shown += f"{_rate(done / at)}, {left} left"
        return Text(shown)


def _rate(per_second: float) -> str:
    if per_second <= 0:
        return ""
    slow = per_second < 1
    return f", {per_second * (60 if slow else 1):.1f} a {'minute' if slow else 'second'}"
