"""The host names that a server accepts, so pages of other sites cannot read from it.

A browser lets a page read answers from the page's own host name. A stranger can make the name of
his page point to the address of a server in your network (DNS rebinding). The page then reads the
server's answers, and the header `Host` of its requests has the stranger's name. So a request with
an unknown name is refused. An address cannot point elsewhere, and is always allowed. A page that
uses the server's own name gets no answer either: the server allows no other origin, and a browser
asks for permission before it sends JSON to another origin.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import shortened
from pipelines.serving.answers import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII)
NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)


class KnownHostsOnly:
    """An app that accepts any address as `Host`, and these names."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not self._is_known(host):
                app = JSONResponse(
                    error_body(
                        f"this server is not known as {shortened(host)!r}; ask it by its address,"
                        " or start it with --allow-host and that name"
                    ),
                    403,
                )
        await app(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).removesuffix(".").lower()
        return name in self._names or is_address(name)


def is_address(host: str) -> bool:
    """Whether a host is an IPv4 or IPv6 address, and not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def names_of(host: str, allowed: Collection[str]) -> list[str]:
    """The names of a server that listens on `host`, with those that a person allows.

    Raises:
        MeteoraError: A name is none, but such as a URL.
    """
    if host.strip() and not (is_address(host) or NAME.fullmatch(host)):
        raise MeteoraError(
            f"--host {shortened(host)!r}: an address of this machine is needed, or its name"
        )
    for name in allowed:
        if not NAME.fullmatch(name):
            raise MeteoraError(
                f"--allow-host {shortened(name)!r}: a name is needed, without scheme, port and"
                " wildcard, such as chat.example.org"
            )
    own = [] if is_address(host) else [host]
    return list(dict.fromkeys(["localhost", socket.gethostname(), *own, *allowed]))
