"""What a joint training resumes from: the schedule, and the state in one safetensors file.

The schedule (learning rate, sequences of a step) follows from the settings, the seed and the step.
So parameters, AdamW's moments and the step are the whole state. A new file replaces the old one by
a rename: a kill at any moment leaves a complete file.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from meteora.artifacts import JointSettings

FILE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names under which AdamW keeps its moments."""


class StateError(MeteoraError):
    """A training cannot resume from the file that it finds."""


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
    """Parameters and optimiser state after some step."""

    step: int
    """Steps that are done."""
    tensors: dict[str, Tensor]
    """Parameters by name, and "<name>.exp_avg", "<name>.exp_avg_sq" after the first step."""

    @classmethod
    def of(
        cls, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW
    ) -> TrainingState:
        """The present state of these parameters and their optimiser, copied to the CPU."""
        tensors = {}
        for name, parameter in parameters.items():
            tensors[name] = parameter.detach()
            for moment in MOMENTS:
                if moment in optimizer.state[parameter]:
                    tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment]
        return cls(step, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

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
        """Write the state into a folder; `asked_sha256` identifies the training."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE}.part"
        save_file(self.tensors, part, {"step": str(self.step), "asked_sha256": asked_sha256})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(folder / FILE)

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
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                names = list(file.keys())
                state = cls(int(about["step"]), {name: file.get_tensor(name) for name in names})
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
