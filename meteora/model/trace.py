"""Record the routes of every token of a prompt and of its answer, module by module.

The answer is generated as usual, with a cache: no route is forced, and no token is read twice.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError
from meteora.artifacts.specs import place_of
from meteora.base.chat_template import encode_prompt
from meteora.model.fused import expert_names
from meteora.model.generate import batch_of, generate_ids
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import routed_layers
from meteora.routing.passes import PassInput, by_name, cache_name, with_every_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.routing.hooks import Routes


MOST_PASSES = 64
"""Passes whose routes are kept apart: small tensors take ten times the memory of large ones."""


class TraceError(MeteoraError):
    """No module of the model is routed."""


@dataclass(frozen=True)
class Token:
    """One token, and the expert with the largest mean weight over all routed modules."""

    text: str
    expert: int
    """Its number in `expert_names`."""
    share: float
    """Its mean weight, 0 to 1."""
    layers: tuple[LayerWinner, ...] = ()
    """The strongest expert of each layer with routed modules; empty outside of conversations."""


class LayerWinner(NamedTuple):
    """The expert with the largest mean weight over the routed modules of one layer."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class Trace:
    """The routes of T tokens through M routed modules in the order of the model, K choices each."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """The text of each token; together they are the whole text, special tokens included."""
    num_prompt: int
    """The number of tokens in the prompt; the others are the answer."""
    experts: tuple[str, ...]
    """The names of the choices, as `expert_names` gives them."""
    modules: tuple[str, ...]
    chosen: Tensor
    """[M, T, K] numbers of choices, the strongest first."""
    weights: Tensor
    """[M, T, K], which sum to one over K."""

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layer of each module; None if its path has no number."""
        return layers_of(self.modules)

    def shares(self, layer: int | None = None) -> Tensor:
        """The mean weight of each token and expert, [T, E], over modules of one layer or of all.

        Raises:
            TraceError: that layer has no routed module.
        """
        modules = [m for m, own in enumerate(self.layers) if layer is None or own == layer]
        if not modules:
            raise TraceError(f"no module of layer {layer} is routed; ask for another layer")
        return mean_weights(self.weights[modules], self.chosen[modules], len(self.experts))

    def tokens(self) -> list[Token]:
        """Every token of prompt and answer, with its strongest expert."""
        best = winners(self.shares())
        return [Token(text, *winner) for text, winner in zip(self.pieces, best, strict=True)]


def layers_of(modules: Iterable[str]) -> tuple[int | None, ...]:
    """The layer of each module; None if its path has no number."""
    return tuple(place.layer if (place := place_of(path)) else None for path in modules)


def layer_winners(
    weights: Tensor, chosen: Tensor, modules: tuple[str, ...], num_experts: int
) -> tuple[LayerWinner, ...]:
    """The strongest expert of one token in each layer, from weights and experts [M, 1, K]."""
    numbers, shares = _in_layers(modules)
    spread = weights.new_zeros(len(modules), num_experts).scatter(1, chosen[:, 0], weights[:, 0])
    best = winners(shares.to(weights) @ spread)
    return tuple(LayerWinner(layer, *winner) for layer, winner in zip(numbers, best, strict=True))


@lru_cache(maxsize=8)
def _in_layers(modules: tuple[str, ...]) -> tuple[list[int], Tensor]:
    """The numbers of the L layers, and the share of each module in each layer [L, M]."""
    layers = layers_of(modules)
    numbers = sorted({layer for layer in layers if layer is not None})
    inside = [[float(layer == number) for layer in layers] for number in numbers]
    with torch.inference_mode(mode=False):  # it is used again outside
        mask = torch.tensor(inside).view(len(numbers), len(layers))
        return numbers, mask / mask.sum(1, keepdim=True)


