"""Conversations with a live model: the questions of dialogues, turn by turn, several at once.

The model's own answers stay in the history. A conversation has one cache, and each turn goes on
with it, as on a server. Controls know the right expert of every turn:

    single       each question alone, with its own expert: nothing is lost to a history
    oracle       each turn's tokens with its own expert, on one cache; what stands in front
                 of a turn, such as a system prompt, has the turn's expert, too
    swap         everything with the expert of the present turn, so that the history is computed
                 again at each turn: this is how one adapter at a time is served
    alora        the base computes the history, and the turn's expert what comes from its question
                 on, as with activated LoRA (arXiv 2504.12397); the cache holds the base's history
    one_expert   one expert for everything
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from meteora.artifacts import NULL
from meteora.base.chat_template import common_beginning
from meteora.base.padding import padding_token
from meteora.base.placement import input_device
from meteora.model.generate import end_tokens, generate_ids
from meteora.model.shared_prefix import rotates_by_length, whole_layers
from pipelines.evaluation.measurements import ALORA, ONE_EXPERT, ORACLE, SINGLE, SWAP
from pipelines.evaluation.oracle_routing import send_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.dialogues import Dialogue


@dataclass(frozen=True)
class Prompt:
    """What a model gets at one turn of one conversation."""

    ids: list[int]
    start: int
    """Number of tokens before the turn's own question."""
    experts: list[str]
    """For a control: the expert of each token. The answer has that of the last one."""


