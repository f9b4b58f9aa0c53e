"""Replies to clients: whole, or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from meteora.model.chat import Answer
    from meteora.model.trace import LayerWinner, Token
    from pipelines.serving.requests import AnyRequest

LAST_EVENT = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def error_body(sentence: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error, as clients of OpenAI expect it."""
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


class Reply(ABC):
    """The reply to one request."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    part_kind: ClassVar[str]

    def __init__(self, request: AnyRequest, experts: Sequence[str]) -> None:
        self._request, self._experts = request, experts
        self._id, self._created = f"{self.id_prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """An answer that is not streamed."""
        choice = {
            "index": 0,
            **self._text(answer.text),
            "finish_reason": _finish_reason(answer),
            **self._traced(answer.tokens),
        }
        return {**self._head(self.whole_kind, [choice]), "usage": _usage(answer)}

    def first(self) -> str:
        """The event that begins a stream; empty for none."""
        return ""

    def token(self, token: Token) -> str:
        """The event of one token."""
        return self._chunk(self._part(token.text), **self._traced([token]))

    def last(self, answer: Answer) -> str:
        """The events that end a stream."""
        end = self._chunk(self._part(""), finish_reason=_finish_reason(answer))
        if self._request.wants_usage:
            end += event({**self._head(self.part_kind, []), "usage": _usage(answer)})
        return end + LAST_EVENT

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """The text of a whole answer, as fields of its choice."""

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]:
        """A part of the text, empty at the end, as fields of a chunk's choice."""

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created}
        return {**about, "model": self._request.model, "choices": choices}

    def _chunk(self, part: dict[str, Any], **more: object) -> str:
        choice = {"index": 0, **part, "finish_reason": None, **more}
        return event(self._head(self.part_kind, [choice]))

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


class ChatReply(Reply):
    """The reply to a conversation: a message."""

    id_prefix = "chatcmpl"
    whole_kind, part_kind = "chat.completion", "chat.completion.chunk"

    def first(self) -> str:
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class TextReply(Reply):
    """The reply to a text: what follows it."""

    id_prefix = "cmpl"
    whole_kind = part_kind = "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    _part = _text


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.truncated else "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_prompt,
        "completion_tokens": answer.num_new,
        "total_tokens": answer.num_prompt + answer.num_new,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached},
    }
