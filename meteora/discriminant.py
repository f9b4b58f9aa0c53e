"""Linear discriminant analysis from sufficient statistics: the closed form of a gate.

With class means mu_e and the shared within-class covariance S of an input point,

    G = S⁻¹ mu        c = -½ muᵀ S⁻¹ mu        S = (1 - s) S_within + s · mean(diag S_within) · I

is the best linear gate where classes are normal with one covariance; s, the shrinkage, is chosen on
sequences that were held out. Counts, sums and second moments are all that is kept of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)


class SingularError(MeteoraError):
    """No gate can be computed from these moments."""


@dataclass(frozen=True)
class Scatter:
    """Weighted sums over tokens of one input point, relative to `shift`, in float64."""

    mass: Tensor
    """[E] the total weight of each expert's tokens"""
    sums: Tensor
    """[E, IN]"""
    moment: Tensor
    """[IN, IN] Σ weight · x xᵀ over all tokens"""
    shift: Tensor
    """[IN] taken off every x, so that a large common mean costs no digits"""

    @classmethod
    def empty(cls, num_experts: int, shift: Tensor) -> Self:
        num_inputs = len(shift)
        return cls(
            mass=shift.new_zeros(num_experts, dtype=torch.float64),
            sums=shift.new_zeros(num_experts, num_inputs, dtype=torch.float64),
            moment=shift.new_zeros(num_inputs, num_inputs, dtype=torch.float64),
            shift=shift,
        )

    def add(self, x: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Take in tokens x [T, IN] float32 of experts labels [T] with weights [T]."""
        x = x - self.shift
        weighted = x * weights[:, None]
        self.mass.index_add_(0, labels, weights.double())
        self.sums.index_add_(0, labels, weighted.double())
        # products in float32, their sums over batches in float64: fast, and exact enough
        self.moment.add_(x.T @ weighted)

    def __add__(self, other: Scatter) -> Scatter:
        """Both together; they must have the same shift."""
        return Scatter(
            self.mass + other.mass, self.sums + other.sums, self.moment + other.moment, self.shift
        )

    @property
    def means(self) -> Tensor:
        """[E, IN], relative to the shift."""
        return self.sums / self.mass[:, None]

    @property
    def within(self) -> Tensor:
        """[IN, IN] the shared within-class covariance."""
        between = (self.sums.T / self.mass) @ self.sums
        return (self.moment - between) / self.mass.sum()


def gate_from(scatter: Scatter, shrinkage: float) -> tuple[Tensor, Tensor]:
    """G [E, IN] and c [E] in float32 for one shrinkage in (0, 1], or the next that can be solved.

    Raises:
        SingularError: the moments hold NaN or infinity.
    """
    within = scatter.within
    for larger in (shrinkage, *(s for s in (*SHRINKAGES, 1.0) if s > shrinkage)):
        if (gate := _solve(within, scatter, larger)) is not None:
            return gate
    raise SingularError("the inputs of this point hold NaN or infinity, or numbers beyond float32")


def _solve(within: Tensor, scatter: Scatter, shrinkage: float) -> tuple[Tensor, Tensor] | None:
    """The gate; None where rounding has left the covariance without a Cholesky factor."""
    level = within.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    shrunk = within * (1 - shrinkage)
    shrunk.diagonal().add_(shrinkage * level)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if failed:
        return None
    weight = torch.cholesky_solve(scatter.means.T, factor).T  # [E, IN]
    bias = -0.5 * (weight * scatter.means).sum(-1) - weight @ scatter.shift.double()
    return weight.float(), bias.float()


def choose_shrinkage(
    scatter: Scatter,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    candidates: Sequence[float] = SHRINKAGES,
) -> tuple[float, float]:
    """The shrinkage whose gate is right most often on held-out tokens; the larger one where equal.

    Args:
        scatter: of the other sequences
        x: [T, IN] held-out tokens
        labels: [T]
        weights: [T]

    Returns:
        the shrinkage, and its weighted accuracy
    """
    within = scatter.within
    best, best_accuracy = candidates[-1], -1.0
    for shrinkage in sorted(candidates, reverse=True):
        if (gate := _solve(within, scatter, shrinkage)) is None:
            continue
        weight, bias = gate
        right = (x @ weight.T + bias).argmax(-1) == labels
        accuracy = ((right * weights).sum() / weights.sum()).item()
        if accuracy > best_accuracy:
            best, best_accuracy = shrinkage, accuracy
    return best, best_accuracy
