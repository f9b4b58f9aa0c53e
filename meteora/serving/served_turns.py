"""One decision for each turn, where a server computes tokens of many requests in one pass.

    tokens of a pass   request 3 begins, its whole prompt   request 1 goes on   request 2 goes on
    decided by         the question of each turn in it      what was decided for its last turn

`meteora.routing.turns` defines how a question decides. A request of a server begins with its whole
prompt, so no part of that may come from a cache of other requests, or in a later pass.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from meteora.routing.passes import PassInput
from meteora.routing.turns import UnreadPromptError, decide_turns, questions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from meteora.base.chat_template import Template
    from meteora.routing.turns import Questions


class Requests(NamedTuple):
    """The requests of which a pass computes tokens, in the order of these."""

    starts: Sequence[int]
    """[N + 1]: where each one's tokens begin in the pass, and where the last one's end."""
    lengths: Sequence[int]
    """[N]: how many tokens each has, with those of earlier passes."""
    keys: Sequence[int]
    """[N]: a number by which each is known again in later passes."""


class Begun(NamedTuple):
    """The requests that begin in a pass, as a batch [M, L] filled up at the right."""

    slots: Tensor
    """[M] long: where each one's decision is held."""
    tokens: Tensor
    """[number of their tokens] long: the places of these in the pass."""
    there: Tensor
    """[M, L] bool: the tokens of the batch that are no filling."""
    questions: Questions


class SeenPass(NamedTuple):
    """Who decides for the tokens of a pass."""

    slots: Tensor
    """[T] long: where the decision of each token's request is held."""
    begun: Begun | None


class ServedTurns:
    """What the gates of a served model know of the turns in the present pass."""

    def __init__(self, template: Template, num_held: int) -> None:
        """Hold the decisions of the `num_held` requests that were computed last."""
        self.template = template
        self.num_held = num_held
        self.found: SeenPass | None = None
        self._slots: OrderedDict[int, int] = OrderedDict()

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
        self.found = None if requests is None else self._find(ids, requests)

    def _find(self, ids: Tensor, requests: Requests) -> SeenPass:
        counts = [end - start for start, end in pairwise(requests.starts)]
        begins = [n == length for n, length in zip(counts, requests.lengths, strict=True)]
        found = [
            self._new_slot(key) if new else self._slot_of(key, count)
            for key, new, count in zip(requests.keys, begins, counts, strict=True)
        ]
        slots, begun, sizes = (
            torch.tensor(row, device=ids.device) for row in (found, begins, counts)
        )
        of_tokens = slots.repeat_interleave(sizes)
        # a pass may be filled up with tokens of nobody
        of_tokens = torch.nn.functional.pad(of_tokens, (0, len(ids) - len(of_tokens)))
        if not any(begins):
            return SeenPass(of_tokens, None)
        rows = zip(ids[: requests.starts[-1]].split(counts), begins, strict=True)
        batch = pad_sequence([row for row, begins_here in rows if begins_here], batch_first=True)
        there = torch.arange(batch.shape[1], device=ids.device) < sizes[begun].unsqueeze(1)
        asked = questions(PassInput(batch, there, goes_on=False), self.template)
        places = begun.repeat_interleave(sizes).nonzero().squeeze(1)
        return SeenPass(of_tokens, Begun(slots[begun], places, there, asked))

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


class ServedTurnChoice:
    """What one gate has decided for the requests of a server."""

    def __init__(self, turns: ServedTurns) -> None:
        self.turns, self.template = turns, turns.template
        self.held = torch.empty(0)
        """[num_held, C] log-probabilities of each request's last turn; empty before the first."""

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The logits of tokens [T, IN], each those of its turn: [T, C]."""
        found = self.turns.found
        if found is None:
            return logits_of(tokens)
        if (begun := found.begun) is None:
            return self.held[found.slots]
        own = logits_of(tokens[begun.tokens]).log_softmax(-1)
        rows = own.new_zeros(*begun.there.shape, own.shape[-1])  # [M, L, C]
        rows[begun.there] = own
        turn, asked, _ = begun.questions
        decided, last = decide_turns(rows, turn, asked, None)
        if not len(self.held):
            self.held = own.new_zeros(self.turns.num_held, own.shape[-1])
        self.held[begun.slots] = last
        logits = self.held[found.slots]
        logits[begun.tokens] = decided[begun.there]
        return logits
