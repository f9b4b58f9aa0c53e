"""Which tokens of a forward pass open a prompt, and how the prompt routes them.

A chat template puts the same tokens in front of every prompt. A causal router cannot see the task
in them, yet an adapter may depend on its own changes to them more than on any others. But a prefill
sees the whole prompt: at every layer the opening takes the experts that the first tokens of the
prompt itself point to, at that very layer. Tokens that are generated later change nothing about it,
so that generation with a cache equals generation without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora.routing.passes import PassInput, Watcher, earlier, ends

if TYPE_CHECKING:
    from meteora.base.chat_template import Template

WINDOW = 64
"""Tokens after the opening that decide for it: the first task of a prompt with several."""


class PromptOpening(Watcher):
    """What the present forward pass holds of a prompt's opening; shared by all gates of a model."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.opening: Tensor | None = None
        """[B, L] bool; None where the pass holds no opening."""
        self.evidence: Tensor | None = None
        """[B, L] bool: the tokens that decide for it."""

    def at_gate(self) -> PromptOpening:
        """What one gate decides with: all gates of a model share it."""
        return self

    def see(self, seen: PassInput) -> None:
        """Look at a pass before it runs; one that goes on opens nothing."""
        template, input_ids, there = self.template, seen.ids, seen.there
        self.clear()
        # one token is never an opening: decoding pays no more than this question
        if input_ids is None or there.shape[1] < 2 or seen.goes_on or not template.opening:
            return
        place = there.cumsum(1) - 1  # [B, L] counted from the first token that is there
        expected = input_ids.new_tensor(template.opening)
        size = len(expected)
        same = (input_ids == expected[place.clamp(0, size - 1)]) & (place < size)
        opening = (same | ~there).long().cumprod(1).bool() & there
        start = opening.sum(1, keepdim=True)  # [B, 1]
        evidence = there & (place >= start) & (place < start + WINDOW)
        end = template.question_end
        closing = earlier(ends(input_ids, end), len(end))
        evidence &= (closing & (place >= start)).cumsum(1) == 0
        self.opening, self.evidence = opening & evidence.any(1, keepdim=True), evidence

    def clear(self) -> None:
        self.opening = self.evidence = None

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Logits [T, C]; the opening's are replaced by the evidence's summed log-likelihoods.

        Raises:
            UnreadPromptError: rows of the pass hold several sequences.
        """
        self.refuse_packed()
        opening, evidence, logits = self.opening, self.evidence, logits_of(tokens)
        if opening is None or evidence is None or opening.numel() != len(logits):
            return logits
        opening, evidence = opening.to(logits.device), evidence.to(logits.device)
        own = logits.log_softmax(-1).unflatten(0, opening.shape)  # [B, L, C]
        pooled = (own * evidence.unsqueeze(-1)).sum(1, keepdim=True)  # [B, 1, C]
        return torch.where(opening.unsqueeze(-1), pooled, own).flatten(0, 1)

    def stop(self) -> None:
        super().stop()
        self.clear()
