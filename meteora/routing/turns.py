"""Decide once for each turn of a conversation: its question decides for it and for its answer.

    l_turn = the mean of log softmax(G x + c) over the tokens x of the turn's question

at each gate, with the gate's own inputs. A question is the text between a header of the chat
template and its closing, or the beginning of the closing that ends all questions. A turn begins
with its header. Text before the first header, such as a system prompt, belongs to the first turn.
So a token's route depends on later tokens, up to the end of its question: this is not causal.
Without a chat template the whole first pass is a question.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from meteora.base.chat_template import HEADER, Template
from meteora.routing.passes import (
    Conversation,
    PassInput,
    Present,
    UnreadPromptError,
    Watcher,
    earlier,
    ends,
    require_ids,
)


class Questions(NamedTuple):
    """The turns of a pass [B, L], and the tokens that decide for them."""

    turn: Tensor
    """[B, L] long: the number of each token's turn. If a cache holds earlier tokens, turn 0 is its
    last turn."""
    asked: Tensor
    """[B, L] bool: the tokens of questions."""
    closed: Tensor
    """[B] bool: whether the question of the last turn has ended, in this pass or before."""


def questions(
    seen: PassInput, template: Template, previously_closed: Tensor | None = None
) -> Questions:
    """Find the turns of a pass, and the question of each; it may have none.

    Args:
        previously_closed: [B], `closed` of the pass that this one continues
    """
    ids, is_token = seen.ids, seen.is_token
    none = torch.zeros_like(is_token)
    closed = none.any(1)
    # if later questions have no header, only a closing shows them
    if seen.goes_on and template.header:
        held = each_row(previously_closed, len(is_token))
        closed = closed if held is None else held.to(is_token.device)
    short = seen.goes_on and is_token.shape[1] < len(template.question_end)  # a token of an answer
    if ids is None or not template.question_end or short:
        return Questions(none.long(), none if seen.goes_on else is_token, closed)
    begun_by = template.header or template.opening[-HEADER:]  # an older checkpoint has no header
    header, closing = (ends(ids, tokens) & is_token for tokens in (begun_by, template.question_end))
    begins = earlier(header, len(begun_by))
    closes = earlier(closing, len(template.question_end))
    turn = begins.cumsum(1)
    behind = (header.cumsum(1) == turn) & ~header  # no token of a header
    # the number of closings that have begun in the token's own turn
    num_closed = closes.cumsum(1)
    before = torch.where(begins, num_closed - closes.long(), 0).cummax(1).values
    asked = is_token & behind & (num_closed == before)
    begun = turn > 0
    if seen.goes_on:
        # a pass may begin inside an answer or a question: it is a question only if that ends here
        # and had not ended before, since the draft of an answer may repeat the prompt's closing
        asked &= begun | ((closes & ~begun).any(1) & ~closed).unsqueeze(1)
    else:
        asked &= begun | ~begun.any(1, keepdim=True)
        turn = (turn - 1).clamp_min(0)
        first = turn == 0  # a first turn without a question is decided by all of its tokens
        asked |= is_token & first & ~(asked & first).any(1, keepdim=True)
    closed = (closing & (turn == turn[:, -1:])).any(1) | closed & ~begun.any(1)
    return Questions(turn, asked, closed)


def ask(conversation: Conversation, seen: PassInput, template: Template) -> Questions:
    """The questions of a pass; the conversation notes where its last turn begins.

    Raises:
        UnreadPromptError: the cache was cut inside a question; or the pass has embeddings, and a
            template shows where a question lies.
    """
    if template.question_end:
        require_ids(seen)
    found = questions(seen, template, conversation.closed)
    is_short = seen.goes_on and seen.is_token.shape[1] < len(template.question_end)
    if seen.num_before is not None and not is_short:
        is_last = found.turn == found.turn.amax(1, keepdim=True)
        begun = is_last if not seen.goes_on else is_last & (found.turn > 0)
        begun = torch.where(begun.any(1, keepdim=True), begun, found.asked)
        if bool(begun.any()):
            first, end = int(begun.long().argmax(1).max()), 0
            if template.question_end and bool(found.closed.any()):  # else drafts may be part of it
                own = (found.asked & is_last & found.closed[:, None]).long()
                end = int((own * torch.arange(1, own.shape[1] + 1, device=own.device)).max())
            conversation.begin(seen.num_before + first, seen.num_before + end)
    conversation.closed = found.closed
    return found


def unread(num_rows: int, held: Tensor | None) -> UnreadPromptError:
    """The error where sequences go on whose beginnings have no decisions, or those of others."""
    return UnreadPromptError(
        f"{num_rows} sequences go on, and the beginnings of {0 if held is None else len(held)} were"
        " read on this cache (none, if it was cropped to before a prompt's last question); start"
        " with whole prompts, or go on with the cache that read them, or with its `copy.deepcopy`"
    )


def each_row(held: Tensor | None, num_rows: int) -> Tensor | None:
    """Repeat the values of B sequences for each row of a pass: a sequence may have several beams.

    None if the rows do not belong to these sequences.
    """
    if held is None or num_rows % len(held):
        return None
    return held.repeat_interleave(num_rows // len(held), 0)


class _Turns(Present):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.questions: Questions | None = None
        self.goes_on = self.any_asks = self.all_ask = False
        """Whether the pass has earlier tokens in its cache; whether any sequence has a question in
        it, and whether all have."""


class Turns(Watcher):
    """The turns of the present pass; all gates of a model share one object."""

    def __init__(self, template: Template) -> None:
        self.template, self.now = template, _Turns()
        self._num_gates = 0

    def at_gate(self) -> "TurnChoice":
        """The rule of one more gate."""
        self._num_gates += 1
        return TurnChoice(self, self._num_gates)

    def see(self, seen: PassInput) -> None:
        """Look at a pass before it runs."""
        conversation, now = self.follow(seen), self.now
        now.questions = ask(conversation, seen, self.template)
        asks = now.questions.asked.any(1)
        now.goes_on, now.any_asks = seen.goes_on, bool(asks.any())
        now.all_ask = bool((asks | ~seen.is_token.any(1)).all())  # a row of a batch may be empty


class TurnChoice:
    """The decisions of one gate for the sequences of a batch.

    The conversation keeps the log-probabilities [B, C] of each sequence's last turn.
    """

    def __init__(self, turns: Turns, number: int) -> None:
        """Take the turns of the model, and the number of this gate."""
        self.turns, self.template, self.number = turns, turns.template, number

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The log-probabilities [T, C] of tokens [T, IN]: for each token those of its turn.

        Raises:
            UnreadPromptError: no pass of so many tokens was seen, it continues sequences that were
                not read, or its rows hold several sequences.
        """
        self.turns.refuse_packed()
        now = self.turns.now
        present, conversation = now.questions, now.conversation
        if present is None or conversation is None or present.turn.numel() != len(tokens):
            raise UnreadPromptError(
                f"{len(tokens)} tokens are to be routed by their turns, and a pass of"
                f" {0 if present is None else present.turn.numel()} was seen; call the whole model"
            )
        num_rows, length = present.turn.shape
        held = conversation.held.get(self.number)
        before = each_row(held, num_rows) if now.goes_on else None
        if before is None and not now.all_ask:
            raise unread(num_rows, held)
        if before is not None and not now.any_asks:
            return before.repeat_interleave(length, 0)
        own = logits_of(tokens)
        wide = torch.promote_types(own.dtype, torch.float32)  # a model may have 16 bits
        own = own.log_softmax(-1, dtype=wide).view(num_rows, length, -1)  # [B, L, C]
        turn, asked = present.turn.to(own.device), present.asked.to(own.device)
        logits, last = decide_turns(own, turn, asked, before)
        conversation.held[self.number] = last.detach()
        return logits.flatten(0, 1)


