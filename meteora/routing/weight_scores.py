"""Logits from an expert's weights, where there are no examples to fit its gate to.

Without examples it is not known what the tokens of an expert look like, but its weights show on
which directions of a token it acts. So `Arrow` or `Norm` scores it, and the score is compared with
its mean m and standard deviation s on the tokens of the other experts:

    logit_u = max over the gates' logits + (score_u - m_u) / s_u - t

The threshold t is such that only a hundredth of the others' held-out tokens go to such an expert
(`meteora.fitting.lda.GIVEN_UP`). An expert that lacks the layer is never chosen there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.routing.routers import Arrow, Norm, Router

if TYPE_CHECKING:
    from meteora.routing.layer import RoutedExperts

KINDS = {"arrow": Arrow, "norm": Norm}
"""The routers that know an expert by its weights."""


class StandIn(nn.Module):
    """Gives the logits of the experts without examples, at one layer."""

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

    @classmethod
    def scaled(
        cls,
        options: RouterOptions,
        layer: RoutedExperts,
        experts: list[int],
        tokens: Tensor,
        given_up: float,
    ) -> Self:
        """For some experts of a layer, scaled on tokens [T, IN] of the other experts.

        Args:
            given_up: the share of these tokens that goes to the experts without examples
        """
        score = scorer(options, layer).to(tokens.device)
        found = score(tokens)[:, experts].float()
        mean, deviation = found.mean(0), found.std(0)
        standing_out = ((found - mean) / deviation.clamp_min(1e-12)).max(-1).values
        # at least one deviation above the mean, whatever the tokens are
        threshold = standing_out.quantile(1 - given_up).clamp_min(1.0).expand(len(experts))
        return cls(score, experts, torch.stack([mean, deviation, threshold]))

    def apart(self, tokens: Tensor) -> Tensor:
        """(score - m) / s - t of the experts without examples, [T, U]."""
        mean, deviation, threshold = self.standard
        apart = (self.score(tokens)[:, self.experts] - mean) / deviation.clamp_min(1e-12)
        return torch.where(deviation > 0, apart, 0.0) - threshold

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logits [T, C] of a gate, with those of the experts without examples in their columns."""
        fitted = [c for c in range(logits.shape[1]) if c not in self.experts]
        best = logits[:, fitted].max(-1, keepdim=True).values
        found = logits.clone()
        found[:, self.experts] = best + self.apart(tokens).to(best.dtype)
        return found


def scorer(options: RouterOptions, layer: RoutedExperts) -> Router:
    """What scores the experts of a layer, as `stand_in` names it: `arrow` or `norm`."""
    if options.stand_in not in KINDS:
        raise MeteoraError(
            f"{options.stand_in!r} cannot stand in for examples; choose one of {', '.join(KINDS)}"
        )
    return KINDS[options.stand_in](layer.stack, options)
