"""A Prefect server for a home, if the user has none: on loopback, until the last run ends.

Prefect can start one itself, but leaves it behind when the run is killed, gives up on a slow first
start, and starts one for every process. This one is shared by all processes that work in a home at
the same time. Each holds a lock, which the system releases however the process ends; when the
server gets that lock, no user is left, and it exits. If it dies earlier, a user starts it again.

The server starts any program that a deployment names, and loopback is open to every account of the
machine: so it asks for the home's secret.

    home/prefect/users.lock    shared by all users of the server
                 server.lock   held by the server as long as it lives
                 start.lock    held by a process that looks for a server, or starts one
                 address       the address of the living server
                 secret        its password; only the owner can read it
"""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import httpx

from meteora.artifacts import MeteoraError
from pipelines.flows.own_origin import OwnOriginOnly
from pipelines.flows.server_secret import make_private, read_or_make, secret_file
from pipelines.workspace.faults import require_space
from store.files import replace_text

if TYPE_CHECKING:
    from fastapi import FastAPI

START_SECONDS = 180.0
"""A first start makes a database: half a minute on a busy machine."""
HOST = "127.0.0.1"
PORT = 4200
"""Prefect's own port, for the first start. Later starts use the last one, so open pages work."""
ROOM_BYTES = 32 << 20
"""For its database, and the index of the ledger. With a full disk a server answers 500."""
LOG_BYTES = 4 << 20
"""A longer log begins anew with the next server."""
KEEP_SECONDS = 1.0
"""The time between two checks that the server lives."""
MAX_PATH_BYTES = 512
"""Of a path that SQLite opens, which has Prefect's database."""


class ServerError(MeteoraError):
    """The local Prefect server did not start, or does not ask for this home's secret."""


def use_local_server(home: Path) -> bool:
    """Point Prefect at the server of this home; call it before Prefect is imported.

    The server lives as long as this process, and longer than Prefect's exit handlers, which send
    their last requests to it.

    Returns:
        Whether this call started it.

    Raises:
        SecretError: Other users could read the home's secret.
        NoSpaceError: The disk has no room for its database.
        ServerError: It did not start or cannot, or the living one asks for no secret, or for
            another.
        RuntimeError: The user has no home folder.
    """
    Path.home()  # Prefect looks for it when it is imported, also in the process of the server
    _check_the_length_of(Path(os.environ.get("PREFECT_HOME", "")) / "prefect.db-journal")
    folder = home / "prefect"
    make_private(folder)
    _leave_out_the_proxy()
    with ExitStack() as held:
        start = held.enter_context((folder / "start.lock").open("wb"))
        fcntl.flock(start, fcntl.LOCK_EX)
        secret = read_or_make(secret_file(home))
        users = held.enter_context((folder / "users.lock").open("wb"))
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while a server is on its way out
        server = _start(folder, ROOM_BYTES)
        url = (folder / "address").read_text(encoding="utf-8")
        _wait_until_healthy(server, url, folder / "server.log")
        _check_that_it_asks_for(secret, url)
        os.environ["PREFECT_API_URL"] = url
        os.environ["PREFECT_API_AUTH_STRING"] = secret  # for this process and those it starts
        start.close()
        # exit handlers run in reverse order: Prefect registers its own later, so they run first
        leaving = threading.Event()
        atexit.register(_leave, users, server, held.pop_all(), leaving)
    threading.Thread(target=_keep_alive, args=(folder, server, leaving), daemon=True).start()
    return server is not None


def _check_the_length_of(database: Path) -> None:
    path = os.path.realpath(database)  # SQLite follows links, too
    if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ServerError(
            f"the path of Prefect's database has {length} bytes, and SQLite takes"
            f" {MAX_PATH_BYTES}; choose a home with a shorter path: {path}"
        )


def _leave_out_the_proxy() -> None:
    """Let this process and those it starts ask this machine itself, and no proxy for it."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")  # the order of urllib
    hosts = dict.fromkeys(name.strip() for name in [*named.split(","), HOST] if name.strip())
    # `*`, no proxy for any host, counts only by itself
    left_out = "*" if "*" in hosts else ",".join(hosts)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = left_out


def answers() -> bool:
    """Whether the server of this process answers now."""
    return _is_healthy(os.environ.get("PREFECT_API_URL", ""), seconds=5)


def _is_healthy(url: str, *, seconds: float) -> bool:
    # no secret is sent, and Prefect has its own setting for trusted certificates
    try:
        answer = httpx.get(f"{url}/health", timeout=seconds, follow_redirects=True, verify=False)  # noqa: S501
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.is_success


def raise_if_it_failed(error: Exception) -> None:
    """Raise a readable error if the server itself failed or refused to answer; else return.

    Raises:
        ServerError: The server answered a request with a status of 500 or more, or asks for
            another secret, as a server does that has taken the address of one that ended.
    """
    if not isinstance(error, httpx.HTTPStatusError):
        return
    if error.response.is_server_error:
        raise ServerError(
            f"the Prefect server on {page()} fails with {error.response.status_code}, as it does"
            " where its disk is full; its log says why (of a home's own: prefect/server.log)."
            " What was finished is kept, so run again"
        ) from error
    if error.response.status_code == httpx.codes.UNAUTHORIZED:
        raise ServerError(
            f"the Prefect server on {page()} does not take the secret that was sent (401): set"
            " PREFECT_API_AUTH_STRING to the one that it asks for, or, if it has taken the place of"
            " one that ended, PREFECT_API_URL to yours. What was finished is kept, so run again"
        ) from error


def page() -> str:
    """The URL of the server's page."""
    return os.environ["PREFECT_API_URL"].removesuffix("/api")


