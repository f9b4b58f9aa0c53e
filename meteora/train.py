"""Fit the gates and nothing else, in one forward sweep and without a backward pass.

`calibrate` goes through the model layer by layer, as post-training quantisation does. At each point
where modules share an input (q, k, v; o; gate, up; down) it fits the gate in closed form to that
input *as the already routed layers below produce it*, then runs on with the gate in place. Fitting
all layers at once, from a pass that is routed by the labels, would miss that errors below shift the
inputs above.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import MeteoraError
from meteora.discriminant import Scatter, choose_shrinkage, gate_from
from meteora.model import expert_names, routed_layers
from meteora.routers import Gate
from meteora.sweep import Sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

HELDOUT_SHARE = 0.25
"""Of each expert's sequences: they choose the shrinkage, and then join the fit."""
TOKENS_PER_BATCH = 2048
UNLABELLED = -1


class TrainingError(MeteoraError):
    """The examples cannot teach the gates."""


@dataclass(frozen=True)
class LabelledSequence:
    """Token ids, and for each the expert that it belongs to; `UNLABELLED` is left out of the fit."""

    input_ids: tuple[int, ...]
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.experts):
            raise TrainingError(
                f"a sequence has {len(self.input_ids)} tokens and {len(self.experts)} labels;"
                " give one label a token"
            )

    @property
    def owner(self) -> int:
        """The first expert that is named in it: by it sequences are dealt out."""
        return next((e for e in self.experts if e != UNLABELLED), UNLABELLED)


@dataclass(frozen=True)
class Calibration:
    """What a sweep found."""

    num_tokens: int
    """Labelled tokens that the gates were fitted on."""
    heldout_accuracy: float
    """Mean over input points of the share of held-out tokens that went to their own expert."""
    accuracy_of: dict[str, float]
    """The same for the first module of each point."""
    wall_seconds: float


def calibrate(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    *,
    top_k: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibration:
    """Give every routed layer a gate that is fitted to `sequences`, in place.

    Args:
        model: with its experts inserted; whatever routers it has are replaced
        sequences: every expert needs two or more
        top_k, temperature: with which the gates route, in the sweep as afterwards
        seed: deals the held-out sequences
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: an expert has too few sequences.
    """
    started = time.perf_counter()
    num_experts = len(expert_names(model))
    heldout = _hold_out(sequences, expert_names(model), seed)
    batches = list(_batches(sequences, heldout, model.device))
    counts = sum(
        (torch.bincount(b.labels[b.labels >= 0], minlength=num_experts) for b in batches),
        start=torch.zeros(num_experts, dtype=torch.long, device=model.device),
    )
    token_weights = 1.0 / counts.clamp_min(1).float()  # every expert counts the same
    for layer in routed_layers(model).values():
        layer.router = None
    sweep = Sweep(model, [(b.input_ids, b.attention_mask) for b in batches])
    accuracy_of = {}
    for index in range(len(sweep.layers)):
        for paths in sweep.points(index):
            tokens = sweep.inputs(index, paths[0])
            weight, bias, accuracy = _fit_point(tokens, batches, token_weights)
            accuracy_of[paths[0]] = accuracy
            for path in paths:
                routed_layers(model)[path].router = Gate(
                    weight.clone(), bias.clone(), top_k=top_k, temperature=temperature
                ).requires_grad_(requires_grad=False)
        sweep.advance(index)
        progress(index + 1, len(sweep.layers))
    return Calibration(
        num_tokens=int(counts.sum()),
        heldout_accuracy=sum(accuracy_of.values()) / len(accuracy_of),
        accuracy_of=accuracy_of,
        wall_seconds=time.perf_counter() - started,
    )


def gates_of(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """G [E, IN] and c [E] of every routed layer that has a gate, by module path, on the CPU."""
    return {
        path: (layer.router.weight.detach().cpu(), layer.router.bias.detach().cpu())
        for path, layer in routed_layers(model).items()
        if isinstance(layer.router, Gate)
    }


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    """[B, L], padded on the right"""
    attention_mask: Tensor
    """[B, L]"""
    labels: Tensor
    """[B, L] experts; `UNLABELLED` for padding too"""
    heldout: Tensor
    """[B, 1] bool"""


def _fit_point(
    inputs: Iterator[Tensor], batches: Sequence[_Batch], token_weights: Tensor
) -> tuple[Tensor, Tensor, float]:
    """G, c and the held-out accuracy of one input point."""
    fitted = checked = None
    kept: list[tuple[Tensor, Tensor]] = []
    for x, batch in zip(inputs, batches, strict=True):
        labelled = batch.labels != UNLABELLED
        if fitted is None or checked is None:
            shift = x[labelled].float().mean(0)
            fitted = Scatter.empty(len(token_weights), shift)
            checked = Scatter.empty(len(token_weights), shift)
        for chosen, scatter in (
            (labelled & ~batch.heldout, fitted),
            (labelled & batch.heldout, checked),
        ):
            tokens, labels = x[chosen].float(), batch.labels[chosen]
            if len(tokens):
                scatter.add(tokens, labels, token_weights[labels])
                if scatter is checked:
                    kept.append((tokens, labels))
    assert fitted is not None  # noqa: S101  (there is at least one batch)
    assert checked is not None  # noqa: S101
    held, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    shrinkage, accuracy = choose_shrinkage(fitted, held, labels, token_weights[labels])
    return *gate_from(fitted + checked, shrinkage), accuracy


def _hold_out(sequences: Sequence[LabelledSequence], names: Sequence[str], seed: int) -> set[int]:
    """Indices of the held-out sequences: a share of each expert's, never tokens of a fitted one."""
    heldout: set[int] = set()
    for e, name in enumerate(names):
        own = [i for i, sequence in enumerate(sequences) if sequence.owner == e]
        if len(own) < 2:
            raise TrainingError(
                f"expert {name} has {len(own)} examples; a gate needs two or more of each expert,"
                " one to fit and one to check: give it more examples"
            )
        random.Random(seed * len(names) + e).shuffle(own)  # noqa: S311  (a deal, no secret)
        heldout.update(own[: max(1, round(len(own) * HELDOUT_SHARE))])
    return heldout


def _batches(
    sequences: Sequence[LabelledSequence], heldout: set[int], device: torch.device
) -> Iterator[_Batch]:
    """Sequences of like length together, so that little of a batch is padding."""
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    start = 0
    while start < len(by_length):
        stop = start + 1
        while (
            stop < len(by_length)
            and len(sequences[by_length[stop]].input_ids) * (stop + 1 - start) <= TOKENS_PER_BATCH
        ):
            stop += 1
        chosen = by_length[start:stop]
        shape = (len(chosen), len(sequences[chosen[-1]].input_ids))
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, UNLABELLED)
        for row, i in enumerate(chosen):
            length = len(sequences[i].input_ids)
            ids[row, :length] = torch.tensor(sequences[i].input_ids)
            labels[row, :length] = torch.tensor(sequences[i].experts)
        lengths = torch.tensor([len(sequences[i].input_ids) for i in chosen])
        mask = torch.arange(shape[1]) < lengths[:, None]
        held = torch.tensor([[i in heldout] for i in chosen])
        yield _Batch(ids.to(device), mask.long().to(device), labels.to(device), held.to(device))
        start = stop
