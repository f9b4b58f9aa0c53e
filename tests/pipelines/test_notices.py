"""A webhook is told of runs that fail, by the server's own automation."""

from __future__ import annotations

import json
import queue
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from meteora.artifacts import MeteoraError

from .conftest import run

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pipelines.workplace import Workplace


@contextmanager
def listening() -> Generator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """An address that can be called, and what it was called with."""
    calls: queue.Queue[dict[str, Any]] = queue.Queue()

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # ty: ignore[incompatible-method-override]
            """Not into the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/failed", calls
        server.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_whoever_asked_is_told_once_of_a_run_that_failed(
    workplace: Callable[..., Workplace],
) -> None:
    from pipelines import notices  # noqa: PLC0415

    with listening() as (url, calls):
        notices.tell(url)
        notices.tell(url)  # again: one address, told once
        with pytest.raises(MeteoraError, match="nowhere"):
            run(workplace(base="path:nowhere"))
        told = calls.get(timeout=300)
        with pytest.raises(queue.Empty):
            calls.get(timeout=5)
    assert told["text"].startswith("meteora: changed ")
    assert "Failed" in told["text"]
    assert "nowhere" in told["text"]
    assert "/runs/flow-run/" in told["page"]