def _got(file: IO[bytes]) -> bool:
    """Take the lock; False if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(folder: Path, room_bytes: int = 0) -> subprocess.Popen[bytes] | None:
    """Start a server, unless one lives.

    Raises:
        NoSpaceError: Its disk has fewer than `room_bytes` free.
    """
    with (folder / "server.lock").open("ab") as own:
        if not _got(own):
            return None
        require_space(folder, room_bytes, "what a run writes to begin with")
        with _listening(_last_port(folder)) as listener, _log_of(folder).open("ab") as log:
            port = listener.getsockname()[1]
            replace_text(folder / "address", f"http://{HOST}:{port}/api")
            module, descriptor = "pipelines.flows.local_server", str(listener.fileno())
            return subprocess.Popen(  # noqa: S603  (our own module)
                [sys.executable, "-m", module, str(folder), descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno(), own.fileno()],  # a lock is held as long as it is open
                start_new_session=True,  # Ctrl-C ends the run only, which then releases its lock
            )


def _log_of(folder: Path) -> Path:
    """The file for a server's log, behind the lines of the last one; a long file is put aside."""
    log = folder / "server.log"
    if log.is_file() and log.stat().st_size > LOG_BYTES:
        log.replace(folder / "server.old.log")
    return log


def _last_port(folder: Path) -> int:
    try:
        url = (folder / "address").read_text(encoding="utf-8")
        return int(url.removesuffix("/api").rpartition(":")[2])
    except (FileNotFoundError, ValueError):
        return PORT


def _listening(port: int) -> socket.socket:
    """A socket that listens already, so no other program takes its port before the server is up."""
    try:
        return socket.create_server((HOST, port))
    except OSError:  # another program has the port; take any other
        return socket.create_server((HOST, 0))


def _wait_until_healthy(server: subprocess.Popen[bytes] | None, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while (server is None or server.poll() is None) and time.monotonic() < deadline:
        if _is_healthy(url, seconds=2):
            return
        time.sleep(0.1)
    if server is not None:
        server.kill()
        server.wait()
    raise ServerError(
        f"the local Prefect server did not start; {log} says why if it ended by itself; on a very"
        " busy machine try again, or set PREFECT_API_URL to a server that runs"
    )


def _check_that_it_asks_for(secret: str, url: str) -> None:
    """Refuse the server of an older version, which may still live: it answers without a secret."""
    version, (user, _, password) = f"{url}/admin/version", secret.partition(":")
    if httpx.get(version, timeout=30).status_code != 401:
        raise ServerError(
            f"the Prefect server of this home, {url}, asks for no secret, as an older version"
            " started it; stop what still uses it, such as `meteora schedule`, then run this again"
        )
    if httpx.get(version, auth=(user, password), timeout=30).status_code != 200:
        raise ServerError(
            f"the Prefect server of this home, {url}, does not take the secret that lies here now;"
            " stop what still uses it, such as `meteora schedule`, then run this again"
        )


def _keep_alive(
    folder: Path, server: subprocess.Popen[bytes] | None, leaving: threading.Event
) -> None:
    """Start the server again, at its address, when it has died: Prefect's clients wait for it."""
    while not leaving.wait(KEEP_SECONDS):
        if server is not None:
            server.poll()  # a dead child stays a zombie until its parent polls it
        # such as a full disk, which may have room again in the next round
        with suppress(OSError), (folder / "start.lock").open("wb") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            server = _start(folder) or server


def _leave(
    users: IO[bytes],
    server: subprocess.Popen[bytes] | None,
    held: ExitStack,
    leaving: threading.Event,
) -> None:
    leaving.set()
    alone = _got(users)
    held.close()
    if server is not None and alone:
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)


def _end_with_the_last_user(folder: Path) -> None:
    users = (folder / "users.lock").open("wb")
    while not _got(users):
        time.sleep(0.2)
    os._exit(0)


def settings(listener: socket.socket, secret: str) -> dict[str, str]:
    """The environment of the server's own process."""
    origin = f"http://{HOST}:{listener.getsockname()[1]}"
    return {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",  # into its log; a run shows none of it
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": origin,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": origin.rpartition(":")[2],
        # by default the pages of runs stay for ever; so they stay for 90 days
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_UI_API_URL": f"{origin}/api",  # for its page's requests
        "PREFECT_UI_URL": origin,  # for links in its messages
    }


def serve(folder: Path, listener: socket.socket) -> None:
    """Serve until no process uses the server any more; without the secret it does not start.

    The secret is read here, so the server asks for it however this process is started.
    """
    import uvicorn  # noqa: PLC0415  (in the server's own process only)

    os.environ |= settings(listener, read_or_make(folder / "secret"))
    threading.Thread(target=_end_with_the_last_user, args=(folder,), daemon=True).start()
    config = uvicorn.Config(
        lambda: OwnOriginOnly(_prefect(), f"{HOST}:{listener.getsockname()[1]}"),
        factory=True, log_level="warning",
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def _prefect() -> FastAPI:
    from prefect.server.api.server import create_app  # noqa: PLC0415  (after its settings)

    return create_app()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
