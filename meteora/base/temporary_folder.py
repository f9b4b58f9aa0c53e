"""A temporary folder; what killed processes left of theirs is removed."""

import fcntl
import os
import platform
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = f"{platform.node()}-"
"""Ends the prefix of such folders: other machines with the same parent may not see their locks."""


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Generator[Path]:
    """A new folder in `parent`, whose name begins with `prefix`, until the context ends.

    A process locks its folder before it writes there. The kernel frees the lock when the process
    ends, however it ends.
    """
    for left in parent.glob(f"{prefix}{HERE}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if any(left.iterdir()):  # an empty one may be about to be locked
                shutil.rmtree(left)
    with TemporaryDirectory(prefix=f"{prefix}{HERE}", dir=parent) as name, ExitStack() as held:
        with suppress(OSError):  # a file system without locks: nobody can clean up there either
            held.enter_context(_locked(Path(name), fcntl.LOCK_EX))
        yield Path(name)


@contextmanager
def _locked(folder: Path, operation: int) -> Generator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)
