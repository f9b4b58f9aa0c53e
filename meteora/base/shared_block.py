"""Blocks that change a setting of the whole process, for several threads at once."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock


class SharedBlock:
    """Blocks with one setting; those of several threads may overlap.

    The first one makes the setting, and the last one ends it: each by itself would put back what it
    found, which can be the setting of another.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        """Take what makes the setting, as a context."""
        self._setting = setting
        self._turn, self._num_open, self._made = Lock(), 0, ExitStack()

    @contextmanager
    def open(self) -> Generator[None]:
        """A block with the setting."""
        with self._turn:
            if not self._num_open:
                self._made.enter_context(self._setting())
            self._num_open += 1
        try:
            yield
        finally:
            with self._turn:
                self._num_open -= 1
                if not self._num_open:
                    self._made.close()