def mean_weights(weights: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    """The mean over modules of the weights [M, T, K] of the chosen experts [M, T, K], as [T, E]."""
    spread = weights.new_zeros(*weights.shape[:2], num_experts)
    return spread.scatter(2, chosen, weights).mean(0)


def winners(shares: Tensor) -> list[tuple[int, float]]:
    """The strongest expert of each token, and its share, from shares [T, E]."""
    share, expert = shares.max(dim=1)
    return list(zip(expert.tolist(), share.tolist(), strict=True))


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 0,
) -> Trace:
    """Answer a prompt greedily, and record which experts each token is sent to.

    Args:
        model: fused
        prompt: text, which is put into the tokenizer's chat template as `generate` does; or token
            ids, which are read as they are
        max_new_tokens: the answer is cut at this many tokens; 0 traces the prompt alone

    Raises:
        TraceError: no module of the model has a router, as inside `without_experts`.
        EmptyPromptError: the prompt has no tokens.
        ConversationError: it is no Unicode.
    """
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt)
    ids = batch_of(model, prompt)
    with torch.inference_mode(), every_pass(model) as passes:
        if max_new_tokens:
            out = generate_ids(model, tokenizer, ids, max_new_tokens, return_dict_in_generate=True)
            ids = out.sequences
            read_last(model, out)
        else:
            model(input_ids=ids)
    modules = tuple(passes[0])
    if not modules:
        if any(layer.router is not None for layer in routed_layers(model).values()):
            raise TraceError(
                "only the head is routed, which reads the last token of a prompt alone; trace the"
                " prompt without an answer, with max_new_tokens=0"
            )
        raise TraceError("no module of the model is routed, so there is nothing to trace")
    read = ids[0].tolist()
    return Trace(
        ids=tuple(read),
        pieces=pieces_of(tokenizer, read),
        num_prompt=len(prompt),
        experts=tuple(expert_names(model)),
        modules=modules,
        # on some devices `generate` runs one pass too many
        chosen=joined(passes, 1)[:, : len(read)].cpu(),
        weights=joined(passes, 0)[:, : len(read)].float().cpu(),
    )


def read_last(model: PreTrainedModel, out: Any) -> None:  # noqa: ANN401  (of many kinds)
    """Run the model on the last generated token, which `generate` itself does not read."""
    model(input_ids=out.sequences[:, -1:], **{cache_name(model): out.past_key_values})


def _end_to_end(passes: list[Routes], path: str) -> tuple[Tensor, Tensor]:
    weights, chosen = zip(*(each[path] for each in passes), strict=True)
    return torch.cat(weights), torch.cat(chosen)


def joined(passes: list[Routes], part: int) -> Tensor:
    """Weights (0) or experts (1) of all passes end to end, [M, T, K]; [0, 0, 0] without routes."""
    if not passes[0]:
        return torch.zeros(0, 0, 0)
    return torch.stack([torch.cat([each[path][part] for each in passes]) for path in passes[0]])


@contextmanager
def every_pass(model: PreTrainedModel) -> Generator[list[Routes]]:
    """Collect the routes of every forward pass of this thread, in order; earlier ones together.

    A pass without a cache starts again: Phi 3 reads all tokens again when its positions change. A
    module that gets other tokens than the model is left out, such as DeepSeek's `kv_b_proj`, which
    also gets the tokens of the cache.
    """
    passes: list[Routes] = []
    num_tokens, thread = 0, get_ident()

    def begin(
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # another thread that is at this hook while it is removed calls it without `kwargs`
        nonlocal num_tokens
        if get_ident() != thread:
            return None
        seen = PassInput.of(by_name(model, args, kwargs))
        num_tokens = seen.is_token.numel()
        if not seen.goes_on:
            passes.clear()
        return args, with_every_token(kwargs)

    def end(*_: object) -> None:
        if get_ident() != thread:
            return
        passes.append(dict(routes))
        for path, (weights, _chosen) in routes.items():
            if len(weights) != num_tokens:
                for each in passes:
                    each.pop(path, None)
        if len(passes) > MOST_PASSES:  # the last one stays apart: a chat shows its token's expert
            earlier = passes[:-1]
            passes[:-1] = [{path: _end_to_end(earlier, path) for path in passes[0]}]

    with (
        recorded_routes(model) as routes,
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
    ):
        yield passes


class Pieces:
    """Splits a text by tokens; a character of several tokens belongs to the last of them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = False
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []
        """The tokens before the waiting ones, on which their text may depend."""
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The new text up to this token; empty inside a character."""
        self._waiting.append(token)
        if self._decode(self._waiting).endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self.rest()

    def rest(self) -> str:
        """The text of the waiting tokens, even if a character is not complete."""
        before = self._decode(self._context)
        text = self._decode(self._context + self._waiting)
        # a special token without text is no context: a space after it would be stripped
        self._context = self._waiting if text != before else self._context + self._waiting
        self._waiting = []
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; together they are the whole text."""
    pieces = Pieces(tokenizer)
    texts = [pieces.add(token) for token in ids]
    return (*texts[:-1], texts[-1] + pieces.rest())