class TurnCache:
    """Keys and values of the conversations of a batch, kept from one turn to the next.

    A turn may go on with the tokens that its prompt has in common with the turn before. That is the
    whole history if the template leaves earlier turns as they were. The numbers of tokens differ
    within a batch, so the kept ones are moved together, with the padding in front of them. Padding
    has no position, so this changes nothing. A cache that forgets tokens is not kept, such as one
    with a sliding window.

    Routers that look ahead (`opening: prompt`) can go on with it, too. The tokens that decide for
    the template's opening end where the first answer begins, so later turns do not change them.
    """

    def __init__(self, num_rows: int) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, [B, heads, L, D]; empty where nothing is kept."""
        self.ids: list[list[int]] = [[] for _ in range(num_rows)]
        """The tokens of each conversation that can be used again."""
        self.slots: list[list[int]] = [[] for _ in range(num_rows)]
        """The places of these tokens, in L."""

    def take(self, prompts: Sequence[Prompt]) -> tuple[DynamicCache | None, list[int]]:
        """The cache to go on with, and how many tokens of each prompt are in it."""
        kept = [
            len(common_beginning(ids, one.ids[:-1]))
            for ids, one in zip(self.ids, prompts, strict=True)
        ]
        width = max(kept)
        if not self.layers or not width:
            return None, [0] * len(prompts)
        slots = torch.zeros(len(prompts), 1, width, 1, dtype=torch.long)
        for i, n in enumerate(kept):
            slots[i, 0, width - n :, 0] = torch.tensor(self.slots[i][:n], dtype=torch.long)
        cache = DynamicCache()
        for number, pair in enumerate(self.layers):
            keys, values = (one.take_along_dim(slots.to(one.device), dim=2) for one in pair)
            cache.update(keys, values, number)
        return cache, kept

    def keep(self, cache: object, ids: list[list[int]], slots: list[list[int]]) -> None:
        """Keep the cache after a turn; nothing is kept of one that forgets tokens.

        Args:
            ids: the tokens of each conversation that may be used again
            slots: their places in the cache
        """
        layers = whole_layers(cache)
        if layers is not None:
            self.layers = [
                (cast("Tensor", layer.keys), cast("Tensor", layer.values)) for layer in layers
            ]
            self.ids, self.slots = ids, slots


@dataclass(eq=False)
class Conversing:
    """Asks a model dialogues, as it is or as a control."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    """Of each answer."""
    batch_size: int
    """Conversations at once."""
    control: str = ""
    """`single`, `oracle`, `swap`, `alora` or `one_expert`; empty for the model's own routing."""
    expert: str = ""
    """The one of `one_expert`."""
    check: Callable[[Sequence[int]], None] = lambda _lengths: None
    """Called with the lengths of prompts, to refuse those that are too long."""
    advance: Callable[[int], None] = lambda _answers: None
    """Called with the number of answers that were just given."""
    _next: list[list[str]] | None = field(default=None, init=False)
    """The experts of the tokens of the next pass, where it reads prompts."""
    _then: list[str] = field(default_factory=list, init=False)
    """The expert of each sequence in the passes after it, which have one token each."""

    def ask(self, dialogues: Sequence[Dialogue]) -> list[list[dict[str, Any]]]:
        """What is answered at each turn of each dialogue, and what it takes.

        Returns:
            for each turn: `output`; `truncated`, whether it was cut; `prompt_tokens`, with the
            history; `computed_tokens`, those of the prompt that no cache had; `new_tokens`;
            `seconds`, a batch's divided by the number of its conversations

        Raises:
            ExamplesError: the chat template does not take the roles, or changes what the turns say.
        """
        found = []
        routed = send_to(self.model, self.control, self._experts) if self.control else nullcontext()
        with routed, torch.inference_mode():
            for start in range(0, len(dialogues), self.batch_size):
                found += self._ask_batch(dialogues[start : start + self.batch_size])
        return found

    def _ask_batch(self, dialogues: Sequence[Dialogue]) -> list[list[dict[str, Any]]]:
        turns: list[list[dict[str, Any]]] = [[] for _ in dialogues]
        cache = TurnCache(len(dialogues))
        for _ in dialogues[0].questions:
            prompts = [
                self._prompt(dialogue, [turn["output"] for turn in own])
                for dialogue, own in zip(dialogues, turns, strict=True)
            ]
            self.check([len(one.ids) for one in prompts])
            for own, turn in zip(turns, self._answer(prompts, cache), strict=True):
                own.append(turn)
            self.advance(len(dialogues))
        return turns

    def _prompt(self, dialogue: Dialogue, answers: Sequence[str]) -> Prompt:
        """The next question of a dialogue, behind what was said so far."""
        if self.control == SINGLE:
            dialogue, answers = dialogue.alone(len(answers)), ()
        ids, owners = dialogue.with_answers(answers).encode(self.tokenizer)
        if self.tokenizer.eos_token_id is not None:  # of the answer, which is to come
            ids, owners = ids[:-1], owners[:-1]
        own = str(owners[-1])
        start = max((t + 1 for t, owner in enumerate(owners) if owner is None), default=0)
        if self.control == ONE_EXPERT:
            own = self.expert
        elif self.control == ALORA:
            return Prompt(ids, start, [NULL] * start + [own] * (len(ids) - start))
        elif self.control == ORACLE:
            return Prompt(ids, start, self._by_turn(owners))
        return Prompt(ids, start, [own] * len(ids))

    @staticmethod
    def _by_turn(owners: Sequence[str | None]) -> list[str]:
        """The expert of every token by its turn; see `oracle` above."""
        experts, following = [], ""
        for owner in reversed(owners):
            following = owner or following
            experts.append(following)
        return experts[::-1]

    def _experts(self, ids: Tensor, _kwargs: dict[str, Any]) -> list[list[str]]:
        if self._next is None:
            return [[name] for name in self._then]
        experts, self._next = self._next, None
        assert len(experts[0]) == ids.shape[1]  # noqa: S101
        return experts

    def _answer(self, prompts: Sequence[Prompt], cache: TurnCache) -> list[dict[str, Any]]:
        """Answer the prompts of one turn, one a conversation, and keep the cache for the next."""
        started = time.perf_counter()
        past, kept = cache.take(prompts)
        width = max(kept)
        length = width + max(len(one.ids) - n for one, n in zip(prompts, kept, strict=True))
        pad = padding_token(self.tokenizer)
        ids = torch.full((len(prompts), length), pad or 0)
        mask = torch.zeros_like(ids)
        self._next, self._then = [], [one.experts[-1] for one in prompts]
        places = []
        for i, (one, n) in enumerate(zip(prompts, kept, strict=True)):
            new = len(one.ids) - n
            own = [*range(width - n, width), *range(length - new, length)]
            ids[i, own], mask[i, own] = torch.tensor(one.ids), 1
            places.append(own)
            padding = [one.experts[-1]] * (length - width - new)
            self._next.append(padding + one.experts[n:])
        ends = end_tokens(self.model, self.tokenizer)
        out = generate_ids(
            self.model,
            self.tokenizer,
            ids.to(input_device(self.model)),
            self.max_new_tokens,
            attention_mask=mask.to(input_device(self.model)),
            past_key_values=past,
            return_dict_in_generate=True,
        )
        answers = [self._until_end(row, ends) for row in out.sequences[:, length:].tolist()]
        known = []
        for one, own, (answer, ended) in zip(prompts, places, answers, strict=True):
            # without the last token where the answer was cut: it never went into the model
            said = answer if ended else answer[:-1]
            own.extend(range(length, length + len(said)))
            known.append((one.ids + said)[: self._reusable(one, len(said))])
        if not rotates_by_length(self.model.config.get_text_config()):
            cache.keep(out.past_key_values, known, places)
        spent = (time.perf_counter() - started) / len(prompts)
        return [
            {
                "output": str(self.tokenizer.decode(answer, skip_special_tokens=True)),
                "truncated": not ended,
                "prompt_tokens": len(one.ids),
                "computed_tokens": len(one.ids) - n,
                "new_tokens": len(answer) + ended,
                "seconds": spent,
            }
            for one, n, (answer, ended) in zip(prompts, kept, answers, strict=True)
        ]

    def _reusable(self, prompt: Prompt, num_said: int) -> int:
        """How many of the tokens so far a later turn may take from the cache."""
        if self.control in {SINGLE, SWAP}:
            return 0
        return prompt.start if self.control == ALORA else len(prompt.ids) + num_said

    @staticmethod
    def _until_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
        """An answer without its end and what follows, and whether it has an end."""
        end = next((t for t, token in enumerate(ids) if token in ends), None)
        return (ids, False) if end is None else (ids[:end], True)
