"""Sums over the tokens at an input point, and the within-class covariance that follows from them.

There are two forms. `Scatter` is the definition and keeps second moments [IN, IN]. `RowScatter`
keeps tokens [T, IN] and solves the same equations with matrices [T, T]. The caller takes the form
with the smaller matrix, so that a point with 14,336 inputs and few tokens is cheap.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Self

import torch
from torch import Tensor

from meteora.kernels import onednn

COLUMNS = 1024
"""Columns of float32 rows that are converted to float64 at a time."""
BLOCK = 512
"""Rows or columns of a symmetric matrix that are computed at a time, from the diagonal on."""
ITERATIONS = 3
"""Steps of subspace iteration. Few suffice, since the variances fall off quickly."""


class Covariance(ABC):
    """A within-class covariance, in a form in which it can be inverted."""

    level: Tensor
    """The mean of its diagonal, a scalar."""
    num_inputs: int
    """IN"""

    @abstractmethod
    def solve(self, targets: Tensor, shrinkage: float) -> Tensor | None:
        """The product of targets [N, IN], float64, with the inverse of the shrunk covariance.

        Semantics:
            targets ((1 - shrinkage) S_within + shrinkage · level · I)⁻¹

        Returns:
            [N, IN]; None if the covariance, after rounding, has no Cholesky factor.
        """

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """The product of x [N, IN], float64, with S_within, to the precision of float32."""

    def widest(self, num_rows: int, least: float = 0.0) -> tuple[Tensor, float]:
        """The directions of largest variance, as rows C with S_within ≈ Cᵀ C + floor · I.

        By subspace iteration from a fixed start (Halko et al. 2011), so that equal tokens give
        equal bytes. The floor is the mean variance of all other directions.

        Args:
            num_rows: how many directions are kept at most
            least: only directions of more variance than this are kept

        Returns:
            C [≤ num_rows, IN] in float64, and the floor.
        """
        num_inputs = self.num_inputs
        basis = _random_rows(min(num_rows + 8, num_inputs), num_inputs, self.level.device)
        for _ in range(ITERATIONS):
            basis = _orthonormal(self.times(basis))
        spread, inside = torch.linalg.eigh(basis @ self.times(basis).T)  # ascending
        num_rows = max(1, min(num_rows, int((spread > least).sum())))
        spread, inside = spread.flip(0)[:num_rows], inside.T.flip(0)[:num_rows]
        others = max(1, num_inputs - len(spread))
        floor = ((self.level * num_inputs - spread.sum()) / others).clamp_min(0)
        return (spread - floor).clamp_min(0).sqrt()[:, None] * (inside @ basis), floor.item()


@dataclass(frozen=True)
class Sums(ABC):
    """Weighted sums over tokens of one input point, relative to `shift`, in float64."""

    mass: Tensor
    """[E] the total weight of each expert's tokens"""
    sums: Tensor
    """[E, IN] Σ weight · x of each expert's tokens"""
    shift: Tensor
    """[IN] subtracted from every x, so that a large common mean costs no digits"""

    @classmethod
    def empty(cls, num_experts: int, shift: Tensor, **further: Tensor) -> Self:
        """Sums over no tokens; `shift` is [IN]."""
        return cls(
            mass=shift.new_zeros(num_experts, dtype=torch.float64),
            sums=shift.new_zeros(num_experts, len(shift), dtype=torch.float64),
            shift=shift,
            **further,
        )

    @property
    def means(self) -> Tensor:
        """[E, IN] of each expert's tokens, relative to the shift."""
        return self.sums / self.mass[:, None]

    @abstractmethod
    def add(
        self, x: Tensor, labels: Tensor, weights: Tensor, stands_for: Tensor | None = None
    ) -> None:
        """Add tokens, in place.

        Args:
            x: [T, IN] float32
            labels: [T] experts
            weights: [T]
            stands_for: [T], from `sample`: how many tokens each one stands for. The form that keeps
                tokens keeps those above 0. None: it keeps all.
        """

    def _add_up(self, labels: Tensor, weights: Tensor, weighted: Tensor) -> None:
        add_by_label(self.mass, labels, weights.double())
        add_by_label(self.sums, labels, weighted.double())

    def __add__(self, other: Self) -> Self:
        """The sums over the tokens of both; they must have the same shift."""
        names = [one.name for one in fields(self) if one.name != "shift"]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})

    @abstractmethod
    def covariance(self) -> Covariance:
        """The shared within-class covariance."""


@dataclass(frozen=True)
class Scatter(Sums):
    """Second moments: memory does not grow with the number of tokens."""

    moment: Tensor
    """[IN, IN] Σ weight · x xᵀ over all tokens; only the upper triangle is valid"""

    @classmethod
    def empty(cls, num_experts: int, shift: Tensor, **further: Tensor) -> Self:
        moment = shift.new_zeros(len(shift), len(shift), dtype=torch.float64)
        return super().empty(num_experts, shift, moment=moment, **further)

    def add(
        self,
        x: Tensor,
        labels: Tensor,
        weights: Tensor,
        stands_for: Tensor | None = None,  # noqa: ARG002  (the moment is over all tokens)
    ) -> None:
        x = x - self.shift
        weighted = x * weights[:, None]
        self._add_up(labels, weights, weighted)
        # products in float32, sums over batches in float64: fast, and exact enough
        for start in range(0, len(self.moment), BLOCK):
            rows = slice(start, start + BLOCK)
            others = weighted[:, start:].contiguous()
            self.moment[rows, start:] += onednn.linear(x[:, rows].T, others.T)

    @property
    def within(self) -> Tensor:
        """[IN, IN] the shared within-class covariance."""
        between = (self.sums.T / self.mass) @ self.sums
        moment = self.moment.triu() + self.moment.triu(1).T
        return (moment - between) / self.mass.sum()

    def covariance(self) -> Covariance:
        return _Moments(self.within)


