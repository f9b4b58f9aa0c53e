"""Save a fused model: as a checkpoint with the gates as they are now.

A checkpoint holds neither the base nor a further adapter. So a model whose other weights have
changed since it was loaded is not saved. Of each weight a few numbers are compared, which training
changes; an edit of single rows is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora.artifacts import MeteoraError
from meteora.checkpoint.copies import Source, copy_checkpoint
from meteora.routing.gates import gates_in, gates_of
from meteora.routing.layer import routed_layers
from meteora.untrusted.findings import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnsavableError(MeteoraError):
    """A checkpoint would not have what was trained, or the class of its base could not load it."""


def refuse(*_args: object, **_kwargs: object) -> None:
    raise UnsavableError(
        "a fused model is not saved as other models are: what transformers wrote would load as a"
        " base with random weights; save a model of `meteora.load` with save_pretrained(folder),"
        " and `meteora publish` the folder"
    )


def allow(model: PreTrainedModel, folder: Path) -> None:
    """Let `save_pretrained` of a model that was loaded from `folder` write a checkpoint."""
    before = {name: _sample(weight) for name, weight in _beside_gates(model).items()}
    vars(model)["save_pretrained"] = partial(_save, model, Source.of(folder), before)


def _save(
    model: PreTrainedModel,
    source: Source,
    before: Mapping[str, Tensor],
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: object = None,
    push_to_hub: bool = False,
    **_kwargs: object,
) -> None:
    """Write a checkpoint: a copy of the one that was loaded, with the gates as they are now.

    Args:
        before: samples of each weight beside the gates when the model was loaded, by its name
        save_directory: and the others are those of transformers

    Raises:
        CheckpointError: the checkpoint that was loaded has changed, or is gone.
        UnsavableError: weights beside the gates have changed, or a state dict is given; it is the
            same folder; an expert is forced; or it is to be pushed.
    """
    if push_to_hub or state_dict is not None:
        refuse()
    now = _beside_gates(model)
    changed = before.keys() ^ now.keys()
    changed |= {name for name in before.keys() & now.keys() if _differs(before[name], now[name])}
    if changed:
        raise UnsavableError(
            "weights beside the gates are not as they were loaded, or not frozen"
            f" ({listed(sorted(changed))}), and a checkpoint holds gates and experts alone; train"
            ' an adapter with PEFT\'s get_peft_model and target_modules=["projection"], and save it'
            " by itself"
        )
    out = Path(save_directory)
    if out.exists() and source.folder.exists() and out.samefile(source.folder):
        raise UnsavableError(f"{out}: the model was loaded from this folder; give another")
    if any(layer.is_lent for layer in routed_layers(model).values()):
        raise UnsavableError(
            "the routers are replaced, as in force_expert; save the model outside of that block"
        )
    if is_main_process:
        copy_checkpoint(source, out, gates_of(model) if gates_in(model) else None)


def _beside_gates(model: PreTrainedModel) -> dict[str, Tensor]:
    """Each weight beside the gates by its name; none of quantised ones."""
    gates = {id(weight) for gate in gates_in(model).values() for weight in gate.parameters()}
    every = model.named_parameters(remove_duplicate=False)  # offloading may part a tied head
    return {
        name: weight
        for name, weight in every
        if type(weight) is torch.nn.Parameter and id(weight) not in gates
    }


def _sample(weight: Tensor) -> Tensor:
    """Some numbers of all of a weight: a longer table of tokens begins like the one before."""
    return weight.detach().flatten()[:: max(weight.numel() // 8, 1)].clone()


def _differs(before: Tensor, weight: Tensor) -> bool:
    """Whether a weight is trained, or has other numbers than its sample before.

    Its dtype and device may have changed.
    """
    if weight.requires_grad or before.is_meta or weight.is_meta:
        return weight.requires_grad
    now = _sample(weight)
    # in float32, since torch compares no 8-bit floats
    return not torch.equal(before.to(now.device, now.dtype).float(), now.float())
