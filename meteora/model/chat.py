"""A conversation with a fused model: answers token by token, each token with its expert.

    chat = Chat(model, tokenizer)
    messages = [{"role": "user", "content": "What is 12 plus 30?"}]
    answer = chat.answer(messages, on_token=lambda token: print(token.text, token.expert))

The keys and values of the last conversation are kept. The next answer reuses those of the tokens
with which both begin: the whole history, when a conversation continues. They are reused only if the
routing is the same, so earlier questions do not change an answer, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from meteora.artifacts import NULL
from meteora.base.chat_template import (
    ConversationError,
    common_beginning,
    encode_messages,
    encode_text,
)
from meteora.base.placement import input_device
from meteora.model.fused import expert_names, force_expert
from meteora.model.generate import batch_of, end_tokens, generate_ids, most_new_tokens
from meteora.model.prompt_choice import PromptReader
from meteora.model.shared_prefix import rotates_by_length, whole_layers
from meteora.model.trace import (
    LayerWinner,
    Pieces,
    Token,
    Trace,
    every_pass,
    joined,
    layer_winners,
    mean_weights,
    pieces_of,
    read_last,
    winners,
)
from meteora.routing.layer import routed_layers
from meteora.routing.passes import watcher_of
from meteora.routing.prompt_opening import PromptOpening
from meteora.routing.turns import Turns

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    from meteora.routing.hooks import Routes
    from meteora.routing.routers import Router


LEAST_TEMPERATURE = 1e-4
"""The least temperature: logits that are divided by less overflow."""


@dataclass(frozen=True)
class Sampling:
    """The way to choose the next token."""

    temperature: float = 0.0
    """Below `LEAST_TEMPERATURE`, such as 0, the most likely token is taken."""
    top_p: float = 1.0
    seed: int | None = None

    def to_generate(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if self.temperature < LEAST_TEMPERATURE:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and how it was generated."""

    text: str
    tokens: tuple[Token, ...]
    """Their texts join to `text`; the end token is not among them."""
    truncated: bool
    """Whether the answer was cut at the most tokens that were allowed."""
    num_new: int
    """Tokens that were generated, the end token included."""
    num_prompt: int
    """Tokens of the messages in the chat template."""
    num_cached: int
    """Tokens of the prompt that were not computed again."""


class _Routing(NamedTuple):
    """What decides for the tokens of an answer; equal if it is the same."""

    expert: str
    """The forced expert; empty if the routers decide."""
    routers: list[Router | None]
    """Of each routed layer, outside of the answer: a block may have lent it others."""


@dataclass
class _Reading:
    """T tokens that the model has read, with their keys, values and routes."""

    routing: _Routing
    is_text: bool
    """Whether the last prompt was a text, and no conversation."""
    num_first: int
    """The length of the first prompt."""
    num_prompt: int
    """The length of the last prompt; the last answer follows it."""
    ids: list[int]
    cache: DynamicCache | None
    """None if it cannot be cut, such as one with a sliding window, which forgets tokens, or if keys
    depend on the length of the whole text."""
    modules: tuple[str, ...]
    weights: Tensor
    """[M, T, K]"""
    chosen: Tensor
    """[M, T, K]"""


