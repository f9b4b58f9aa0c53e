"""The app and its server.

A request names the model, one of its experts (`NAME:iso_dates`), or the base without experts
(`NAME:(base)`). Pages of other sites get no answers: see `host_names`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from meteora.artifacts import MeteoraError
from meteora.model.chat import Answer, Chat
from meteora.untrusted.findings import MOST_NAMED, brief, did_you_mean, listed, shortened
from pipelines.serving.answers import ChatReply, Reply, TextReply, error_body, event
from pipelines.serving.host_names import KnownHostsOnly
from pipelines.serving.limits import BoundedRequests
from pipelines.serving.model_thread import ModelThread, StoppedError
from pipelines.serving.page import HEADERS
from pipelines.serving.requests import (  # noqa: TC001  (FastAPI reads annotations)
    AnyRequest,
    ChatRequest,
    CompletionRequest,
)
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from meteora.model.trace import Token

DETAILS = re.compile("(, unable to|, got| to extract| after validation).*")
"""The ends of pydantic's messages, which say no more than the value does."""
UNREADABLE = "There was an error parsing the body"
"""FastAPI's word for a body that no JSON decoder takes, without the reason."""
GOODBYE_SECONDS = 5
"""The time for unfinished answers after the server is asked to stop."""
STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""With these headers proxies, such as nginx, pass on each token at once."""


def make_app(thread: ModelThread, name: str, *, names: Collection[str], page: str) -> FastAPI:
    """The app: models, chat and plain completions under `/v1`, and a page at `/` if there is one.

    Args:
        name: of the model; each of its experts is a model `name:expert`, too, and so is its base
        names: the accepted host names, besides its addresses, from `names_of`
        page: the HTML of `chat_page`; empty for none
    """
    app = FastAPI(title="MeteoRA", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BoundedRequests)
    app.add_middleware(KnownHostsOnly, names=names)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(AnyHTTPException, _refuse)
    app.add_exception_handler(MeteoraError, _refuse_request)
    app.add_exception_handler(Exception, _fail)
    experts = thread.chat.experts
    models = {name: "", **{f"{name}:{expert}": expert for expert in experts}}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(one) for one in models]}

    @app.get("/v1/models/{model:path}")
    async def find_model(model: str) -> dict[str, Any]:
        _expert_of(models, model)
        return _model(model)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, http: Request) -> dict[str, Any] | Response:
        return await respond(asked, ChatReply(asked, experts), http)

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, http: Request) -> dict[str, Any] | Response:
        return await respond(asked, TextReply(asked, experts), http)

    async def respond(asked: AnyRequest, reply: Reply, http: Request) -> dict[str, Any] | Response:
        items = thread.answer(asked, _expert_of(models, asked.model), http)
        try:
            return await _respond(reply, items, stream=bool(asked.stream))
        except (MeteoraError, HTTPException):
            raise
        except Exception as error:
            # an exception that leaves here would be raised again, and logged with a traceback
            return await _fail(http, error)

    if page:

        @app.get("/")
        async def show_page() -> HTMLResponse:
            return HTMLResponse(page, headers=HEADERS)

    return app


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "meteora"}


def _expert_of(models: dict[str, str], model: str) -> str:
    """The expert that a model's name asks for; empty for the model's own routing."""
    if model not in models:
        known = listed([*models], MOST_NAMED)
        guess = did_you_mean(shortened(model), models)
        raise HTTPException(
            404, f"there is no model {shortened(model)!r}{guess}; there are {known}"
        )
    return models[model]


async def _respond(
    reply: Reply, items: AsyncGenerator[Token | Answer], *, stream: bool
) -> dict[str, Any] | Response:
    if stream:
        # a refused request fails before its first token, and so gets a status of its own
        events = _stream(reply, await anext(items, None), items)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAMED)
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Answer):
                return reply.whole(item)
    raise HTTPException(499, "the client left before its answer was ready")


async def _stream(
    reply: Reply, first: Token | Answer | None, items: AsyncGenerator[Token | Answer]
) -> AsyncGenerator[str]:
    """The events of one answer. An error in the middle becomes the last event."""
    async with aclosing(items):
        if beginning := reply.first():
            yield beginning
        if first is not None:
            yield reply.last(first) if isinstance(first, Answer) else reply.token(first)
        try:
            async for item in items:
                yield reply.last(item) if isinstance(item, Answer) else reply.token(item)
        except Exception as error:
            say(f"an answer failed: {brief(error)}", "error")
            yield event(error_body(f"the answer failed: {brief(error)}", "server_error"))


async def _refuse_fields(_request: Request, error: Exception) -> JSONResponse:
    """The reply to a malformed request: it names the first wrong field."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    if isinstance(error.body, bytes):
        return JSONResponse(error_body("send it as Content-Type: application/json"), 415)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body("the body of the request is not JSON"), 400)
    # a value of several possible types has an error for each: take the deepest one, and of equally
    # deep ones the one with the right type
    alike = [one for one in error.errors() if one["loc"][:2] == first["loc"][:2]]
    found = max(alike, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    place = _place(error.body, found)
    others = [one for one in alike if one is not found and _place(error.body, one) == place]
    where = shortened(".".join(place) or "the body of the request")
    return JSONResponse(error_body(f"{where}: {_sentence(found, others)}"), 400)


def _sentence(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What a wrong field has, and what is needed; `others` are errors of further allowed types."""
    if found["type"] == "missing":
        return "it is needed, and it is not there"
    if found["type"] == "extra_forbidden":
        return "there is no such field here; leave it out"
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    needed = [DETAILS.sub("", one["msg"]).partition(" should ")[2] for one in (found, *others)]
    if not all(needed):
        return str(found["msg"])
    given = shortened(json.dumps(found["input"], ensure_ascii=False), 60)
    return f"it is {given}; it should {' or '.join(dict.fromkeys(needed))}"


def _place(body: Any, found: Mapping[str, Any]) -> list[str]:  # noqa: ANN401  (JSON)
    """The path of the wrong field, without the names of the types that pydantic tried."""
    parts: list[str] = []
    for part in found["loc"][1:]:
        with suppress(LookupError, TypeError):
            body = body[part]
            parts.append(str(part))
    missing = found["loc"][-1:] if found["type"] == "missing" else ()
    return [*parts, *(name for name in map(str, missing) if name not in parts[-1:])]


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AnyHTTPException)  # noqa: S101
    sentence, path = str(error.detail), shortened(request.url.path)
    if sentence == HTTPStatus.NOT_FOUND.phrase:  # the router's own word
        sentence = (
            f"there is nothing at {path}; there are /v1/chat/completions, /v1/completions and"
            " /v1/models"
        )
    elif sentence == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
        allowed = (error.headers or {}).get("Allow", "another method")
        sentence = f"{path} takes {allowed}, not {request.method}"
    elif sentence == UNREADABLE:
        sentence = (
            "the body of the request cannot be read: it is not UTF-8, or has lists or objects"
            " nested too deeply, or a number of thousands of digits"
        )
    # the reply to a refused method has a header with the allowed ones
    return JSONResponse(error_body(sentence), error.status_code, headers=error.headers)


async def _refuse_request(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, StoppedError):
        return JSONResponse(error_body(str(error), "server_error"), 503)
    return JSONResponse(error_body(str(error)), 400)


async def _fail(_request: Request, error: Exception) -> JSONResponse:
    say(f"an answer failed: {brief(error)}", "error")
    return JSONResponse(error_body(f"the answer failed: {brief(error)}", "server_error"), 500)


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address before a model is loaded, so a conflict is known early.

    Raises:
        MeteoraError: The address is in use, or not one of this machine.
    """
    if not host.strip():
        raise MeteoraError(
            "--host is empty, which would be every network of this machine; give 127.0.0.1 for this"
            " machine alone, or 0.0.0.0 if you mean all of them"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]  # the address is named already
        raise MeteoraError(
            f"{host}:{port} cannot be listened on ({reason}); choose others with --host and --port"
        ) from error


def make_server(chat: Chat, name: str, names: Collection[str], page: str = "") -> uvicorn.Server:
    """The server; it runs on the socket of `listen`. Arguments as of `make_app`."""
    thread = ModelThread(chat)
    config = uvicorn.Config(
        make_app(thread, name, names=names, page=page),
        log_level="warning",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GOODBYE_SECONDS + 5,
    )
    return _Server(config, thread)


class _Server(uvicorn.Server):
    """A server that ends its answers before uvicorn cancels them and reports a fault."""

    def __init__(self, config: uvicorn.Config, thread: ModelThread) -> None:
        super().__init__(config)
        self._thread = thread

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait `GOODBYE_SECONDS` for unfinished answers, then end them."""
        asyncio.get_running_loop().call_later(GOODBYE_SECONDS, self._thread.stop)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal; at a second one, end unfinished answers at once."""
        if self.should_exit:
            self._thread.stop()  # uvicorn itself would cancel them, with a traceback for each
        else:
            super().handle_exit(sig, frame)
