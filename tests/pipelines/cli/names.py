"""An environment in which every Python writes down the names that it looks up."""

import os
from pathlib import Path

WATCH = """
import socket
from pathlib import Path

real = socket.getaddrinfo

def watched(host, *rest, **more):
    with Path({log!r}).open("a") as log:
        print(host, file=log)
    return real(host, *rest, **more)

socket.getaddrinfo = watched
"""
THIS_MACHINE = {"127.0.0.1", "localhost", "::1", "None"}


def watching(folder: Path) -> dict[str, str]:
    """The environment; the names are in a file of the folder.

    It is bare: Prefect counts nobody where variables say that no person is there.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH.format(log=str(folder / "names")))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS")}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "TERM": "xterm"}


def looked_up(folder: Path) -> set[str]:
    """The names of other machines, and of this one."""
    return set((folder / "names").read_text().split())
