"""Bounds on a chat template: it is a stranger's program, and may loop or write without an end.

Jinja's sandbox keeps it from files and from Python's inside, and not from `range` in `range`.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError

MAX_STEPS = 5_000_000
"""Lines of the template that run, some seconds; one of 10,000 messages has 70,000 in SmolLM2's."""
MAX_CHARACTERS = 8_000_000
"""Of what it writes; more fits into no model, and takes minutes to tokenize."""
NAME = "<template>"
"""The file name of what jinja compiles."""


@contextmanager
def bounded_template() -> Generator[None]:
    """Render within bounds, in this thread.

    One step that takes for ever, such as `9 ** 9 ** 9`, is not stopped.

    Raises:
        TemplateError: a template takes more steps, or writes more.
    """
    steps = characters = 0

    def watch(frame: FrameType, event: str, given: Any) -> Callable[..., Any] | None:  # noqa: ANN401
        nonlocal steps, characters
        if frame.f_code.co_filename != NAME:
            return None
        steps += 1
        if event == "return" and isinstance(given, str):  # what it yields, too
            characters += len(given)
        if steps > MAX_STEPS or characters > MAX_CHARACTERS:
            raise TemplateError("it has no end, or writes more than any model reads")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
