"""Statistics of the tokens at an input point: enough to fit its gate again without the tokens.

`Fit`, the result of a fit, has those of all points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from meteora.checkpoint.manifest import GATES, STATISTICS, CheckpointError, Manifest
from meteora.checkpoint.sound_file import AGAIN, open_sound
from meteora.checkpoint.tensors import Gates, save_tensors
from meteora.fitting.covariance import Covariance, Rows, Sums
from meteora.untrusted.findings import shortened

MAX_DIRECTIONS = 256
"""Most directions of the covariance that a fit has of a point."""
MAX_WRITTEN = 128
"""Most directions that a file has of a point. They can be larger than the experts: the quickstart's
six experts have 10 MB, their statistics 28 MB. There, experts that are added route as well as with
256 directions. With 256 in 8 bits they do not: the widest direction is some fifty times as wide as
the last, and its rounding error adds to the variance of all others
(`tests/benchmarks/results/gates.md`)."""
RIDGES = 10.0
"""A direction is kept if its variance is more than this many times the variance that shrinkage
adds: a smaller one hardly changes the inverse."""


@dataclass(frozen=True)
class PointStatistics:
    """Means and covariance of the tokens at one input point; M is the number of directions."""

    means: Tensor
    """[E, IN] float32, of each expert's tokens, with the shift subtracted"""
    shift: Tensor
    """[IN] float32, subtracted from every input"""
    rows: Tensor
    """[M, IN] float16: S_within ≈ rowsᵀ rows · unit² + floor · I"""
    scalars: Tensor
    """[3] float64: unit, floor and shrinkage"""

    @classmethod
    def of(cls, scatter: Sums, shrinkage: float) -> Self:
        """The statistics of a point whose gate was fitted with this shrinkage."""
        return cls._kept(scatter.means, scatter.shift, scatter.covariance(), shrinkage)

    @classmethod
    def _kept(cls, means: Tensor, shift: Tensor, covariance: Covariance, shrinkage: float) -> Self:
        least = RIDGES * shrinkage * float(covariance.level)
        return cls._of_rows(
            means.float(), shift.float(), *covariance.widest(MAX_DIRECTIONS, least), shrinkage
        )

    @classmethod
    def _of_rows(
        cls, means: Tensor, shift: Tensor, rows: Tensor, floor: float, shrinkage: float
    ) -> Self:
        unit = float(rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        scalars = torch.tensor([unit, floor, shrinkage], dtype=torch.float64)
        return cls(means, shift, (rows / unit).half(), scalars)

    def narrowed(self, num_rows: int) -> Self:
        """The same statistics with fewer directions: the widest, and the others as one variance."""
        if len(self.rows) <= num_rows:
            return self
        unit, floor, shrinkage = self.scalars.tolist()
        rows = self.rows.double() * unit
        beyond = rows.square().sum(-1)  # variance of each direction, less the floor
        more = beyond[num_rows:].sum().item() / (rows.shape[1] - num_rows)
        least = torch.finfo(torch.float32).tiny
        lessened = (1 - more / beyond[:num_rows].clamp_min(least)).clamp_min(0).sqrt()
        rows = rows[:num_rows] * lessened[:, None]
        return self._of_rows(self.means, self.shift, rows, floor + more, shrinkage)

    @property
    def shrinkage(self) -> float:
        """The shrinkage with which the gate was fitted, in (0, 1]."""
        return self.scalars[2].item()

    def to(self, device: torch.device) -> Self:
        """The same statistics on a device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def drawn(self, count: int) -> Tensor:
        """Tokens drawn from the normal distributions of the statistics, [E, count, IN].

        Each call draws the same tokens.
        """
        generator = torch.Generator().manual_seed(0)
        unit, floor, _ = self.scalars.tolist()
        num_experts, num_inputs = self.means.shape
        inside = torch.randn(num_experts, count, len(self.rows), generator=generator)
        beside = torch.randn(num_experts, count, num_inputs, generator=generator)
        spread = (
            inside.to(self.means) @ (self.rows.float() * unit) + beside.to(self.means) * floor**0.5
        )
        return (self.means + self.shift)[:, None] + spread

    def without(self, expert: int) -> Self:
        """The statistics without one expert's mean; the shared covariance stays as it is."""
        return replace(self, means=without(self.means, expert))

    def grown(self, kinds: Sequence[tuple[float, Tensor]], expert: int) -> tuple[Self, Rows]:
        """The statistics with one more expert, and the covariance of all experts together.

        Every expert has the same weight, whatever its number of tokens.

        Args:
            kinds: the new expert's tokens [T, IN] by kind, each with its share of the expert's
                weight; shares sum to 1 (`sequences.by_kind`)
            expert: the new expert's number
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


@dataclass(frozen=True)
class Fit:
    """The result of a fit or a training; the gates themselves are in the model."""

    num_tokens: int
    """Labelled tokens of the examples, of an added expert those of its own."""
    heldout_accuracy: float | None
    """Share of held-out tokens that go to their own expert, weighted as in the fit; the mean over
    input points. In a crossed sweep each half is held out once. None after a joint training, which
    holds none out."""
    wall_seconds: float
    """With the time of earlier calls that this one resumed."""
    statistics: dict[str, PointStatistics] = field(default_factory=dict)
    """Statistics of each input point, by the path of its first module. With them an expert can be
    added later. Empty after a joint training."""
    accuracy_of: dict[str, float] = field(default_factory=dict)
    """The accuracy at each input point of a sweep, by the path of its first module."""
    not_crossed: tuple[str, ...] = ()
    """The experts with tokens in one half alone: because of them a sweep was not crossed."""


def without(rows: Tensor, expert: int) -> Tensor:
    """Rows [E, …] without that of one expert."""
    return torch.cat([rows[:expert], rows[expert + 1 :]])


def write_statistics(path: Path, statistics: Mapping[str, PointStatistics]) -> None:
    """Write the statistics of each module that has a gate, by module path, as safetensors."""
    tensors = {
        f"{module}.gate.{name}": tensor.contiguous().cpu()
        for module, point in statistics.items()
        for name, tensor in vars(point.narrowed(MAX_WRITTEN)).items()
    }
    save_tensors(path, tensors)


def read_statistics(folder: Path, manifest: Manifest, gates: Gates) -> dict[str, PointStatistics]:
    """Read the statistics of a checkpoint's gates, by the path of each point's first module.

    Raises:
        CheckpointError: the file is damaged, or does not fit the gates.
    """
    with open_sound(folder, STATISTICS, manifest) as file:
        keys: list[str] = file.keys()
        modules = {key.removesuffix(".gate.means") for key in keys if key.endswith(".gate.means")}
        statistics = {
            module: PointStatistics(
                *(file.get_tensor(f"{module}.gate.{f.name}") for f in fields(PointStatistics))
            )
            for module in sorted(modules)
        }
    for module, point in statistics.items():
        gate = tuple(gates.own[module][0].shape) if module in gates.own else (0, 0)
        shapes = [tuple(part.shape) for part in (point.means, point.shift, point.scalars)]
        fit = shapes == [gate, gate[1:], (3,)] and point.rows.shape[1:] == gate[1:]
        unit, floor, shrinkage = point.scalars.tolist() if fit else (0.0, 0.0, 0.0)
        if not (unit > 0 and floor >= 0 and 0 < shrinkage <= 1):
            raise CheckpointError(
                f"{folder / STATISTICS}: {shortened(module)} has statistics that do not fit its"
                f" gate in {GATES}; {AGAIN}"
            )
    return statistics
