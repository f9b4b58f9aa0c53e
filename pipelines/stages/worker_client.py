"""The process that does a run's long work, as the run sees it.

A thread that computes cannot be stopped, a process can: at its deadline, at Ctrl-C, when a run is
cancelled. One process serves all stages of a run, so that the model libraries are loaded once. What
crosses the pipe are our own nouns, never a tensor: large results lie in the store. The process ends
when its standard input closes, so it never outlives the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any, Self

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pipelines.workspace.context import RunContext


class StageError(MeteoraError):
    """A stage ran past its deadline, or its process died."""


class Child:
    """A process that waits for stages to do.

    Args:
        on_progress: told what is being done, how far, and out of how much, every few seconds
        on_said: told what is said to people, which the process has printed
    """

    def __init__(
        self,
        work: RunContext,
        *,
        on_progress: Callable[[str, int, int], None],
        on_said: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._told = {"progress": on_progress, "said": on_said}
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-m", "pipelines.stages.worker", str(theirs.fileno())],
            stdin=subprocess.PIPE,  # never written to: it closes when we are gone
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the run; and what it started ends with it
        )
        theirs.close()
        self._pipe.send((work.home, work.recipe, work.path, work.run_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, stage: str, *arguments: object, deadline_seconds: float) -> Any:  # noqa: ANN401
        """Have a stage done, and return what it returns.

        Raises:
            StageError: it took longer than its deadline, or its process died.
            Exception: whatever the stage itself raised, as it was.
        """
        ends = time.monotonic() + deadline_seconds
        try:
            self._pipe.send((stage, arguments))
            while self._pipe.poll(max(0.0, ends - time.monotonic())):
                kind, value = self._pipe.recv()
                if kind == "value":
                    return value
                if kind == "error":
                    raise value
                self._told[kind](*value)
        except (EOFError, ConnectionError):
            raise StageError(f"{stage}: {self._obituary()}; run again to go on") from None
        self.close()
        raise StageError(
            f"{stage}: it took longer than its deadline of {deadline_seconds:g} s and was stopped;"
            " raise the deadline in the recipe (`deadlines:`), or ask for less; what was finished"
            " is kept"
        )

    def close(self) -> None:
        """End the process and all that it started. What it had not recorded is lost, no more."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _obituary(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"its process ended with code {code} and without an answer"
        name = signal.Signals(-code).name
        cause = "; that is mostly for want of memory" if code == -signal.SIGKILL else ""
        return f"its process was ended by {name}{cause}"
