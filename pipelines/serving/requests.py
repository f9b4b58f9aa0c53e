"""The requests of `/v1/chat/completions` and `/v1/completions`.

Fields that would have no effect are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from meteora.model.chat import Sampling

MAX_VALUES = 30_000
"""The most values in a request's JSON: some 10,000 messages. Each value can be wrong, and its error
takes about a kilobyte; a template adds tokens for each message, even without text."""
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]
MAX_NEW_TOKENS = 512
"""The default for conversations that name no number."""
MAX_NEW_TOKENS_OF_TEXT = 16
"""The default for texts that are continued: OpenAI's."""
MAX_CHARACTERS = 4_000_000
"""The most characters of a prompt: more fit into no model, and take minutes to tokenize."""
Prompt = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of the conversation; other fields, which clients send back, are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    # these are accepted only with values that say nothing: else a turn would be read without them
    tool_calls: Annotated[list[object], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    prefix: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_an_answer_without_text(cls, sent: Any) -> Any:  # noqa: ANN401  (JSON)
        silent = isinstance(sent, dict) and sent.get("content") is None
        if silent and sent.get("role") == "assistant":
            return {**sent, "content": ""}
        return sent

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it; parts are lines, as vLLM has it."""
        content = self.content
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content
            if isinstance(content, str)
            else "\n".join(part.text for part in content),
        }


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class ResponseFormat(BaseModel):
    type: Literal["text"]


class AnyRequest(BaseModel, ABC):
    """The fields of every request. Without a temperature, decoding is greedy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    trace: bool | Literal["layers"] = False
    """Whether the reply has the expert of each token; `layers`: also the expert in each layer."""

    # these are accepted only with values that ask for nothing
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, object], Field(max_length=0)] | None = None

    user: str | None = None
    """It changes no answer."""

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, sent: Any) -> Any:  # noqa: ANN401  (JSON)
        """Drop null fields: some clients send every field that they know."""
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    @model_validator(mode="before")
    @classmethod
    def _refuse_too_many(cls, sent: Any) -> Any:  # noqa: ANN401  (JSON)
        num_values, waiting = 0, [sent]
        while waiting:
            one = waiting.pop()
            inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
            num_values += len(inside)
            if num_values > MAX_VALUES:
                raise ValueError(f"it has more than {MAX_VALUES} values")
            waiting.extend(inside)
        return sent

    @property
    @abstractmethod
    def asked(self) -> list[dict[str, str]] | str:
        """What `Chat.answer` takes: messages, or a text."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int: ...

    @property
    def sampling(self) -> Sampling:
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(self.temperature or 0.0, top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(AnyRequest):
    """A request to answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    # these are accepted only with values that ask for nothing
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[object], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None

    # these change no answer
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @field_validator("messages")
    @classmethod
    def _refuse_too_long(cls, messages: list[Message]) -> list[Message]:
        length = sum(len(message.plain()["content"]) for message in messages)
        if length > MAX_CHARACTERS:
            raise ValueError(f"they have {length} characters; at most {MAX_CHARACTERS} are taken")
        return messages

    @property
    def asked(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]

    @property
    def max_new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS


class CompletionRequest(AnyRequest):
    """A request to continue a text, which is put into no chat template."""

    prompt: Prompt

    # these are accepted only with values that ask for nothing
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _take_one_of_a_list(cls, sent: Any) -> Any:  # noqa: ANN401  (JSON)
        if isinstance(sent, list) and [isinstance(one, str) for one in sent] != [True]:
            raise ValueError(
                f"it is a list of {len(sent)}; a request continues one text, so it should be a"
                " text or a list of one text, and no tokens"
            )
        return sent[0] if isinstance(sent, list) else sent

    @property
    def asked(self) -> str:
        return self.prompt

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens or MAX_NEW_TOKENS_OF_TEXT
