"""Limits for the requests that a server takes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from pipelines.serving.answers import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as Event

MAX_MEGABYTES = 32
"""The limit of a request's body: it is read and parsed whole before its fields are checked."""
MOST_REQUESTS = 128
"""At a time: they wait for the model, each with megabytes of memory."""
BODY_SECONDS = 60.0
"""The time for a body to arrive."""


class BoundedRequests:
    """An app with limits, for requests at a time (else 503) and for the body of each.

    It reads `MAX_MEGABYTES` (else 413) for `BODY_SECONDS` (else 408).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. A connection that asks nothing does not count."""
        if self._num_now >= MOST_REQUESTS:
            refusal = error_body("too many requests wait for the model; try later", "server_error")
            await JSONResponse(refusal, 503)(scope, receive, send)
            return
        self._num_now += 1
        try:
            await self._app(scope, _bounded(scope, receive), send)
        finally:
            self._num_now -= 1


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """Receive the body of a request within its limits."""
    announced = dict(scope.get("headers", ())).get(b"content-length", b"")
    length = int(announced) if announced.isdigit() else 0
    received = 0
    until: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_some() -> Event:
        nonlocal received, until
        try:
            async with asyncio.timeout_at(until):
                event = await receive() if length <= MAX_MEGABYTES * 10**6 else {}
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive in {BODY_SECONDS:g} s") from None
        except asyncio.CancelledError:
            if until is None:
                raise
            raise HTTPException(503, "the server was stopped") from None
        received += len(event.get("body", b""))
        if max(length, received) > MAX_MEGABYTES * 10**6:
            raise HTTPException(413, f"a request may have at most {MAX_MEGABYTES} MB")
        if not event.get("more_body"):
            until = None
        return event

    return receive_some
