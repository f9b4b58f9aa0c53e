"""Conversations with a live model: the questions of dialogues, turn by turn, several at once.

The model's own answers stay in the history. A conversation has one cache, and each turn goes on
with it, as on a server. Controls know the right expert of every turn:

    single       each question alone, with its own expert: a history cannot disturb the answer
    oracle       each turn's tokens with its own expert, on one cache; text before a turn, such as
                 a system prompt, belongs to the turn's expert, too
    swap         all tokens with the expert of the present turn, so the history is computed again
                 at each turn, as by a server that holds one adapter at a time
    alora        the history with the base, and the tokens from the turn's question on with its
                 expert, as in activated LoRA (arXiv 2504.12397); the cache is the base's
    one_expert   one expert for all tokens
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
from meteora.routing.passes import Conversation, conversation_of
from pipelines.evaluation.measurements import ALORA, ONE_EXPERT, ORACLE, SINGLE, SWAP
from pipelines.evaluation.oracle_routing import send_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.dialogues import Dialogue


@dataclass(frozen=True)
class Prompt:
    """The input of a model at one turn of one conversation."""

    ids: list[int]
    start: int
    """Number of tokens before the turn's own question."""
    experts: list[str]
    """For a control: the expert of each token. The answer has the expert of the last one."""


class TurnCache:
    """Keys and values of the conversations of a batch, kept from one turn to the next.

    A turn reuses the first tokens of its prompt that are equal to those of the turn before. These
    are the whole history if the template leaves earlier turns unchanged. Their number differs
    within a batch, so they are moved to the right, behind padding. Padding has no position, so
    this changes nothing. A cache that forgets tokens is not kept, such as one with a sliding
    window.

    Routers that look ahead (`opening: prompt`) can use it, too. The tokens that decide for the
    template's opening end before the first answer, so later turns do not change them.
    """

    def __init__(self, num_rows: int) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, [B, heads, L, D]; empty if nothing is kept."""
        self.decided: Conversation | None = None
        """What decides for the last turn, if routers decide by whole turns."""
        self.ids: list[list[int]] = [[] for _ in range(num_rows)]
        """The tokens of each conversation that can be used again."""
        self.slots: list[list[int]] = [[] for _ in range(num_rows)]
        """The index of each of these tokens along L."""

    def take(self, prompts: Sequence[Prompt]) -> tuple[DynamicCache | None, list[int]]:
        """The cache to reuse, and the number of each prompt's tokens in it; None for no cache."""
        reused = [
            len(common_beginning(ids, one.ids[:-1]))
            for ids, one in zip(self.ids, prompts, strict=True)
        ]
        width = max(reused)
        if not self.layers or not width:
            return None, [0] * len(prompts)
        slots = torch.zeros(len(prompts), 1, width, 1, dtype=torch.long)
        for i, n in enumerate(reused):
            slots[i, 0, width - n :, 0] = torch.tensor(self.slots[i][:n], dtype=torch.long)
        cache = DynamicCache()
        for number, pair in enumerate(self.layers):
            keys, values = (one.take_along_dim(slots.to(one.device), dim=2) for one in pair)
            cache.update(keys, values, number)
        if self.decided is not None:
            self.decided.moved_to(cache)
        return cache, reused

    def keep(self, cache: object, ids: list[list[int]], slots: list[list[int]]) -> None:
        """Keep the cache after a turn, unless it forgets tokens.

        Args:
            ids: the tokens of each conversation that may be used again
            slots: the index of each of these tokens along L
        """
        layers = whole_layers(cache)
        if layers is not None:
            self.layers = [
                (cast("Tensor", layer.keys), cast("Tensor", layer.values)) for layer in layers
            ]
            self.ids, self.slots, self.decided = ids, slots, conversation_of(cache)


