"""Read the arguments of a model's forward pass that routes depend on, and watch each pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError
from meteora.base.loading import CACHES
from meteora.routing.layer import routed_layers
from meteora.routing.routers import PassState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnreadPromptError(MeteoraError, RuntimeError):
    """Tokens cannot be routed, since the prompt that decides for them was not read."""


@dataclass(frozen=True)
class PassInput:
    """The tokens of a pass, and its cache."""

    ids: Tensor | None
    """[B, L]; None if the pass gets embeddings."""
    is_token: Tensor
    """[B, L] bool: false for padding."""
    goes_on: bool
    """Whether the cache holds earlier tokens."""
    cache: object = None
    """The cache of the pass, perhaps empty; None if it has none."""
    num_before: int | None = None
    """Tokens in the cache; None if it is no cache of keys, and cannot be cropped."""
    packed: bool = False
    """Whether a row holds several sequences."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Read the arguments of a causal language model's `forward`, by name (see `by_name`)."""
        ids = arguments.get("input_ids")
        states = ids if ids is not None else arguments["inputs_embeds"]
        past, *others = (arguments.get(name) for name in CACHES)
        state = next((one for one in others if one is not None), None)
        num_before = None if past is None else _num_held(past)
        is_token = _without_padding(arguments.get("attention_mask"), states, num_before)
        goes_on = bool(num_before) if state is None else _holds_a_state(state, states.shape[1])
        cache = past if state is None else state
        packed = arguments.get("cu_seq_lens_q") is not None  # the starts of the sequences
        packed |= not goes_on and _is_packed(arguments, is_token)
        return cls(ids, is_token, goes_on, cache, num_before, packed)


def require_ids(seen: PassInput) -> None:
    """Refuse the first pass of a prompt if it has embeddings: ids tell where a question lies.

    Raises:
        UnreadPromptError: this is such a pass.
    """
    if seen.ids is None and not seen.goes_on:
        raise UnreadPromptError(
            "this model finds the question of a prompt by its token ids, and the pass has"
            " embeddings; give input_ids, or take a model whose gates decide token by token"
        )


def _num_held(cache: Any) -> int:  # noqa: ANN401  (of many kinds)
    """The number of tokens in a cache of keys; MiniMax's has none of them in its first layer."""
    layers = (getattr(layer, "get_seq_length", int)() for layer in getattr(cache, "layers", ()))
    return int(cache.get_seq_length()) or max(map(int, layers), default=0)


def _holds_a_state(cache: Any, length: int) -> bool:  # noqa: ANN401  (of many kinds)
    """Whether a state-space model has read tokens before; its cache has no length."""
    if isinstance(cache, list):  # RWKV's tensors, which the first pass makes
        return True
    has_state = getattr(cache, "has_previous_state", None)
    return length == 1 if has_state is None else has_state(0)  # xLSTM's cache does not tell


def _without_padding(mask: object, states: Tensor, num_before: int | None) -> Tensor:
    """The tokens of a pass that a mask of any form does not mask, [B, L] bool.

    Args:
        num_before: tokens in the cache of keys; None if there is no such cache
    """
    num_rows, length = states.shape[:2]
    if isinstance(mask, dict):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not (isinstance(mask, Tensor) and mask.dim() in {2, 4} and mask.shape[-1] >= length):
        return torch.ones(num_rows, length, dtype=torch.bool, device=states.device)
    # a static cache has free places after the keys of this pass; a window has dropped earlier keys
    last = mask.shape[-1] - length
    first = last if num_before is None else min(num_before, last)
    if mask.dim() == 2:
        return mask[:, first : first + length].bool()
    # a token that is no padding sees itself
    own = _sees(mask).expand(num_rows, length, -1).diagonal(first, 1, 2)
    return own[:, :length]


def _sees(mask: Tensor) -> Tensor:
    """The keys that each token sees, [B, L, keys]: true or 0.0 in a mask [B, heads, L, keys]."""
    return (mask == 0 if mask.is_floating_point() else mask.bool())[:, 0]


