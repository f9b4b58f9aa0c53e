"""What a forward pass of a model is called with, as far as routes depend on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError
from meteora.routing.layer import routed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnreadPromptError(MeteoraError, RuntimeError):
    """Tokens are to be routed, and no prompt of theirs was read."""


@dataclass(frozen=True)
class PassInput:
    """The tokens of a pass, and whether others came before them."""

    ids: Tensor | None
    """[B, L]; None where only embeddings are known."""
    there: Tensor
    """[B, L] bool: the tokens that are no padding."""
    goes_on: bool
    """Whether a cache holds what precedes."""
    cache: object = None
    """That cache, or one that is empty yet; None where the pass is given none."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Read the arguments of a causal language model's `forward`, as `by_name` gives them."""
        ids = given.get("input_ids")
        states = ids if ids is not None else given["inputs_embeds"]
        past, state = given.get("past_key_values"), given.get("cache_params")
        num_before = None if past is None else int(past.get_seq_length())
        there = _there(given.get("attention_mask"), states, num_before)
        goes_on = bool(num_before) if state is None else _holds_a_state(state, states.shape[1])
        return cls(ids, there, goes_on, past if state is None else state)


def _holds_a_state(cache: Any, length: int) -> bool:  # noqa: ANN401  (of many kinds)
    """Whether tokens came before a pass of a state-space model, whose cache has no length."""
    asked = getattr(cache, "has_previous_state", None)
    return length == 1 if asked is None else asked(0)  # xLSTM's does not tell


def _there(mask: object, states: Tensor, num_before: int | None) -> Tensor:
    """Which tokens of a pass a mask of any form leaves there, [B, L] bool.

    Args:
        num_before: tokens in the cache of keys; None where there is no such cache
    """
    num_rows, length = states.shape[:2]
    if isinstance(mask, dict):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not (isinstance(mask, Tensor) and mask.dim() in {2, 4} and mask.shape[-1] >= length):
        return torch.ones(num_rows, length, dtype=torch.bool, device=states.device)
    # a static cache has room behind the keys of this pass, and a window has lost some before them
    last = mask.shape[-1] - length
    first = last if num_before is None else min(num_before, last)
    if mask.dim() == 2:
        return mask[:, first : first + length].bool()
    # [B, heads, L, keys], true or 0.0 where a token sees a key; one that is there sees itself
    sees = mask == 0 if mask.is_floating_point() else mask.bool()
    own = sees[:, 0].expand(num_rows, length, -1).diagonal(first, 1, 2)
    return own[:, :length]


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's `forward`, each by its name."""
    names = inspect.signature(model.forward).parameters if args else ()
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def cache_name(model: nn.Module) -> str:
    """The argument of a model's `forward` that takes a cache; its output has it by that name."""
    takes = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in takes else "past_key_values"  # Mamba's, and others'


WATCHER = "meteora_watcher"
"""The attribute of a model that holds what watches it."""
CONVERSATION = "meteora_conversation"
"""The attribute of a cache that holds what was decided for the sequences in it."""


class Conversation:
    """What was decided for B sequences that a cache holds, for the passes that go on with them.

    It lies in the cache, and is copied and forgotten with it: two caches may be used in turn.
    """

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        """[B, C] of each gate, by its number."""
        self.closed: Tensor | None = None
        """[B] bool: see `turns.Questions`"""


