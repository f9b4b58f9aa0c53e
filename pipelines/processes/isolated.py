"""Call a function in a process of its own, with limits of time and memory.

It is for a function that reads a stranger's files with a library. A small file can describe a large
thing, crash a parser or take for ever; all that the process holds ends with the call.
"""

from __future__ import annotations

from pkgutil import resolve_name
from types import FunctionType
from typing import Any

from meteora.untrusted.findings import brief
from pipelines.processes.child import ChildProcess, connect_to_parent, limit_memory

MOST_MEMORY = 8 << 30
"""Bytes."""


def call(
    function: FunctionType,
    *arguments: object,
    seconds: float,
    describe: FunctionType = brief,
) -> Any:  # noqa: ANN401  (what the function returns)
    """What a function returns.

    Args:
        function: one of a module; it takes and returns what JSON can hold
        seconds: the time that it has
        describe: converts an error of the function to JSON; also one of a module

    Raises:
        ChildTimeoutError: it took longer, and was stopped.
        ChildDiedError: its process ended, mostly for want of memory.
        ChildError: it raised an error; `args[0]` describes it.
    """
    with ChildProcess(__name__, quiet=True) as child:
        request = [_reference(function), arguments, _reference(describe)]
        return child.ask(request, deadline_seconds=seconds)


def _reference(function: FunctionType) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def main() -> None:
    parent = connect_to_parent()
    limit_memory(MOST_MEMORY)
    _, (function, arguments, describe) = parent.receive()
    try:
        kind, value = "answer", resolve_name(function)(*arguments)
    except Exception as error:  # the parent raises its own
        kind, value = "error", resolve_name(describe)(error)
    parent.send(kind, value)


if __name__ == "__main__":
    main()
