"""Decide once for each turn, in a server that computes tokens of many requests in one pass.

    tokens of a pass   request 3 begins, its whole prompt   request 1 goes on   request 2 goes on
    decided by         the question of each turn in it      the stored decision of its last turn

`meteora.routing.turns` defines how a question decides. A request begins with its whole prompt, so
no part of it may come from a cache of other requests, or in a later pass.

Before a pass, `see` writes into tensors which tokens decide for which. The gate itself is then only
arithmetic, which torch.compile takes into its graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meteora.base.chat_template import Template
from meteora.routing.passes import PassInput, UnreadPromptError
from meteora.routing.turns import questions


class Requests(NamedTuple):
    """The N requests of a pass, in the order of their tokens."""

    starts: Sequence[int]
    """[N + 1]: the first token of each request in the pass, and the end of the last request."""
    lengths: Sequence[int]
    """[N]: the number of tokens of each request, with those of earlier passes."""
    keys: Sequence[int]
    """[N]: a number that identifies each request in later passes."""


class ServedTurns(nn.Module):
    """The turns in the present pass of a served model; all gates share one object.

    A turn that decides has a row in the pass: that of its first token there. Only the first T rows
    of the tensors are read in a pass of T tokens.
    """

    row: Tensor
    """[N] long: the row that decides for each token"""
    asked: Tensor
    """[N]: 1 for the tokens of questions, else 0"""
    num_asked: Tensor
    """[N]: the number of question tokens of each row, at least 1"""
    goes_on: Tensor
    """[N] bool: whether a stored decision decides for a row, and not a question in this pass"""
    slot: Tensor
    """[N] long: the slot of the stored decision of such a row"""
    next_slot: Tensor
    """[N] long: the slot in which to store a row's decision; `num_held` if it is not needed"""

    def __init__(
        self, template: Template, *, num_choices: int, num_held: int, num_tokens: int
    ) -> None:
        """Store the decisions of the `num_held` requests that were computed last.

        Args:
            num_tokens: N, the most tokens of a pass
        """
        super().__init__()
        self.template = template
        self.num_choices, self.num_held, self.num_tokens = num_choices, num_held, num_tokens
        for name in ("row", "slot", "next_slot"):
            self._add(name, torch.zeros(num_tokens, dtype=torch.long))
        self._add("goes_on", torch.zeros(num_tokens, dtype=torch.bool))
        for name in ("asked", "num_asked"):
            self._add(name, torch.ones(num_tokens, dtype=torch.float32))
        self._slots: OrderedDict[int, int] = OrderedDict()

    def _add(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def tables(self) -> list[Tensor]:
        """All tensors that `see` writes."""
        return list(self.buffers(recurse=False))

    def at_gate(self) -> "ServedTurnChoice":
        """The rule of one gate."""
        return ServedTurnChoice(self)

    def see(self, ids: Tensor, requests: Requests | None) -> None:
        """Look at the tokens [T] of a pass before it runs.

        Args:
            requests: of these tokens; None in a trial pass, with which a server measures memory

        Raises:
            UnreadPromptError: a request goes on whose beginning was not seen.
        """
        # a pass may be filled up with tokens of no request, which decide for themselves
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
        """A slot for the decision of a new request; the least recently used one is reused."""
        slot = self._slots.pop(key, None)
        if slot is None:
            full = len(self._slots) == self.num_held
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
        self._slots[key] = slot
        return slot

    def _slot_of(self, key: int, num_tokens: int) -> int:
        """The slot with the decision of a request that goes on with so many tokens."""
        if key not in self._slots or num_tokens > 1:
            raise UnreadPromptError(
                f"a request goes on (tokens: {num_tokens}), and its whole prompt was not read; that"
                " has to be computed in one pass"
            )
        self._slots.move_to_end(key)
        return self._slots[key]


class ServedTurnChoice(nn.Module):
    """The decisions of one gate for the requests of a server."""

    held: Tensor
    """[num_held + 1, C] log-probabilities of each request's last turn; the last row is not read."""

    def __init__(self, turns: ServedTurns) -> None:
        super().__init__()
        self.turns, self.template = turns, turns.template
        held = torch.zeros(turns.num_held + 1, turns.num_choices)
        self.register_buffer("held", held, persistent=False)

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The log-probabilities [T, C] of tokens [T, IN]: for each token those of its turn."""
        turns, count = self.turns, tokens.shape[0]
        row = turns.row[:count]
        own = logits_of(tokens).float().log_softmax(-1)
        sums = torch.zeros_like(own).index_add(0, row, own * turns.asked[:count, None])
        means = sums / turns.num_asked[:count, None]
        held = self.held[turns.slot[:count]]
        decided = torch.where(turns.goes_on[:count, None], held, means)
        self.held[turns.next_slot[:count]] = decided
        return decided[row]