def _is_packed(arguments: Mapping[str, Any], is_token: Tensor) -> bool:
    """Whether a row of a first pass, with tokens [B, L], holds several sequences.

    Where one begins, no position rises, or the token does not see the one before it.
    """
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")  # a token that begins a chunk sees none before, either
    goes_on: list[Tensor] = []  # of each token but the first of its row
    if isinstance(positions, Tensor) and positions.dim() in {1, 2, 3}:
        rises = positions.diff(dim=-1) > 0  # M-RoPE: [3, B, L], and those of an image rise in turn
        goes_on.append(rises.any(0) if rises.dim() == 3 else rises)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        goes_on.append(_sees(mask)[:, :, : is_token.shape[1]].diagonal(-1, 1, 2))
    both = is_token[:, 1:] & is_token[:, :-1]
    begins = [both & ~one.to(both.device) for one in goes_on if both.shape[1]]
    return bool(torch.stack(begins).any()) if begins else False


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's `forward`, each by its name."""
    names = inspect.signature(model.forward).parameters if args else ()
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def with_every_token(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model's `forward` for the same logits, with which each layer reads each token.

    If the logits of the last tokens are asked for by their number, the last layers of a Gemma 4
    that share keys and values read no other tokens. They do if a slice is named. It lies on no
    device: the last hidden states may be on another one than the tokens.
    """
    given = dict(kwargs)
    num_kept = given.get("logits_to_keep")
    if isinstance(num_kept, int) and num_kept > 0:
        given["logits_to_keep"] = slice(-num_kept, None)
    return given


def cache_name(model: nn.Module) -> str:
    """The name of the cache among a model's `forward` arguments, and in its output."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHES[1:] if name in takes), CACHES[0])


WATCHER = "meteora_watcher"
"""The attribute of a model that holds its `Watcher`."""
CONVERSATION = "meteora_conversation"
"""The attribute of a cache that holds its `Conversation`."""


class Conversation:
    """The decisions for B sequences in a cache, for the passes that continue them.

    It is stored in the cache, and copied and freed with it: two caches may be used in turn. It
    remembers earlier turns, since a cache may be cropped.
    """

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        """The decision [B, C] of each gate, by its number."""
        self.closed: Tensor | None = None
        """[B] bool: see `turns.Questions`"""
        self._begins = self._ends = 0
        """The places in the cache where the last turn begins, and where its question ends."""
        self._earlier: list[tuple[int, int, dict[int, Tensor], Tensor | None]] = []

    def begin(self, place: int, end: int) -> None:
        """Note that a turn begins at this place in the cache, and that its question ends there."""
        self._earlier.append((self._begins, self._ends, dict(self.held), self.closed))
        self._begins, self._ends = place, end

    def return_to(self, length: int) -> None:
        """Return to what was decided by the first tokens alone, as many as this.

        Raises:
            UnreadPromptError: they end inside a question.
        """
        while self._earlier and self._begins >= length:
            self._begins, self._ends, self.held, self.closed = self._earlier.pop()
        if length < self._ends:
            raise UnreadPromptError(
                f"the cache was cut at {length} tokens, inside a question, which decides for its"
                f" turn; crop it to {self._begins} or fewer, and read the question as a whole"
            )

    def moved_to(self, cache: object) -> None:
        """Let a cache that is built anew go on, whose tokens lie elsewhere."""
        last = Conversation()
        last.held, last.closed = dict(self.held), self.closed
        setattr(cache, CONVERSATION, last)


class Present(PassState):
    """What a watcher knows of the present pass."""

    __slots__ = ()

    def __init__(self) -> None:
        self.begun = False
        """Whether the whole model has begun it; a call of its `base_model` is then part of it."""
        self.packed = False
        """Whether a row holds several sequences."""
        self.conversation: Conversation | None = None
        """The conversation, if later passes need decisions."""


class Watcher:
    """Sees each pass of a causal language model before it runs.

    Its `base_model` may be called alone, for hidden states, and some models do not call theirs,
    such as OPT. So both are watched. A prompt has to come in one pass, however long it is.
    """

    _hooks: tuple[torch.utils.hooks.RemovableHandle, ...] = ()
    now: Present

    def watch(self, model: nn.Module) -> None:
        """See every pass of this model."""
        self._layers = list(routed_layers(model).values())  # not sought anew for each token
        # bound methods are copied with their object, so a copy of a model has its own watcher
        self._hooks = (
            model.register_forward_pre_hook(self._at_model, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),  # also after an error
        )
        if (base := getattr(model, "base_model", model)) is not model:
            self._hooks += (
                base.register_forward_pre_hook(self._at_base, with_kwargs=True),
                base.register_forward_hook(self._after_base),
            )

    def stop(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self.now = type(self.now)()

    def see(self, seen: PassInput) -> None:
        """Look at a pass before it runs."""

    def follow(self, seen: PassInput) -> Conversation:
        """Return the conversation of a pass, from its cache: a new one if the cache has none."""
        conversation = None
        if seen.goes_on:
            last = None if _holds(seen.cache) else self.now.conversation
            conversation = conversation_of(seen.cache) or last
        if conversation is None:
            conversation = Conversation()
        elif seen.num_before is not None:
            conversation.return_to(seen.num_before)
        self.now.conversation = conversation
        self._keep_in(seen.cache)
        return conversation

    def _keep_in(self, cache: object) -> None:
        conversation = self.now.conversation
        if conversation is None or not _holds(cache):
            return
        if conversation_of(cache) is not conversation:
            setattr(cache, CONVERSATION, conversation)

    def _at_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._before(model, args, kwargs)
        self.now.begun = True
        return args, with_every_token(kwargs)

    def _after(self, _model: nn.Module, _args: object, output: object) -> None:
        self.now.begun = False
        self._after_base(_model, _args, output)

    def _after_base(self, _base: nn.Module, _args: object, output: object) -> None:
        for name in CACHES:  # a model without a cache makes one
            self._keep_in(getattr(output, name, None))

    def _at_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.now.begun:
            self._before(base, args, kwargs)

    def _looks_ahead(self) -> bool:
        """Whether any router decides by whole prompts."""
        return any(layer.looks_ahead for layer in self._layers)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (seen := self.input_of(by_name(model, args, kwargs))) is not None:
            self.see(seen)

    def input_of(self, arguments: Mapping[str, Any]) -> PassInput | None:
        """What a pass with these arguments reads; None if no router decides by whole prompts."""
        if not self._looks_ahead():
            self.now.conversation = None
            return None
        seen = PassInput.of(arguments)
        self.now.packed = seen.packed
        return seen

    def refuse_packed(self) -> None:
        """Refuse a pass whose rows hold several sequences: one would decide for all.

        Raises:
            UnreadPromptError: this is such a pass.
        """
        if self.now.packed:
            raise UnreadPromptError(
                "several sequences lie in one row, as in continuous batching (`generate_batch`), or"
                " where positions begin again or a mask has blocks, and this model decides by whole"
                " prompts, one in a row; pad them instead, or take a model whose gates decide token"
                " by token"
            )


def conversation_of(cache: object) -> Conversation | None:
    """The conversation that a cache holds; None if none of its tokens were read for a decision."""
    return getattr(cache, CONVERSATION, None)


def _holds(cache: object) -> bool:
    """Whether a cache can hold a conversation; where RWKV's list cannot, the last one goes on."""
    return cache is not None and not isinstance(cache, list)


def watcher_of(model: nn.Module) -> Watcher | None:
    """The watcher of a model; None if each token is routed by itself."""
    return getattr(model, WATCHER, None)


def set_watcher(model: PreTrainedModel, watcher: Watcher | None) -> None:
    """Give a model this watcher, in place of the one before."""
    if (before := watcher_of(model)) is not None:
        before.stop()
    setattr(model, WATCHER, watcher)
    vars(model).pop("generate", None)
    if watcher is not None:
        watcher.watch(model)
        vars(model)["generate"] = partial(_generate_whole, model)


def _generate_whole(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Run `generate` of transformers if it does not cut the prompt, which no pass would show.

    Raises:
        UnreadPromptError: it would cut the prompt, and a router has to read it whole.
    """
    arguments = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    configs = arguments.get("generation_config"), model.generation_config
    sizes = [arguments.get("prefill_chunk_size")]
    sizes += [getattr(config, "prefill_chunk_size", None) for config in configs]
    size, length = next(filter(None, sizes), None), _num_unread(arguments)
    layers = routed_layers(model).values()
    if size and length > size and any(layer.looks_ahead for layer in layers):
        raise UnreadPromptError(
            f"prefill_chunk_size={size} cuts a prompt of {length} tokens, and this model decides by"
            " whole prompts; leave it out, or take a model whose gates decide token by token"
        )
    kind: Any = type(model)
    return kind.generate(model, *args, **kwargs)


def _num_unread(arguments: Mapping[str, Any]) -> int:
    """The number of tokens in the arguments of `generate` that are not in the cache."""
    names = "inputs", "input_ids", "inputs_embeds"
    prompt = next((value for name in names if (value := arguments.get(name)) is not None), None)
    length = 0 if prompt is None else prompt.shape[1]
    cache = arguments.get("past_key_values")
    held = 0 if cache is None else int(cache.get_seq_length())
    return length - held if held < length else length


def ends(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """The places in ids [B, L] at which this sequence of tokens ends, [B, L] bool."""
    size, (_, length) = len(tokens), input_ids.shape
    if not 0 < size <= length:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    matches = (input_ids.unfold(1, size, 1) == input_ids.new_tensor(tokens)).all(-1)
    return torch.nn.functional.pad(matches, (size - 1, 0))


def earlier(places: Tensor, size: int) -> Tensor:
    """The first tokens of sequences of `size` tokens that end at these places, [B, L] bool."""
    return places.roll(1 - size, 1)  # no sequence ends at the first `size` - 1 places, which wrap
