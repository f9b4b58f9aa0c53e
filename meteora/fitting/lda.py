"""Linear discriminant analysis from sufficient statistics: the closed form of a gate.

With class means mu_e and the shared within-class covariance S of an input point,

    G = S⁻¹ mu        c = -½ muᵀ S⁻¹ mu        S = (1 - s) S_within + s · mean(diag S_within) · I

is the best linear gate if classes are normally distributed with one covariance. s, the shrinkage,
is chosen on held-out sequences. A `scatter` holds the sums over tokens from which mu and S follow.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meteora.artifacts import MeteoraError
from meteora.fitting.covariance import Covariance, Sums

SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
"""The candidates, in ascending order."""
ENOUGH_WORSE = 2
"""After so many in a row that are worse, larger candidates are not tried."""
SHARE_LOST_TO_BASE = 0.01
"""The share of the experts' own tokens that may go to the base, so that foreign text goes there."""

TOO_LARGE = 1e18
"""A gate with larger numbers may have logits that are not finite in float32."""


class SingularError(MeteoraError):
    """No gate can be computed from these sums."""


def gate_from(scatter: Sums, shrinkage: float) -> tuple[Tensor, Tensor]:
    """G [E, IN] and c [E] in float32, for a shrinkage in (0, 1] or the next that can be solved.

    Raises:
        SingularError: the sums hold NaN or infinity, or tokens of an expert are all alike.
    """
    covariance = scatter.covariance()
    for larger in (shrinkage, *(s for s in (*SHRINKAGES, 1.0) if s > shrinkage)):
        if (gate := solve_gate(covariance, scatter.means, scatter.shift, larger)) is not None:
            return gate
    if covariance.level <= torch.finfo(torch.float32).tiny:  # false for NaN
        raise SingularError(
            "the tokens of this point do not vary within any expert; give examples that differ"
        )
    raise SingularError("the inputs of this point hold NaN or infinity, or numbers beyond float32")


def solve_gate(
    covariance: Covariance, means: Tensor, shift: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor] | None:
    """G [E, IN] and c [E] for one shrinkage, in float32.

    Args:
        means: [E, IN] of the experts' tokens in float64, with the shift subtracted
        shift: [IN]

    Returns:
        None if the covariance, after rounding, has no Cholesky factor, or the gate is `TOO_LARGE`.
    """
    weight = covariance.solve(means, shrinkage)  # [E, IN]
    if weight is None:
        return None
    bias = -0.5 * (weight * means).sum(-1) - weight @ shift.double()
    gate = weight.float(), bias.float()
    return gate if all(part.abs().max() < TOO_LARGE for part in gate) else None  # NaN is not


class Chosen(NamedTuple):
    """The best of `SHRINKAGES`; the largest one if none of them can be solved."""

    shrinkage: float
    accuracy: float
    """Weighted, in [0, 1]"""
    gate: tuple[Tensor, Tensor]
    """G [E, IN] and c [E]"""


def choose_shrinkage(scatter: Sums, accuracy_of: Callable[[Tensor, Tensor], float]) -> Chosen:
    """The shrinkage with the best accuracy on held-out tokens; the larger of neighbours that tie.

    From the smallest on, until `ENOUGH_WORSE` in a row are worse than the best.

    Args:
        scatter: of the sequences that are not held out
        accuracy_of: of a gate G, c, the weighted share of held-out tokens that go to their expert

    Raises:
        SingularError: as `gate_from`.
    """
    covariance = scatter.covariance()
    best: Chosen | None = None
    num_worse = 0
    for shrinkage in SHRINKAGES:
        if (gate := solve_gate(covariance, scatter.means, scatter.shift, shrinkage)) is None:
            continue
        accuracy = accuracy_of(*gate)
        if best is None or accuracy >= best.accuracy:
            best, num_worse = Chosen(shrinkage, accuracy, gate), 0
        elif (num_worse := num_worse + 1) == ENOUGH_WORSE:
            break
    if best is None:
        gate = gate_from(scatter, SHRINKAGES[-1])
        best = Chosen(SHRINKAGES[-1], accuracy_of(*gate), gate)
    return best


def bias_for_base(unseen: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A bonus for the logit of the last choice, the base, in nats; never negative.

    Examples can cover the experts' tasks, but never all foreign text. So tokens that do not clearly
    belong to an expert go to the base, even `SHARE_LOST_TO_BASE` of the experts' own held-out ones.

    Args:
        unseen: logits [T, E] and labels [T] of tokens that the gate was not fitted to, in parts
    """
    own = torch.cat([logits[labels != logits.shape[1] - 1] for logits, labels in unseen])
    ahead = own[:, :-1].max(1).values - own[:, -1]
    return max(0.0, ahead.float().quantile(SHARE_LOST_TO_BASE).item())
