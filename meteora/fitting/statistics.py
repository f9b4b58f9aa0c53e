"""What is kept of an input point's tokens once its gate is fitted: enough to fit it again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from meteora.fitting.covariance import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from meteora.fitting.covariance import Covariance, Sums

MAX_DIRECTIONS = 256
"""Directions of the spread that are kept of a point at most. Together they may outweigh few
experts: the six of the quickstart have 10 MB, and what is kept for them 30 MB."""
RIDGES = 10.0
"""A direction is kept where its variance is so many times what shrinkage adds to each: below that,
the inverse hardly sees it."""


@dataclass(frozen=True)
class PointStatistics:
    """What is kept of the tokens of one input point."""

    means: Tensor
    """[E, IN] float32, of each expert's tokens, less the shift"""
    shift: Tensor
    """[IN] float32"""
    rows: Tensor
    """[M, IN] float16: S_within ≈ rowsᵀ rows · unit² + floor · I"""
    scalars: Tensor
    """[3] float64: unit, floor and shrinkage"""

    @classmethod
    def of(cls, scatter: Sums, shrinkage: float) -> Self:
        """What is kept of a point whose gate was fitted with this shrinkage."""
        return cls._kept(scatter.means, scatter.shift, scatter.covariance(), shrinkage)

    @classmethod
    def _kept(cls, means: Tensor, shift: Tensor, covariance: Covariance, shrinkage: float) -> Self:
        least = RIDGES * shrinkage * float(covariance.level)
        rows, floor = covariance.widest(MAX_DIRECTIONS, least)
        unit = float(rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        scalars = torch.tensor([unit, floor, shrinkage], dtype=torch.float64)
        return cls(means.float(), shift.float(), (rows / unit).half(), scalars)

    @property
    def shrinkage(self) -> float:
        """With which the gate was fitted."""
        return self.scalars[2].item()

    def without(self, expert: int) -> Self:
        """The same for all experts but one; its share of the common spread stays."""
        kept = [e for e in range(len(self.means)) if e != expert]
        return type(self)(self.means[kept], self.shift, self.rows, self.scalars)

    def grown(self, kinds: Sequence[tuple[float, Tensor]], expert: int) -> tuple[Self, Rows]:
        """The same with one more expert, and the covariance of all together.

        Every expert counts the same, however many tokens told of it.

        Args:
            kinds: [T, IN] tokens of the new expert, and what they count of it; 1 in all
            expert: its place among the others
        """
        num_experts = len(self.means)
        unit, floor, *_ = self.scalars.tolist()
        parts = [(counted, tokens.double() - self.shift.double()) for counted, tokens in kinds]
        mean = torch.stack([counted * x.mean(0) for counted, x in parts]).sum(0, keepdim=True)
        own = [(x - mean) / (len(x) * (num_experts + 1) / counted) ** 0.5 for counted, x in parts]
        share = num_experts / (num_experts + 1)
        others = self.rows.double() * (unit * share**0.5)
        covariance = Rows(torch.cat([others, *own]).float(), floor * share)
        means = self.means.double()
        means = torch.cat([means[:expert], mean, means[expert:]])
        return self._kept(means, self.shift, covariance, self.shrinkage), covariance


def write_statistics(path: Path, statistics: Mapping[str, PointStatistics]) -> None:
    """Write what is kept of each module that has a gate."""
    tensors = {
        f"{module}.gate.{name}": getattr(point, name).contiguous().cpu()
        for module, point in statistics.items()
        for name in (f.name for f in fields(PointStatistics))
    }
    save_file(tensors, path)


def read_statistics(path: Path) -> dict[str, PointStatistics]:
    """What was kept of each module that has a gate, by its path."""
    with safe_open(path, framework="pt") as file:
        keys: list[str] = file.keys()
        modules = {key.removesuffix(".gate.means") for key in keys if key.endswith(".gate.means")}
        return {
            module: PointStatistics(
                *(file.get_tensor(f"{module}.gate.{f.name}") for f in fields(PointStatistics))
            )
            for module in sorted(modules)
        }
