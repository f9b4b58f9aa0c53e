"""How long a piece of work takes, told by another: processors differ, and others use them too."""

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager

LITTLE = 100
"""Yardsticks that reading a stranger's file may take: ten times what the worst file takes, while
one that stalls a reader takes minutes or for ever."""
SURELY_LITTLE = 0.1
"""Seconds below which nobody takes the yardstick."""
STALLED = 600
"""Seconds after which a piece of work counts as one without an end."""


def yardstick() -> float:
    """Processor seconds that this process takes, now, for work of one fixed size in Python."""
    begin = time.process_time()
    seen = set()
    for i in range(400_000):
        seen.add(i * i % 1009)
    assert len(seen) == 505
    return time.process_time() - begin


@contextmanager
def little_work() -> Generator[None]:
    """The block takes this process `LITTLE` yardsticks at most."""
    begin = time.process_time()
    yield
    taken = time.process_time() - begin
    if taken > SURELY_LITTLE:
        assert taken < LITTLE * max(yardstick() for _ in range(3))


@contextmanager
def no_stall() -> Generator[None]:
    """The block ends in time, or with an error: one that waits for ever would end no test."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {STALLED} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(STALLED)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
