"""Which processes descend from which, and whether they end."""

import time
from contextlib import suppress
from pathlib import Path


def stat_of(pid: int) -> list[str]:
    """The state of a process, its parent's number, and more, as the kernel lists them."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def descendants(pid: int, word: str = "") -> list[int]:
    """The processes that descend from one, with `word` among the arguments of their command."""
    parents, named = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            one = int(entry.name)
            parents[one] = int(stat_of(one)[1])
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if not word or word in words:
                named.add(one)

    def descends(one: int) -> bool:
        return parents.get(one) == pid or (one in parents and descends(parents[one]))

    return [one for one in named if descends(one)]


def ends(pid: int, seconds: float = 60) -> bool:
    """Whether a process ends. That its parent, another than this one, waits for it is not asked."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if stat_of(pid)[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
