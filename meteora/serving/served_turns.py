"""One decision for each turn, where a server computes tokens of many requests in one pass.

    tokens of a pass   request 3 begins, its whole prompt   request 1 goes on   request 2 goes on
    decided by         the question of each turn in it      what was decided for its last turn

`meteora.routing.turns` defines how a question decides. A request of a server begins with its whole
prompt, so no part of that may come from a cache of other requests, or in a later pass.

Before a pass, `see` writes into tensors who decides for which token. What a gate then does is
arithmetic alone, which torch.compile takes into its graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from meteora.routing.passes import PassInput, UnreadPromptError
from meteora.routing.turns import questions

if TYPE_CHECKING:
    from meteora.base.chat_template import Template


class Requests(NamedTuple):
    """The requests of which a pass computes tokens, in the order of these."""

    starts: Sequence[int]
    """[N + 1]: where each one's tokens begin in the pass, and where the last one's end."""
    lengths: Sequence[int]
    """[N]: how many tokens each has, with those of earlier passes."""
    keys: Sequence[int]
    """[N]: a number by which each is known again in later passes."""


class ServedTurns(nn.Module):
    """What the gates of a served model know of the turns in the present pass.

    A turn that decides has a row in the pass: that of its first token there. Only the first T rows
    of the tensors are read in a pass of T tokens.
    """

    row: Tensor
    """[N] long: the row that decides for each token"""
    asked: Tensor
    """[N]: 1 for the tokens of questions, else 0"""
    num_asked: Tensor
    """[N]: how many tokens of a question each row has, or 1"""
    goes_on: Tensor
    """[N] bool: whether what is held decides for a row, and not a question in this pass"""
    slot: Tensor
    """[N] long: where the decision of such a row is held"""
    next_slot: Tensor
    """[N] long: where the decision of a row is to be held; `num_held` where nobody needs it"""

    def __init__(
        self, template: Template, *, num_choices: int, num_held: int, num_tokens: int
    ) -> None:
        """Hold the decisions of the `num_held` requests that were computed last.

        Args:
            num_tokens: N, the most that a pass has
        """
        super().__init__()
        self.template = template
        self.num_choices, self.num_held, self.num_tokens = num_choices, num_held, num_tokens
        for name in ("row", "slot", "next_slot"):
            self._add(name, torch.zeros(num_tokens, dtype=torch.long))
        self._add("goes_on", torch.zeros(num_tokens, dtype=torch.bool))
        for name in ("asked", "num_asked"):
            self._add(name, torch.ones(num_tokens))
        self._slots: OrderedDict[int, int] = OrderedDict()

    def _add(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def tables(self) -> list[Tensor]:
        """All that `see` writes."""
        return [self.row, self.asked, self.num_asked, self.goes_on, self.slot, self.next_slot]

    def at_gate(self) -> ServedTurnChoice:
        """What one gate decides with."""
        return ServedTurnChoice(self)

    def see(self, ids: Tensor, requests: Requests | None) -> None:
        """Look at the tokens [T] of a pass before it runs.

        Args:
            requests: that they belong to; None where a server tries out how much it can hold

        Raises:
            UnreadPromptError: a request goes on of which no beginning was seen.
        """
        # tokens of no request, by which a pass may be filled up, decide for themselves
        torch.arange(len(ids), out=self.row[: len(ids)])
        self.asked.fill_(1)
        self.num_asked.fill_(1)
        self.goes_on.zero_()
        self.next_slot.fill_(self.num_held)
        if requests is None:
            return
        going_on: list[tuple[int, int]] = []
        for (start, end), length, key in zip(
            pairwise(requests.starts), requests.lengths, requests.keys, strict=True
        ):
            if end - start == length:
                self._begin(ids[start:end], start, self._new_slot(key))
            else:
                going_on.append((start, self._slot_of(key, end - start)))
        if going_on:
            rows, slots = torch.tensor(going_on, device=ids.device).T
            self.goes_on[rows] = True
            self.slot[rows] = slots

    def _begin(self, ids: Tensor, start: int, slot: int) -> None:
        """Look at the prompt [L] of one request, which begins at a token of the pass."""
        there = torch.ones_like(ids, dtype=torch.bool)
        turn, asked, _ = questions(PassInput(ids[None], there[None], goes_on=False), self.template)
        turn, own = turn[0], slice(start, start + len(ids))
        turns = torch.arange(int(turn[-1]) + 1, device=ids.device)
        rows = start + torch.searchsorted(turn, turns)
        counts = torch.bincount(turn[asked[0]], minlength=len(turns))
        # a turn without a question has the decision of the turn before it; the first has one
        deciding = torch.where(counts > 0, turns, 0).cummax(0).values
        self.row[own] = rows[deciding][turn]
        self.asked[own] = asked[0].float()
        self.num_asked[rows] = counts.clamp_min(1).float()
        self.next_slot[rows[deciding[-1]]] = slot

    def _new_slot(self, key: int) -> int:
        """Where the decision of a request is held that begins; the least recent one makes room."""
        slot = self._slots.pop(key, None)
        if slot is None:
            full = len(self._slots) == self.num_held
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
        self._slots[key] = slot
        return slot

    def _slot_of(self, key: int, num_tokens: int) -> int:
        """Where the decision of a request is held that goes on with so many tokens."""
        if key not in self._slots or num_tokens > 1:
            raise UnreadPromptError(
                f"a request goes on (tokens: {num_tokens}), and its whole prompt was not read; that"
                " has to be computed in one pass"
            )
        self._slots.move_to_end(key)
        return self._slots[key]


class ServedTurnChoice(nn.Module):
    """What one gate has decided for the requests of a server."""

    held: Tensor
    """[num_held + 1, C] log-probabilities of each request's last turn; nobody reads the last."""

    def __init__(self, turns: ServedTurns) -> None:
        super().__init__()
        self.turns, self.template = turns, turns.template
        held = torch.zeros(turns.num_held + 1, turns.num_choices)
        self.register_buffer("held", held, persistent=False)

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The logits of tokens [T, IN], each those of its turn: [T, C]."""
        turns, count = self.turns, tokens.shape[0]
        row = turns.row[:count]
        own = logits_of(tokens).float().log_softmax(-1)
        sums = torch.zeros_like(own).index_add(0, row, own * turns.asked[:count, None])
        means = sums / turns.num_asked[:count, None]
        held = self.held[turns.slot[:count]]
        decided = torch.where(turns.goes_on[:count, None], held, means)
        self.held[turns.next_slot[:count]] = decided
        return decided[row]
