"""Logits from an expert's weights, where there are no examples to fit its gate to.

Without examples it is not known what the tokens of an expert look like, but its weights show on
which directions of a token it acts. So `Arrow` or `Norm` scores it, and the score is compared with
its mean m and standard deviation s on the tokens of the other experts:

    logit_u = max over the gates' logits + (score_u - m_u) / s_u - t

The threshold t is such that only a hundredth of the others' held-out tokens go to such an expert
(`meteora.fitting.lda.GIVEN_UP`). An expert that lacks the layer is never chosen there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from meteora.artifacts import MeteoraError
from meteora.routing.routers import Arrow, Gate, Norm

if TYPE_CHECKING:
    from torch import Tensor

    from meteora.artifacts import RouterOptions
    from meteora.routing.layer import RoutedExperts
    from meteora.routing.routers import ByQuestion, Decision, Router

KINDS = {"arrow": Arrow, "norm": Norm}
"""The routers that know an expert by its weights."""


class StandIn(nn.Module):
    """The logits of the experts without examples, at one layer."""

    standard: Tensor

    def __init__(self, score: Router, experts: list[int], standard: Tensor) -> None:
        """Take how to score all experts, which of them have no examples, and their standard.

        Args:
            score: gives [T, E]
            experts: the U without examples
            standard: [3, U] mean, standard deviation and threshold
        """
        super().__init__()
        self.score = score
        self.experts = experts
        self.register_buffer("standard", standard.float(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(score - m) / s - t of the experts without examples, [T, U]."""
        mean, deviation, threshold = self.standard
        apart = (self.score(tokens)[:, self.experts] - mean) / deviation.clamp_min(1e-12)
        return torch.where(deviation > 0, apart, 0.0) - threshold


class MixedGate(Gate):
    """A gate whose rows for experts without examples come from their weights."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        options: RouterOptions,
        stand_in: StandIn,
        *,
        by_question: ByQuestion | None = None,
        decision: Decision | None = None,
    ) -> None:
        super().__init__(weight, bias, options, by_question=by_question, decision=decision)
        self.stand_in = stand_in

    def logits(self, tokens: Tensor) -> Tensor:
        found = super().logits(tokens)
        fitted = [e for e in range(self.num_choices) if e not in self.stand_in.experts]
        best = found[:, fitted].max(-1, keepdim=True).values
        found = found.clone()
        found[:, self.stand_in.experts] = best + self.stand_in(tokens).to(best.dtype)
        return found


def scorer(options: RouterOptions, layer: RoutedExperts) -> Router:
    """What scores the experts of a layer, as `stand_in` names it: `arrow` or `norm`."""
    if options.stand_in not in KINDS:
        raise MeteoraError(
            f"{options.stand_in!r} cannot stand in for examples; choose one of {', '.join(KINDS)}"
        )
    return KINDS[options.stand_in](layer.stack, options)
