"""The one thread that answers: a model computes one answer at a time, and the others wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from meteora.artifacts import MeteoraError
from meteora.model.chat import Answer, Chat
from meteora.routing.layer import routed_layers

if TYPE_CHECKING:
    from fastapi import Request
    from torch import nn

    from meteora.model.trace import Token
    from pipelines.serving.requests import AnyRequest

    Item = Token | Answer | Exception

LOOK_EVERY_SECONDS = 1.0
"""The time between two checks of a waiting request that client and server still run."""


class ClientLeftError(Exception):
    """The client does not wait for its answer any more."""


class StoppedError(MeteoraError):
    """The server stopped before the answer was finished."""


class _Outbox:
    """Moves items for a client from the model's thread to the event loop, until it leaves."""

    def __init__(self, request: AnyRequest) -> None:
        self.request: AnyRequest | None = request
        """None when the client has left: what waits for the model does not keep megabytes of it."""
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """The client has left."""
        self.request = None

    def look(self, *_: object) -> None:
        """Return while the client waits; raise `ClientLeftError` when it has left."""
        if self.request is None:
            raise ClientLeftError

    def put(self, item: Item) -> None:
        """Pass on an item, in the model's thread; raises as `look`, so the computation can stop."""
        self.look()
        self._loop.call_soon_threadsafe(self.items.put_nowait, item)


class ModelThread:
    """Answers requests one at a time, in a thread of its own."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self._stopped = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")

    def stop(self) -> None:
        """End all answers, also waiting ones, each with a `StoppedError`."""
        self._stopped = True

    async def answer(
        self, request: AnyRequest, expert: str, client: Request
    ) -> AsyncGenerator[Token | Answer]:
        """Yield each token at once, and the answer at the end; stop if the client leaves.

        Args:
            expert: the expert of every token; empty for the model's own routing
            client: the HTTP request, which knows whether its client is still connected
        """
        outbox = _Outbox(request)
        self._pool.submit(self._work, expert, outbox)
        try:
            while not await client.is_disconnected():
                if self._stopped:
                    raise StoppedError("the server was stopped")
                try:
                    item = await asyncio.wait_for(outbox.items.get(), LOOK_EVERY_SECONDS)
                except TimeoutError:
                    continue
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Answer):
                    return
        finally:
            outbox.close()

    def _work(self, expert: str, outbox: _Outbox) -> None:
        """Answer a request, in the model's thread."""
        if (request := outbox.request) is None:
            return
        try:
            with _before_each_layer(self.chat.model, outbox.look):
                answer = self.chat.answer(
                    request.asked,
                    expert=expert,
                    max_new_tokens=request.max_new_tokens,
                    sampling=request.sampling,
                    stop=request.stops,
                    on_token=outbox.put,
                )
            outbox.put(answer)
        except ClientLeftError:
            return
        except BaseException as error:  # a panic of the tokenizer is no `Exception`
            if outbox.request is not None:
                outbox.put(error if isinstance(error, Exception) else RuntimeError(str(error)))


@contextmanager
def _before_each_layer(model: nn.Module, look: Callable[..., None]) -> Generator[None]:
    """Call `look` before each routed layer; an exception from it ends the pass.

    Without this, a long prompt would be read for minutes for a client that has left.
    """
    with ExitStack() as hooks:
        for layer in routed_layers(model).values():
            hooks.enter_context(layer.register_forward_pre_hook(look))
        yield
