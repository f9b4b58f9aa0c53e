"""Compute logits from the weights of experts without examples, for which no gate can be fitted.

Without examples the tokens of an expert are not known, but its weights show which directions of a
token it changes. So `Arrow` or `Norm` scores it, and the score is compared with its mean m and
standard deviation s on the tokens of the other experts:

    logit_u = max over the gates' logits + (score_u - m_u) / s_u - t

The threshold t is such that only `SHARE_TAKEN` of the others' held-out tokens go to such an expert.
An expert that lacks the layer is never chosen there, unless `top_k` is more than the number of
those that have it.
"""

from typing import Self

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import Arrow, Norm, Router

NEVER = -1e4
"""Far below any other logit, and finite: rules that decide by whole questions multiply it by 0."""
SHARE_TAKEN = 0.01
"""The share of the other experts' held-out tokens that goes to experts without examples."""
KINDS = {"arrow": Arrow, "norm": Norm}
"""The routers that score experts by their weights."""


class StandIn(nn.Module):
    """Computes the logits of the experts without examples, at one layer."""

    standard: Tensor
    """[3, U] mean, standard deviation and threshold of the scores"""
    without: Tensor
    """[U] the choices without examples; int64"""
    fitted: Tensor
    """[C - U] the others"""

    def __init__(self, score: Router, experts: list[int], standard: Tensor) -> None:
        """Take a scorer and the scale of its scores.

        Args:
            score: scores tokens [T, IN], as [T, C]
            experts: the numbers of the U experts without examples
            standard: [3, U] mean, standard deviation and threshold
        """
        super().__init__()
        self.score = score
        self.experts = experts
        self.register_buffer("standard", standard.float(), persistent=False)
        lacking = set(experts)
        with torch.inference_mode(mode=False):  # gates may be trained later
            without = torch.tensor(experts, device=standard.device)
            fitted = [c for c in range(score.num_choices) if c not in lacking]
            self.register_buffer("without", without, persistent=False)
            self.register_buffer("fitted", without.new_tensor(fitted), persistent=False)

    @classmethod
    def scaled(
        cls, options: RouterOptions, layer: RoutedExperts, experts: list[int], tokens: Tensor
    ) -> Self:
        """Make one for some experts of a layer, scaled on tokens [T, IN] of the other experts."""
        score = scorer(options, layer).to(tokens.device)
        scores = score(tokens)[:, experts].float()
        mean, deviation = scores.mean(0), scores.std(0, correction=min(1, len(scores) - 1))
        largest = ((scores - mean) / deviation.clamp_min(1e-12)).max(-1).values
        # at least one deviation above the mean, whatever the tokens are
        threshold = largest.quantile(1 - SHARE_TAKEN).clamp_min(1.0).expand(len(experts))
        return cls(score, experts, torch.stack([mean, deviation, threshold]))

    def above_best(self, tokens: Tensor) -> Tensor:
        """(score - m) / s - t of the experts without examples, [T, U].

        It is how far their logits lie above the best fitted one; negative: below it.
        """
        mean, deviation, threshold = self.standard
        above_mean = (self.score(tokens)[:, self.without] - mean) / deviation.clamp_min(1e-12)
        return torch.where(deviation > 0, above_mean - threshold, NEVER)

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The logits [T, C] of a gate, with the columns of the experts without examples filled."""
        best = logits[:, self.fitted].max(-1, keepdim=True).values
        filled = logits.clone()
        filled[:, self.without] = best + self.above_best(tokens).to(best.dtype)
        return filled


def scorer(options: RouterOptions, layer: RoutedExperts) -> Router:
    """The scorer of a layer's experts that `options.stand_in` names: `arrow` or `norm`.

    Raises:
        MeteoraError: it names another.
    """
    if options.stand_in not in KINDS:
        raise MeteoraError(
            f"{options.stand_in!r} cannot stand in for examples; choose one of {', '.join(KINDS)}"
        )
    return KINDS[options.stand_in](layer.stack, options)
