"""Faults of the machine, each in one sentence: a full disk, a read-only folder, no network."""

import errno
import re
import shutil
import socket
import sys
from pathlib import Path

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import brief, causes

ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run again, what was finished is kept",
    errno.EDQUOT: "the disk's quota is used up; free some space and run again",
    errno.EFBIG: "a file became larger than is allowed here; raise the limit (`ulimit -f`)",
    errno.EROFS: "the disk is read-only; give a folder on another one",
    errno.EACCES: "access is not permitted; change the permissions, or give another path",
    errno.EPERM: "the operation is not permitted; change the permissions, or give another path",
    errno.ENOTDIR: "a part of the path is a file, where a folder is needed; check the path",
    errno.EISDIR: "it is a folder, where a file is needed; check the path",
    errno.ENAMETOOLONG: "the path is too long; give a shorter one",
    errno.ELOOP: "its links go in a circle; check the path",
    errno.EMFILE: "too many files are open; raise the limit (`ulimit -n`)",
    errno.ENOMEM: "there is not enough memory; free some, or use a larger machine",
    errno.EIO: "the disk has a fault; check it, and run `meteora verify` afterwards",
    errno.ENETUNREACH: "the network cannot be reached; check it, and run again",
    errno.EHOSTUNREACH: "the server cannot be reached; check the network, and run again",
    errno.ECONNREFUSED: "the server refuses connections; check its address, and run again",
    errno.ECONNRESET: "the connection was closed by the server; run again",
    errno.ETIMEDOUT: "the server did not answer in time; run again",
}
"""The advice for each fault; other errors are our own faults, and keep their traceback."""
KNOWN = {
    r"^\d+ requested and \d+ written$": (  # numpy, of a file that takes no more bytes
        "the disk is full, or a file became larger than is allowed here (`ulimit -f`); free some"
        " space and run again, what was finished is kept"
    ),
    "failed to map segment from shared object": ADVICE[errno.ENOMEM],  # of a library
    "Could not determine home directory": (
        "the home folder of a user cannot be found; set HOME to a folder that you can write to,"
        " and name no user after `~` in a path"
    ),
    "No usable temporary directory found": (
        "no temporary file can be written in any of the usual folders; free some space on their"
        " disk, or set TMPDIR to a folder that you can write to"
    ),
}
"""Sentences for faults that only a text shows, by its pattern: Python's own, or a library's."""
IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""The errno in messages of libraries in Rust."""


class NoSpaceError(MeteoraError):
    """A disk has too little free space for the next step."""


def require_space(
    folder: Path, num_bytes: float, what: str, instead: str = "give another --home"
) -> None:
    """Check that a disk has enough free space, before long work that needs it.

    Args:
        folder: A folder on that disk; it need not exist.
        instead: What to do if no space can be freed there.

    Raises:
        NoSpaceError: The disk has less than `num_bytes` left.
    """
    free = free_bytes(folder)
    if free < num_bytes:
        raise NoSpaceError(
            f"{what} needs {num_bytes / 1e6:,.1f} MB, and the disk of {folder} has"
            f" {free / 1e6:,.1f} MB left; free some space, or {instead}"
        )


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that a folder is on; the folder need not exist."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def describe(error: BaseException) -> str | None:
    """The sentence for a fault of the machine; None for any other error.

    An error of another library may hide the fault that caused it, so its causes are searched.
    """
    sentences = map(_of_one, causes(error))
    return next((sentence for sentence in sentences if sentence is not None), None)


def _of_one(error: BaseException) -> str | None:
    if isinstance(error, MemoryError) or _is_memory_of_torch(error):
        return ADVICE[errno.ENOMEM]
    if isinstance(error, socket.gaierror):
        return "the name of a server cannot be looked up; check the network, and run again"
    if isinstance(error, OSError) and error.errno in ADVICE:
        name = error.filename2 or error.filename  # filename2 is the target of a copy
        where = f"{name}: " if isinstance(name, str) else ""
        return where + ADVICE[error.errno]
    for pattern, sentence in KNOWN.items():
        if re.search(pattern, str(error)):
            return sentence
    number = IN_TEXT.search(str(error))
    if number and (advice := ADVICE.get(int(number[1]))):
        return f"{brief(Exception(IN_TEXT.sub('', str(error))))}: {advice}"
    return None


def _is_memory_of_torch(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # which takes seconds to load
        return False
    from meteora.base.placement import is_out_of_memory  # noqa: PLC0415

    return is_out_of_memory(error)
