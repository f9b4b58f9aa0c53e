"""The secret of a home's own Prefect server: without this file nobody can use the server.

Loopback is open to every account of the machine, and the server starts programs on request.
So it asks for this secret, which only the owner of the home can read.
"""

import os
import secrets
import stat
from pathlib import Path

from meteora.artifacts import MeteoraError
from store.files import replace_text

USER = "meteora"
"""Prefect's secrets read `user:password`; the user means nothing here."""
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class SecretError(MeteoraError):
    """Other users could read or replace the secret of a home's server."""


def secret_file(home: Path) -> Path:
    return home / "prefect" / "secret"


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter; close one that was open to others.

    Raises:
        SecretError: It belongs to somebody else, or stays open.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.geteuid():
        raise SecretError(
            f"{folder} belongs to user {about.st_uid}, and this is user {os.geteuid()}; use a home"
            " of your own, or set PREFECT_API_URL to a server that runs"
        )
    if about.st_mode & OTHERS:
        folder.chmod(0o700)
        if folder.stat().st_mode & OTHERS:
            raise SecretError(
                f"{folder} stays open to other users, as its file system keeps no modes; use a home"
                " on one that does, or set PREFECT_API_URL to a server that runs"
            )


def read_or_make(file: Path) -> str:
    """The secret, as `user:password`; a new one if there is none. One process calls it at a time.

    Raises:
        SecretError: Others could have read or written the file, or it holds no secret.
    """
    if not os.path.lexists(file):
        replace_text(file, f"{USER}:{secrets.token_urlsafe(32)}\n", mode=0o600)
    return _read(file)


def _read(file: Path) -> str:
    advice = "; stop what uses this home's server and delete the file: the next run makes a new one"
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise SecretError(f"{file} cannot be read ({error.strerror}){advice}") from None
    with open(opened, encoding="utf-8") as lines:  # noqa: PTH123  (a descriptor)
        about = os.fstat(opened)
        if about.st_uid != os.geteuid():
            raise SecretError(
                f"{file} belongs to user {about.st_uid}, and this is user {os.geteuid()}{advice}"
            )
        if about.st_mode & OTHERS:
            mode = stat.S_IMODE(about.st_mode)
            raise SecretError(f"{file} has mode {mode:04o}, and needs 0600{advice}")
        secret = lines.read().strip()
    if len(secret) <= len(f"{USER}:"):
        raise SecretError(f"{file} holds no secret{advice}")
    return secret
