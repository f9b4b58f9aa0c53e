"""Where a training stands, in one safetensors file: what is learned, AdamW's moments, the step.

The file takes the place of the one before by a rename, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import os
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

FILE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class StateError(MeteoraError):
    """The file of a stopped training cannot be gone on with."""


@dataclass(frozen=True)
class TrainingState:
    step: int
    """Steps that are done."""
    tensors: dict[str, Tensor]
    """Parameters by name, and "<name>.exp_avg", "<name>.exp_avg_sq" once a step is done."""

    @classmethod
    def of(
        cls, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW
    ) -> TrainingState:
        tensors = {}
        for name, parameter in parameters.items():
            tensors[name] = parameter.detach()
            for moment in MOMENTS:
                if moment in optimizer.state[parameter]:
                    tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment]
        return cls(step, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> None:
        """Put everything back where `of` found it."""
        for name, parameter in parameters.items():
            parameter.data.copy_(self.tensors[name])
            if self.step:
                optimizer.state[parameter] = {
                    "step": parameter.new_tensor(float(self.step), device="cpu"),
                    **{m: self.tensors[f"{name}.{m}"].to(parameter.device) for m in MOMENTS},
                }

    def write(self, folder: Path, asked_sha256: str) -> None:
        """Leave the state in a folder; `asked_sha256` says which training it belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE}.part"
        save_file(self.tensors, part, {"step": str(self.step), "asked_sha256": asked_sha256})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path, asked_sha256: str) -> TrainingState | None:
        """The state that was written last; None where there is none.

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
                f"{path} is no state of a training that can be read ({error}); remove it to train"
                " from the beginning"
            ) from error
        if about.get("asked_sha256") != asked_sha256:
            raise StateError(
                f"{path} belongs to a training with other examples, settings or experts; remove it,"
                " or give another folder"
            )
        return state
