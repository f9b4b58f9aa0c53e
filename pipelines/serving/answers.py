"""Replies to clients: whole, or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meteora.model.chat import Answer
    from meteora.model.trace import LayerWinner, Token
    from pipelines.serving.requests import ChatRequest

LAST_EVENT = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def error_body(sentence: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error, as clients of OpenAI expect it."""
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


class Reply:
    """The reply to one request."""

    def __init__(self, request: ChatRequest, experts: Sequence[str]) -> None:
        self._request, self._experts = request, experts
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """An answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": _finish_reason(answer),
            **self._traced(answer.tokens),
        }
        return {**self._head("chat.completion", [choice]), "usage": _usage(answer)}

    def first(self) -> str:
        """The event that begins a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def token(self, token: Token) -> str:
        """The event of one token."""
        return self._chunk({"content": token.text}, **self._traced([token]))

    def last(self, answer: Answer) -> str:
        """The events that end a stream."""
        end = self._chunk({}, finish_reason=_finish_reason(answer))
        if self._request.wants_usage:
            end += event({**self._head("chat.completion.chunk", []), "usage": _usage(answer)})
        return end + LAST_EVENT

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created}
        return {**about, "model": self._request.model, "choices": choices}

    def _chunk(self, delta: dict[str, str], **more: object) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
        return event(self._head("chat.completion.chunk", [choice]))

    def _traced(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The expert of each token, if the request asks for it."""
        if not self._request.trace:
            return {}
        found = []
        for token in tokens:
            found.append({"text": token.text, **self._winner(token)})
            if self._request.trace == "layers":
                layers = [{"layer": one.layer, **self._winner(one)} for one in token.layers]
                found[-1]["layers"] = layers
        return {"trace": found}

    def _winner(self, found: Token | LayerWinner) -> dict[str, Any]:
        return {"expert": self._experts[found.expert], "share": round(found.share, 4)}


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.truncated else "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_prompt,
        "completion_tokens": answer.num_new,
        "total_tokens": answer.num_prompt + answer.num_new,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached},
    }