class Chat:
    """Answers conversations, one at a time; an expert is forced for all threads of a model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a fused model."""
        self.model, self.tokenizer = model, tokenizer
        self.routed = tuple(expert_names(model))
        """The choices of its routers."""
        missing = () if NULL in self.routed else (NULL,)
        self.experts = (*self.routed, *missing)
        """The names that `answer` takes as `expert`: these choices, and `(base)`."""
        self._reading: _Reading | None = None

    def answer(
        self,
        messages: Sequence[Mapping[str, str]] | str,
        *,
        expert: str = "",
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Collection[str] = (),
        on_token: Callable[[Token], None] = lambda _token: None,
    ) -> Answer:
        """Answer the last of the messages, or continue a text.

        Args:
            messages: `role` and `content` of each, the oldest first; or a text as it stands, which
                needs no chat template
            expert: one of `experts`, which gets every token; empty for the model's own routing
            max_new_tokens: the answer is cut at this many tokens, or at the model's longest text
            stop: texts that end the answer, and are no part of it
            on_token: called with each token, once its expert is known; an exception that it raises
                ends the answer

        Raises:
            ConversationError: the chat template does not take the messages, or they are too long.
            EmptyPromptError: they have no tokens.
            UnknownExpertError: no expert of the model has this name.
        """
        if isinstance(messages, str):
            is_text, ids = True, encode_text(self.tokenizer, messages)
        else:
            is_text, ids = False, encode_messages(self.tokenizer, messages)
        max_new_tokens = most_new_tokens(self.model, len(ids), max_new_tokens)
        ends = end_tokens(self.model, self.tokenizer)
        layers = routed_layers(self.model).values()
        routing = _Routing(expert, [layer.router for layer in layers])
        with (
            force_expert(self.model, expert) if expert else nullcontext(),
            torch.inference_mode(),
            every_pass(self.model) as passes,
            _seeded(sampling, input_device(self.model)),
        ):
            before = self._take(ids, routing, is_text=is_text)
            listener = _Listener(self, passes, ends, stop, on_token)
            out = generate_ids(
                self.model,
                self.tokenizer,
                batch_of(self.model, ids),
                max_new_tokens,
                past_key_values=before.cache if before else None,
                stopping_criteria=StoppingCriteriaList([listener]),
                return_dict_in_generate=True,
                **sampling.to_generate(),
            )
            read_last(self.model, out)
            listener.finish()
        self._keep(ids, out, passes, routing, before, is_text=is_text)
        return Answer(
            text=listener.text,
            tokens=tuple(listener.tokens),
            truncated=not (listener.ended or listener.stopped),
            num_new=len(listener.ids),
            num_prompt=len(ids),
            num_cached=len(before.ids) if before else 0,
        )

    def trace(self) -> Trace:
        """The routes of every token of the last conversation, its answer included.

        Raises:
            ConversationError: there is no answer, the last one was interrupted, or the base alone
                gave it.
        """
        read = self._reading
        if read is None:
            raise ConversationError("there is no whole answer to trace; ask something first")
        if not read.modules:
            raise ConversationError("the base answered alone; there are no routes to trace")
        return Trace(
            ids=tuple(read.ids),
            pieces=pieces_of(self.tokenizer, read.ids),
            num_prompt=read.num_prompt,
            experts=self.routed,
            modules=read.modules,
            chosen=read.chosen,
            weights=read.weights,
        )

    def forget(self) -> None:
        """Drop the last conversation."""
        self._reading = None

    def _take(self, ids: list[int], routing: _Routing, *, is_text: bool) -> _Reading | None:
        """Take the last reading, cut to its common beginning with a prompt; None if it is no use.

        It is always removed: an answer that is interrupted leaves a cache in an unknown state.
        """
        reading, self._reading = self._reading, None
        if reading is None or reading.cache is None or reading.routing != routing:
            return None
        # a forced expert needs no question
        watcher = None if routing.expert else watcher_of(self.model)
        if isinstance(watcher, PromptReader):
            return None  # the last question decides for all turns
        if isinstance(watcher, Turns | PromptOpening) and (
            is_text or reading.is_text or not watcher.template.question_end
        ):
            return None  # only a chat template shows where the question ends that decides
        # if routers look ahead, the question that decided their routes must be the same
        least = 1
        if isinstance(watcher, Turns):
            least = reading.num_prompt
        elif isinstance(watcher, PromptOpening):
            least = reading.num_first
        length = len(common_beginning(reading.ids, ids[:-1]))
        if length < least:
            return None
        reading.cache.crop(length - len(reading.ids))
        reading.ids = reading.ids[:length]
        reading.weights, reading.chosen = reading.weights[:, :length], reading.chosen[:, :length]
        return reading

    def _keep(
        self,
        ids: list[int],
        out: Any,  # noqa: ANN401
        passes: list[Routes],
        routing: _Routing,
        before: _Reading | None,
        *,
        is_text: bool,
    ) -> None:
        """Keep the tokens, cache and routes for the next answer and for a trace."""
        if before:  # the head is in the routes of a pass of one token alone
            shared = [path for path in before.modules if path in passes[0]]
            rows = [before.modules.index(path) for path in shared]
            passes = [{path: one[path] for path in shared} for one in passes]
        read = out.sequences[0].tolist()
        weights, chosen = joined(passes, 0).float().cpu(), joined(passes, 1).cpu()
        if before:
            weights = torch.cat([before.weights[rows], weights], 1)
            chosen = torch.cat([before.chosen[rows], chosen], 1)
        cache = out.past_key_values
        config = self.model.config.get_text_config()
        is_kept = whole_layers(cache) is not None and not rotates_by_length(config)
        self._reading = _Reading(
            routing=routing,
            is_text=is_text,
            num_first=before.num_first if before else len(ids),
            num_prompt=len(ids),
            ids=read,
            cache=cache if is_kept else None,
            modules=tuple(passes[0]),
            weights=weights[:, : len(read)],  # on some devices `generate` runs one pass too many
            chosen=chosen[:, : len(read)],
        )


