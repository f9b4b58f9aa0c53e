"""Refuse requests that a browser sends to a local server for the page of another site.

Any page may send requests to loopback. Most have a foreign `Origin`; if the site's name was rebound
to loopback, `Host` is that name. Programs send no `Origin`, and the right `Host`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class OwnOriginOnly:
    """An app that answers under one `Host` and to its own pages only, websockets too."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host.encode()
        self._origin = f"http://{host}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] != "lifespan":
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host"), headers.get(b"origin", self._origin)
            if (host, origin) != (self._host, self._origin):
                app = self._refuse
        await app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse  # noqa: PLC0415  (in the server only)

        text = f"this server answers to its own pages only: open {self._origin.decode()}/\n"
        await PlainTextResponse(text, status_code=403)(scope, receive, send)