class _Moments(Covariance):
    """The covariance as a matrix [IN, IN]."""

    def __init__(self, within: Tensor) -> None:
        self.within = within
        self.num_inputs = len(within)
        self.level = _positive(within.diagonal().mean())

    def solve(self, targets: Tensor, shrinkage: float) -> Tensor | None:
        shrunk = self.within * (1 - shrinkage)
        shrunk.diagonal().add_(shrinkage * self.level)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        return None if failed else torch.cholesky_solve(targets.T, factor).T

    @cached_property
    def _narrow(self) -> Tensor:
        """In float32, for products that are rounded anyway."""
        return self.within.float()

    def times(self, x: Tensor) -> Tensor:
        return onednn.linear(x.float(), self._narrow).double()


@dataclass(frozen=True)
class RowScatter(Sums):
    """Tokens, or a sample of them, for the covariance; the means are those of all tokens."""

    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(x [T, IN] less the shift, labels [T], weights [T]) of the tokens that are kept"""

    def add(
        self, x: Tensor, labels: Tensor, weights: Tensor, stands_for: Tensor | None = None
    ) -> None:
        x = x - self.shift
        self._add_up(labels, weights, x * weights[:, None])
        if stands_for is not None:
            kept = stands_for > 0
            x, labels, weights = x[kept], labels[kept], (weights * stands_for)[kept]
        self.parts.append((x, labels, weights))

    def covariance(self) -> Covariance:
        means, total = self.means.float(), self.mass.sum()
        centred = [
            (x - means[labels]).mul_((weights / total).sqrt().float()[:, None])
            for x, labels, weights in self.parts
        ]
        return Rows(torch.cat(centred))


class Rows(Covariance):
    """S_within = Cᵀ C + floor · I from rows C [T, IN]: exact, by Woodbury's identity.

    With a = s · level + (1 - s) · floor and K = C Cᵀ, which is [T, T]:

        ((1 - s) Cᵀ C + a I)⁻¹ = (I - (1 - s) Cᵀ ((1 - s) K + a I)⁻¹ C) / a
    """

    def __init__(self, rows: Tensor, floor: float = 0.0) -> None:
        self.rows = rows
        self.floor = floor
        self.num_inputs = rows.shape[1]
        # float64, because the difference above nearly cancels
        self.gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
        for _, wide in self._blocks():  # its lower triangle, which is all that Cholesky reads
            for start in range(0, len(rows), BLOCK):
                columns = slice(start, start + BLOCK)
                self.gram[start:, columns].addmm_(wide[start:], wide[columns].T)
        self.level = _positive(self.gram.diagonal().sum() / rows.shape[1] + floor)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of `COLUMNS` columns, and the rows there in float64."""
        for start in range(0, self.rows.shape[1], COLUMNS):
            part = slice(start, start + COLUMNS)
            yield part, self.rows[:, part].double()

    def solve(self, targets: Tensor, shrinkage: float) -> Tensor | None:
        kept = 1 - shrinkage
        ridge = shrinkage * self.level + kept * self.floor
        shrunk = self.gram * kept
        shrunk.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if failed:
            return None
        inner = targets.new_zeros(len(self.rows), len(targets))  # C targetsᵀ
        for part, wide in self._blocks():
            inner.addmm_(wide, targets[:, part].T)
        inner = torch.cholesky_solve(inner, factor).T * kept
        solved = torch.empty_like(targets)
        for part, wide in self._blocks():
            solved[:, part] = (targets[:, part] - inner @ wide) / ridge
        return solved

    def times(self, x: Tensor) -> Tensor:
        inner = x.new_zeros(len(x), len(self.rows))
        for part, wide in self._blocks():
            inner.addmm_(x[:, part], wide.T)
        return torch.cat([inner @ wide for _, wide in self._blocks()], dim=1) + self.floor * x


@lru_cache(maxsize=4)
def _random_rows(num_rows: int, num_inputs: int, device: torch.device) -> Tensor:
    """The same rows [N, IN] for all points of these sizes; drawing them for each takes longer."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(
        num_rows, num_inputs, generator=generator, device=device, dtype=torch.float64
    )


def add_by_label(sums: Tensor, labels: Tensor, rows: Tensor, *, index: bool | None = None) -> None:
    """Add each row to the sum of its label, in place, and always in the same order.

    On a GPU `index_add_` adds in an order that varies, so that equal inputs do not give equal
    bytes; a product with one-hot labels does.

    Args:
        sums: [E] or [E, IN], of rows [T] or [T, IN] with labels [T]
        index: whether to use `index_add_`; None: on a CPU only
    """
    if index or (index is None and not sums.is_cuda):
        sums.index_add_(0, labels, rows)
    else:
        sums += torch.nn.functional.one_hot(labels, len(sums)).to(rows).T @ rows


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows [N, IN] that span the same space; float64.

    By two Cholesky factorisations (Yamamoto et al. 2015). Householder QR takes many small steps; on
    busy processors its threads wait for each other, and it took fifty times as long.
    """
    basis = rows
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(basis @ basis.T)
        if failed:
            return torch.linalg.qr(rows.T).Q.T
        basis = torch.linalg.solve_triangular(factor, basis, upper=False)
    return basis


def _positive(level: Tensor) -> Tensor:
    """The level, or the smallest positive float32 if inputs never vary, since it is a divisor."""
    return level.clamp_min(torch.finfo(torch.float32).tiny)