@contextmanager
def _seeded(sampling: Sampling, device: torch.device) -> Generator[None]:
    """A context that draws from the seed, if there is one; torch's own random state stays."""
    devices, seed = [device] if device.type == "cuda" else [], sampling.seed
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Listener:
    """Passes each token of an answer to `on_token`, once its text and its expert are certain.

    The expert is known after the next pass, which reads the token. The text waits while it may be
    the beginning of a stop text.
    """

    def __init__(
        self,
        chat: Chat,
        passes: list[Routes],
        ends: Collection[int],
        stop: Collection[str],
        on_token: Callable[[Token], None],
    ) -> None:
        self.ids: list[int] = []
        self.tokens: list[Token] = []
        self.text = ""
        self.ended = self.stopped = False
        self._passes, self._ends, self._stop, self._on_token = passes, ends, stop, on_token
        self._experts = chat.experts
        self._pieces = Pieces(chat.tokenizer, skip_special_tokens=True)
        self._bounds = [0]
        """The start of each token in the text, and the end of the last token."""
        self._winners: list[tuple[int, float, tuple[LayerWinner, ...]]] = []

    def __call__(self, ids: Tensor, _scores: object, **_kwargs: object) -> Tensor:
        """Take the newest of the tokens [1, T]; transformers calls this as a stopping criterion."""
        if self.ended or self.stopped:  # on some devices one more token is made, and undone
            return torch.ones(1, dtype=torch.bool, device=ids.device)
        if self.ids:
            self._see_winner()
        token = int(ids[0, -1])
        self.ids.append(token)
        self.ended = token in self._ends
        if not self.ended:  # else `finish` passes on the rest
            self._append(self._pieces.add(token))
            self._hand_on()
        return torch.full((1,), self.stopped, device=ids.device)

    def finish(self) -> None:
        """Pass on waiting text, after the pass that read the last token."""
        self._see_winner()
        if not self.stopped and (rest := self._pieces.rest()):
            self._bounds.pop()
            self._append(rest)
        self._hand_on(at_end=True)

    def _see_winner(self) -> None:
        last = self._passes[-1]
        if not last:  # the base alone
            self._winners.append((self._experts.index(NULL), 1.0, ()))
            return
        weights, chosen = (joined([last], part)[:, -1:] for part in (0, 1))
        weights, num_experts = weights.float(), len(self._experts)
        (winner,) = winners(mean_weights(weights, chosen, num_experts))
        layers = layer_winners(weights, chosen, tuple(last), num_experts)
        self._winners.append((*winner, layers))

    def _append(self, piece: str) -> None:
        self.text += piece
        starts = [start for one in self._stop if (start := self.text.find(one)) >= 0]
        if starts:
            self.stopped = True
            self.text = self.text[: min(starts)]
            self._bounds = [min(bound, len(self.text)) for bound in self._bounds]
        self._bounds.append(len(self.text))

    def _hand_on(self, *, at_end: bool = False) -> None:
        waiting = (
            size
            for one in self._stop
            for size in range(1, len(one))
            if self.text.endswith(one[:size])
        )
        sure = len(self.text) - (0 if at_end or self.stopped else max(waiting, default=0))
        last = min(len(self._winners), len(self._bounds) - 1)
        while len(self.tokens) < last:
            start, end = self._bounds[len(self.tokens) :][:2]
            if end > sure:
                return
            token = Token(self.text[start:end], *self._winners[len(self.tokens)])
            self.tokens.append(token)
            self._on_token(token)