@dataclass(eq=False)
class Conversing:
    """Runs dialogues with a model: with its own routing, or as a control."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    """The limit of each answer."""
    batch_size: int
    """Conversations at once."""
    control: str = ""
    """`single`, `oracle`, `swap`, `alora` or `one_expert`; empty for the model's own routing."""
    expert: str = ""
    """The expert of `one_expert`."""
    check: Callable[[Sequence[int]], None] = lambda _lengths: None
    """Called with the lengths of prompts, to refuse those that are too long."""
    advance: Callable[[int], None] = lambda _answers: None
    """Called with the number of new answers."""
    _prompt_experts: list[list[str]] | None = field(default=None, init=False)
    """The expert of each token of the next pass, if it reads prompts; [B][L]."""
    _answer_experts: list[str] = field(default_factory=list, init=False)
    """The expert of each sequence in the later passes, with one token each; [B]."""

    def ask(self, dialogues: Sequence[Dialogue]) -> list[list[dict[str, Any]]]:
        """Answer each turn of each dialogue.

        Returns:
            for each turn: `output`; `truncated`, whether it was cut; `prompt_tokens`, with the
            history; `computed_tokens`, the prompt's tokens outside the cache; `new_tokens`;
            `seconds`, a batch's divided by the number of its conversations

        Raises:
            ExamplesError: the chat template refuses the roles, or changes the text of turns.
        """
        answers = []
        routed = send_to(self.model, self._experts) if self.control else nullcontext()
        with routed, torch.inference_mode():
            for start in range(0, len(dialogues), self.batch_size):
                answers += self._ask_batch(dialogues[start : start + self.batch_size])
        return answers

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
        """The next question of a dialogue, after the turns so far."""
        if self.control == SINGLE:
            dialogue, answers = dialogue.alone(len(answers)), ()
        ids, owners = dialogue.with_answers(answers).encode(self.tokenizer)
        if self.tokenizer.eos_token_id is not None:  # it would end the answer, which is still empty
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
        """The expert of every token for `oracle`: the owner of its turn, or of the next turn."""
        experts, following = [], ""
        for owner in reversed(owners):
            following = owner or following
            experts.append(following)
        return experts[::-1]

    def _experts(self, ids: Tensor, _kwargs: dict[str, Any]) -> list[list[str]]:
        if self._prompt_experts is None:
            return [[name] for name in self._answer_experts]
        experts, self._prompt_experts = self._prompt_experts, None
        assert len(experts[0]) == ids.shape[1]  # noqa: S101
        return experts

    def _answer(self, prompts: Sequence[Prompt], cache: TurnCache) -> list[dict[str, Any]]:
        """Answer the prompts of one turn, one a conversation, and keep the cache for the next."""
        started = time.perf_counter()
        past, reused = cache.take(prompts)
        width = max(reused)
        length = width + max(len(one.ids) - n for one, n in zip(prompts, reused, strict=True))
        pad = padding_token(self.tokenizer)
        ids = torch.full((len(prompts), length), pad or 0)
        mask = torch.zeros_like(ids)
        self._prompt_experts, self._answer_experts = [], [one.experts[-1] for one in prompts]
        slots = []
        for i, (one, n) in enumerate(zip(prompts, reused, strict=True)):
            new = len(one.ids) - n
            own = [*range(width - n, width), *range(length - new, length)]
            ids[i, own], mask[i, own] = torch.tensor(one.ids), 1
            slots.append(own)
            padding = [one.experts[-1]] * (length - width - new)
            self._prompt_experts.append(padding + one.experts[n:])
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
        for one, own, (answer, ended) in zip(prompts, slots, answers, strict=True):
            # the last token of a cut answer never went into the model
            in_cache = answer if ended else answer[:-1]
            own.extend(range(length, length + len(in_cache)))
            known.append((one.ids + in_cache)[: self._reusable(one, len(in_cache))])
        if not rotates_by_length(self.model.config.get_text_config()):
            cache.keep(out.past_key_values, known, slots)
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
            for one, n, (answer, ended) in zip(prompts, reused, answers, strict=True)
        ]

    def _reusable(self, prompt: Prompt, num_answered: int) -> int:
        """The number of tokens so far that a later turn may take from the cache."""
        if self.control in {SINGLE, SWAP}:
            return 0
        return prompt.start if self.control == ALORA else len(prompt.ids) + num_answered

    @staticmethod
    def _until_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens of an answer before its end token, and whether it has one."""
        end = next((t for t, token in enumerate(ids) if token in ends), None)
        return (ids, False) if end is None else (ids[:end], True)
