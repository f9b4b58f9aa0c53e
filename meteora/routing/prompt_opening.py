"""Route the opening of a prompt, the tokens of its chat template, by the prompt itself.

A chat template puts the same tokens before every prompt. A causal router cannot see the task in
them, but an adapter may depend on its own changes to them more than on any others. A prefill sees
the whole prompt: at every layer, the first tokens of the prompt itself decide for the opening, too.
Tokens that are generated later do not count, so generation with a cache equals generation without.
Only a template that closes a prompt shows where they begin: without one, an answer that follows a
prompt of fewer than `WINDOW` tokens counts if there is no cache.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from meteora.base.chat_template import Template
from meteora.routing.passes import PassInput, Present, Watcher, earlier, ends, require_ids

WINDOW = 64
"""Tokens after the opening that decide for it: the first task of a prompt with several."""


class _Opening(Present):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.opening: Tensor | None = None
        """[B, L] bool; None if the pass holds no opening."""
        self.evidence: Tensor | None = None
        """[B, L] bool: the tokens that decide for the opening."""


class PromptOpening(Watcher):
    """The opening of the prompt in the present pass; all gates of a model share one object."""

    def __init__(self, template: Template) -> None:
        """Take a template that has an opening."""
        self.template, self.now = template, _Opening()

    def at_gate(self) -> Self:
        """The rule of one gate: the same object for all gates of a model."""
        return self

    def see(self, seen: PassInput) -> None:
        """Look at a pass before it runs; a pass with earlier tokens in its cache has no opening."""
        require_ids(seen)
        template, input_ids, is_token = self.template, seen.ids, seen.is_token
        self.now.opening = self.now.evidence = None
        # one token is never an opening, so decoding ends here
        if input_ids is None or is_token.shape[1] < 2 or seen.goes_on:
            return
        place = is_token.cumsum(1) - 1  # [B, L] counted from the first token that is no padding
        expected = input_ids.new_tensor(template.opening)
        size = len(expected)
        same = (input_ids == expected[place.clamp(0, size - 1)]) & (place < size)
        opening = (same | ~is_token).long().cumprod(1).bool() & is_token
        start = opening.sum(1, keepdim=True)  # [B, 1]
        evidence = is_token & (place >= start) & (place < start + WINDOW)
        end = template.question_end
        closing = earlier(ends(input_ids, end), len(end))
        evidence &= (closing & (place >= start)).cumsum(1) == 0
        self.now.opening, self.now.evidence = opening & evidence.any(1, keepdim=True), evidence

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Log-probabilities [T, C]; at the opening, their sums over the evidence.

        A pass without an opening gives the logits themselves.

        Raises:
            UnreadPromptError: rows of the pass hold several sequences.
        """
        self.refuse_packed()
        opening, evidence, logits = self.now.opening, self.now.evidence, logits_of(tokens)
        if opening is None or evidence is None or opening.numel() != len(logits):
            return logits
        opening, evidence = opening.to(logits.device), evidence.to(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)  # sums in 16 bits have equals
        own = logits.log_softmax(-1, dtype=wide).unflatten(0, opening.shape)  # [B, L, C]
        pooled = (own * evidence.unsqueeze(-1)).sum(1, keepdim=True)  # [B, 1, C]
        return torch.where(opening.unsqueeze(-1), pooled, own).flatten(0, 1)
