"""The files from which a stopped fit continues: safetensors, each replaced as a whole.

A joint training has one file. Its schedule (learning rate, sequences of a step) follows from the
settings, the seed and the step, so parameters, AdamW's moments and the step are the whole state.
A sweep has one file for each input point: the gate that was fitted there, and its statistics.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meteora.artifacts import JointSettings, MeteoraError
from meteora.fitting.statistics import PointStatistics

FILE = "training.safetensors"
DIGEST = "tensors_sha256"
"""The key of the tensors' hash in a file; older files have none."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names under which AdamW keeps its moments."""


class StateError(MeteoraError):
    """A training cannot resume from the file in its folder."""


def learning_rate(settings: JointSettings, step: int) -> float:
    """The rate of one step: linearly up during warm-up, then along a cosine down to zero."""
    warm = round(settings.steps * settings.warmup_ratio)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def chosen_sequences(count: int, settings: JointSettings, seed: int, step: int) -> list[int]:
    """The indices below `count` that one step takes; every epoch has a new order."""
    size = settings.batch_size * settings.accumulate
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = list(range(count))
            random.Random(f"{seed} {epoch}").shuffle(orders[epoch])  # noqa: S311  (no secret)
        chosen.append(orders[epoch][place])
    return chosen


@dataclass(frozen=True)
class TrainingState:
    """Parameters and optimiser state after a step."""

    step: int
    """The number of finished steps."""
    tensors: dict[str, Tensor]
    """Parameters by name, and "<name>.exp_avg", "<name>.exp_avg_sq" after the first step."""
    wall_seconds: float
    """The time that the training took up to here, in all its calls."""

    @classmethod
    def of(
        cls,
        step: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.AdamW,
        *,
        wall_seconds: float,
    ) -> TrainingState:
        """The present state of these parameters and their optimiser."""
        tensors = {}
        for name, parameter in parameters.items():
            tensors[name] = parameter.detach()
            for moment in MOMENTS:
                if moment in optimizer.state[parameter]:
                    tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment]
        return cls(step, tensors, wall_seconds)

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> None:
        """Copy the state into parameters of the same names, and into their optimiser."""
        for name, parameter in parameters.items():
            parameter.data.copy_(self.tensors[name])
            if self.step:
                optimizer.state[parameter] = {
                    "step": parameter.new_tensor(float(self.step), device="cpu"),
                    **{m: self.tensors[f"{name}.{m}"].to(parameter.device) for m in MOMENTS},
                }

    def write(self, folder: Path, asked_sha256: str) -> None:
        """Write the state into a folder; `asked_sha256` hashes all that changes the result."""
        about = {"step": str(self.step), "wall_seconds": str(self.wall_seconds)}
        _write(folder / FILE, self.tensors, {**about, "asked_sha256": asked_sha256})

    @classmethod
    def read(cls, folder: Path, asked_sha256: str) -> TrainingState | None:
        """The state that was written last; None if there is none.

        Raises:
            StateError: the file is damaged, or belongs to another training.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            tensors, about = _read(path)
            # older files have no time
            state = cls(int(about["step"]), tensors, float(about.get("wall_seconds", 0)))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StateError(
                f"{path} cannot be read as the state of a training ({error}); remove it to train"
                " from the beginning"
            ) from error
        if about.get("asked_sha256") != asked_sha256:
            raise StateError(
                f"{path} belongs to a training with other examples, settings or experts; remove it,"
                " or give another folder"
            )
        return state


@dataclass(frozen=True)
class FittedPoint:
    """An input point of a sweep with its gate."""

    weight: Tensor
    """G [E, IN]"""
    bias: Tensor
    """c [E]"""
    statistics: PointStatistics
    accuracy: float
    """Share of held-out tokens that go to their own expert."""
    wall_seconds: float
    """The time that the fit took."""
    halves: tuple[tuple[Tensor, Tensor], ...] = ()
    """G and c of each half of the sequences, if the sweep is crossed."""

    def write(self, folder: Path, path: str, asked_sha256: str) -> None:
        """Write the point into a folder; `asked_sha256` hashes all that changes the result."""
        tensors = {"weight": self.weight, "bias": self.bias} | vars(self.statistics)
        for half, (weight, bias) in enumerate(self.halves):
            tensors |= {f"{half}.weight": weight, f"{half}.bias": bias}
        numbers = {"accuracy": self.accuracy, "wall_seconds": self.wall_seconds}
        about = {name: repr(number) for name, number in numbers.items()}
        file = folder / f"{path}.safetensors"
        _write(file, tensors, about | {"asked_sha256": asked_sha256})

    @classmethod
    def read(cls, folder: Path, path: str, asked_sha256: str) -> FittedPoint | None:
        """A point that an earlier sweep has fitted, on the CPU.

        None if there is none, its file is damaged, or it belongs to another sweep: the point is
        then fitted again.
        """
        try:
            tensors, about = _read(folder / f"{path}.safetensors")
            if about["asked_sha256"] != asked_sha256:
                return None
            weight, bias = tensors.pop("weight"), tensors.pop("bias")
            halves = tuple(
                (tensors.pop(f"{half}.weight"), tensors.pop(f"{half}.bias"))
                for half in (0, 1)
                if f"{half}.weight" in tensors
            )
            accuracy, wall_seconds = float(about["accuracy"]), float(about["wall_seconds"])
            return cls(weight, bias, PointStatistics(**tensors), accuracy, wall_seconds, halves)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a file by a rename: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, part, {**about, DIGEST: _sha256(whole)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        SafetensorError, OSError: it cannot be read.
        ValueError: its tensors have changed since they were written.
    """
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if DIGEST in about and about[DIGEST] != _sha256(tensors):
        raise ValueError("its tensors have changed since they were written")
    return tensors, about


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
