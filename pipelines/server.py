"""A Prefect server for one run, where the user has none: on loopback, and gone with the run.

Prefect can start one itself, but leaves it behind when the run is killed, and gives up on a slow
first start. This one holds a pipe to the run: when that closes, however the run ended, it exits.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from pathlib import Path

START_SECONDS = 180.0
"""A first start makes a database: half a minute on a busy machine."""
HOST = "127.0.0.1"


class ServerError(MeteoraError):
    """The local Prefect server did not start."""


def start_server(home: Path) -> None:
    """Start a server for this process, and point Prefect at it; call it before Prefect is imported.

    It outlives Prefect's own farewells, which are sent when the process ends.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    log = home / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log.open("wb") as out:
        server = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-m", "pipelines.server", str(port)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is for the run, which then closes the pipe
        )
    url = f"http://{HOST}:{port}/api"
    _wait_until_healthy(server, url, log)
    os.environ["PREFECT_API_URL"] = url
    # last in, first out: Prefect registers its farewells later, so they come before this
    atexit.register(server.communicate)  # closes the pipe, and waits


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310  (loopback)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    server.kill()
    server.communicate()
    raise ServerError(
        f"the local Prefect server did not start; {log} says why, or set PREFECT_API_URL to a"
        " server that runs"
    )


def _end_with_the_run() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def serve(port: int) -> None:
    import uvicorn  # noqa: PLC0415  (in the server's own process only)

    threading.Thread(target=_end_with_the_run, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host=HOST,
        port=port,
        log_level="warning",
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]))
