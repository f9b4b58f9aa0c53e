"""A function in a process of its own answers, or ends at its limits."""

import os
import time

import pytest

from pipelines.processes.child import ChildDiedError, ChildError, ChildTimeoutError
from pipelines.processes.isolated import MOST_MEMORY, call


def add(one: int, other: list[int]) -> dict[str, int]:
    return {"sum": one + sum(other), "process": os.getpid()}


def never() -> None:
    time.sleep(600)


def hold(most: int) -> int:
    return len(bytearray(most))


def die() -> None:
    os._exit(3)


def describe(error: Exception) -> dict[str, str]:
    return {"kind": type(error).__name__}


def test_a_function_answers_from_another_process() -> None:
    answer = call(add, 1, [2, 3], seconds=60)
    assert answer["sum"] == 6
    assert answer["process"] != os.getpid()


def test_its_error_is_described() -> None:
    with pytest.raises(ChildError) as described:
        call(add, 1, 2, seconds=60, describe=describe)
    assert described.value.args == ({"kind": "TypeError"},)
    with pytest.raises(ChildError, match="not iterable"):
        call(add, 1, 2, seconds=60)


def test_its_memory_and_its_time_are_limited() -> None:
    with pytest.raises(ChildError) as described:
        call(hold, 2 * MOST_MEMORY, seconds=60, describe=describe)
    assert described.value.args == ({"kind": "MemoryError"},)
    with pytest.raises(ChildTimeoutError, match=r"deadline of 0\.2 s"):
        call(never, seconds=0.2)


def test_the_end_of_its_process_is_told() -> None:
    with pytest.raises(ChildDiedError, match="ended with code 3"):
        call(die, seconds=60)