def decide_turns(
    own: Tensor, turn: Tensor, asked: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mean of log-probabilities [B, L, C] over the question of each turn.

    A turn without a question has the decision of the turn before it.

    Args:
        before: [B, C] of the turn before; None: the first turn with a question decides

    Returns:
        the mean of each token's turn [B, L, C], and that of the last turn [B, C]
    """
    size = num_rows, num_turns = len(own), int(turn.max()) + 1
    counted = asked.to(own.dtype)
    # rows of [B · S, C]: a quarter of the time of single numbers, if there are many choices
    rows = (turn + num_turns * torch.arange(num_rows, device=turn.device)[:, None]).flatten()
    counts = own.new_zeros(num_rows * num_turns).index_add(0, rows, counted.flatten()).view(size)
    shares = (own * counted.unsqueeze(-1)).flatten(0, 1)
    sums = own.new_zeros(num_rows * num_turns, own.shape[-1]).index_add(0, rows, shares)
    sums = sums.view(*size, -1)
    means, asks = sums / counts.clamp_min(1).unsqueeze(-1), counts > 0
    if before is None:
        before = means[torch.arange(len(own), device=own.device), asks.long().argmax(1)]
    by_turn = [before]
    for s in range(size[1]):
        by_turn.append(means[:, s].where(asks[:, s, None], by_turn[-1]))
    decided = torch.stack(by_turn[1:], 1)  # [B, S, C]
    return decided.flatten(0, 1).index_select(0, rows).view_as(own), by_turn[-1]