class Watcher:
    """Sees each pass of a causal language model before it runs.

    Its `base_model` may be called alone, for hidden states. Some models do not call theirs, such as
    OPT: so both are watched.
    """

    reads_whole = False
    """Whether a prompt has to come in one pass, however long it is."""
    _hooks: tuple[torch.utils.hooks.RemovableHandle, ...] = ()
    _seen = False
    """Whether the whole model has begun a pass; the call of its `base_model` then belongs to it."""
    _packed = False
    """Whether a row of the present pass holds several sequences."""
    conversation: Conversation | None = None
    """Of the present pass, where decisions hold for later ones."""

    def watch(self, model: nn.Module) -> None:
        """See every pass of this model."""
        # a bound method is copied and pickled with its object: a copy of a model has its own
        self._hooks = (
            model.register_forward_pre_hook(self._at_model, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),  # also after an error
        )
        if (base := getattr(model, "base_model", model)) is not model:
            self._hooks += (base.register_forward_pre_hook(self._at_base, with_kwargs=True),)

    def stop(self) -> None:
        """See no more."""
        for hook in self._hooks:
            hook.remove()
        self.conversation = None

    def see(self, seen: PassInput) -> None:
        """Look at a pass before it runs."""

    def follow(self, seen: PassInput) -> Conversation:
        """Turn to the conversation of a pass, by its cache; to the last one where that has none."""
        last = getattr(seen.cache, CONVERSATION, self.conversation) if seen.goes_on else None
        self.conversation = found = last or Conversation()
        self._keep_in(seen.cache)
        return found

    def _keep_in(self, cache: object) -> None:
        if cache is None or self.conversation is None:
            return
        if getattr(cache, CONVERSATION, None) is not self.conversation:
            setattr(cache, CONVERSATION, self.conversation)

    def _at_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before(model, args, kwargs)
        self._seen = True

    def _after(self, _model: nn.Module, _args: object, output: object) -> None:
        self._seen = False
        for name in ("past_key_values", "cache_params"):  # a model makes one where it is given none
            self._keep_in(getattr(output, name, None))

    def _at_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._seen:
            self._before(base, args, kwargs)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.see(PassInput.of(self.given(model, args, kwargs)))

    def given(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of the present pass, by name."""
        given = by_name(model, args, kwargs)
        self._packed = given.get("cu_seq_lens_q") is not None  # where each sequence begins
        return given

    def refuse_packed(self) -> None:
        """Refuse a pass whose rows hold several sequences: each would decide for all.

        Raises:
            UnreadPromptError: this is such a pass.
        """
        if self._packed:
            raise UnreadPromptError(
                "several sequences lie in one row, as in continuous batching (`generate_batch`),"
                " and this model decides by whole prompts, one in a row; call `generate` with"
                " padded prompts, or take a model whose gates decide token by token"
            )


def watcher_of(model: nn.Module) -> Watcher | None:
    """What sees the passes of a model for its routers; None where each token decides for itself."""
    return getattr(model, WATCHER, None)


def set_watcher(model: PreTrainedModel, watcher: Watcher | None) -> None:
    """Have a model watched by this one, in place of what watched it for the routers before."""
    if (before := watcher_of(model)) is not None:
        before.stop()
    if watcher is not None:
        watcher.watch(model)
    setattr(model, WATCHER, watcher)  # beside the modules: it belongs to the routers
    vars(model).pop("generate", None)
    if watcher is not None and watcher.reads_whole:
        name = "generate"
        setattr(model, name, partial(_generate_whole, model))


def _generate_whole(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Run `generate` of transformers if it does not cut the prompt: no pass would show that.

    Raises:
        UnreadPromptError: it would cut it, and a router is to read it whole.
    """
    given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    configs = given.get("generation_config"), model.generation_config
    sizes = [given.get("prefill_chunk_size")]
    sizes += [getattr(config, "prefill_chunk_size", None) for config in configs]
    size, length = next(filter(None, sizes), None), _num_unread(given)
    routers = [layer.router for layer in routed_layers(model).values()]
    if size and length > size and any(router and not router.is_causal for router in routers):
        raise UnreadPromptError(
            f"prefill_chunk_size={size} cuts a prompt of {length} tokens, and this model decides by"
            " whole prompts; leave it out, or take a model whose gates decide token by token"
        )
    kind: Any = type(model)
    return kind.generate(model, *args, **kwargs)


def _num_unread(given: Mapping[str, Any]) -> int:
    """How many tokens the arguments of `generate` have that no cache holds."""
    names = "inputs", "input_ids", "inputs_embeds"
    prompt = next((found for name in names if (found := given.get(name)) is not None), None)
    length = 0 if prompt is None else prompt.shape[1]
    cache = given.get("past_key_values")
    held = 0 if cache is None else int(cache.get_seq_length())
    return length - held if held < length else length


def ends(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where these tokens end in ids [B, L], [B, L] bool."""
    size, (_, length) = len(tokens), input_ids.shape
    if not 0 < size <= length:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    found = (input_ids.unfold(1, size, 1) == input_ids.new_tensor(tokens)).all(-1)
    return torch.nn.functional.pad(found, (size - 1, 0))


def earlier(places: Tensor, size: int) -> Tensor:
    """Where sequences of `size` tokens begin that end at these places, [B, L] bool."""
    return places.roll(1 - size, 1)  # none ends at the first `size` - 1 places, which wrap around
