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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import MeteoraError
from meteora.checkpoint import RouterEntry
from meteora.discriminant import SingularError, choose_shrinkage, gate_from
from meteora.gates import Sharing, give_follower, give_gate, watch_prompts
from meteora.layer import routed_layers
from meteora.model import expert_names
from meteora.scatter import RowScatter, Scatter, Sums, sample
from meteora.sweep import Sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from meteora.encode import Template

HELDOUT_SHARE = 0.25
"""Of each expert's sequences: they choose the shrinkage, and then join the fit."""
MAX_HELDOUT_BYTES = 256 << 20
"""Of more held-out inputs of a point, every n-th chooses the shrinkage: they are kept in memory."""
MAX_ROWS = 4096
"""Tokens that tell the spread at a point of more inputs than that, where the closed form has a
matrix of tokens by tokens; means are always those of all tokens."""
TOKENS_PER_BATCH = 2048
UNLABELLED = -1


class TrainingError(MeteoraError):
    """The examples cannot teach the gates."""


@dataclass(frozen=True)
class LabelledSequence:
    """Token ids, and the expert that each belongs to; `UNLABELLED` is left out of the fit."""

    input_ids: tuple[int, ...]
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.experts):
            raise TrainingError(
                f"a sequence has {len(self.input_ids)} tokens and {len(self.experts)} labels;"
                " give one token or more, and one label a token"
            )

    @property
    def owners(self) -> set[int]:
        """The experts that own tokens of it: one for a plain example, several for spans."""
        return set(self.experts) - {UNLABELLED}


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
    margin: float | None = None,
    template: Template | None = None,
    share: str = "point",
    seed: int = 0,
    device: torch.device | str | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibration:
    """Give every routed layer a gate that is fitted to `sequences`, in place.

    Args:
        model: with its experts inserted; whatever routers it has are replaced
        sequences: every expert needs two or more
        top_k, temperature, margin: with which the gates route, in the sweep as afterwards
        template: what opens a prompt, where the prompt as a whole is to decide for its opening
        share: how far one gate decides: for its `module`, for the `point` where modules share an
            input, for a `layer`, or for the whole `token` from a third of the depth on
        seed: deals the held-out sequences
        device: where to run; the model is moved there and stays. Where it is, without it
        scratch: a folder for hidden states that are too many for memory
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: an expert has too few sequences, or the model's numbers are not finite.
        SweepError: the model cannot be run layer by layer.
    """
    started = time.perf_counter()
    if device is not None:
        model.to(device)
    names = expert_names(model)
    heldout = _hold_out(sequences, names, seed)
    batches = _sampled(list(_batches(sequences, heldout, model.device)), len(names))
    counts = sum(
        (torch.bincount(b.labels[b.labels >= 0], minlength=len(names)) for b in batches),
        start=torch.zeros(len(names), dtype=torch.long, device=model.device),
    )
    token_weights = 1.0 / counts.float()  # every expert counts the same
    accuracy_of = {}
    layers = routed_layers(model)
    entry = RouterEntry("gate", top_k, temperature, margin)
    with _swept(model):
        prefill = watch_prompts(model, template) if template is not None else None
        pairs = [(b.input_ids, b.attention_mask) for b in batches]
        sweep = Sweep(model, pairs, prefill, scratch=scratch)
        sharing = Sharing(share, len(sweep.layers))
        for index in range(len(sweep.layers)):
            for paths in sweep.points(index):
                point = [layers[path] for path in paths]
                if (decided := sharing.decided(index)) is not None:
                    for layer in point:
                        give_follower(layer, decided, entry)
                    continue
                try:
                    weight, bias, accuracy = _fit_point(
                        sweep.inputs(index, paths[0]), batches, token_weights
                    )
                except SingularError as error:
                    raise TrainingError(f"{paths[0]}: {error}") from error
                accuracy_of[paths[0]] = accuracy
                decision = None if share == "module" else sharing.new(index)
                for place, layer in enumerate(point):
                    if place == 0 or decision is None:
                        give_gate(layer, weight.clone(), bias.clone(), entry, prefill, decision)
                    else:
                        give_follower(layer, decision, entry)
            sweep.advance(index)
            progress(index + 1, len(sweep.layers))
    return Calibration(
        num_tokens=int(counts.sum()),
        heldout_accuracy=sum(accuracy_of.values()) / len(accuracy_of),
        accuracy_of=accuracy_of,
        wall_seconds=time.perf_counter() - started,
    )


@contextmanager
def _swept(model: PreTrainedModel) -> Generator[None]:
    """Start from bare projections, without dropout; a sweep that fails leaves what it found."""
    training = model.training
    before = {path: layer.router for path, layer in routed_layers(model).items()}
    model.eval()
    try:
        for layer in routed_layers(model).values():
            layer.router = None
        yield
    except BaseException:
        for path, layer in routed_layers(model).items():
            layer.router = before[path]
        raise
    finally:
        model.train(training)


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
    stands_for: Tensor
    """[B, L] of how many tokens each tells the spread at a point of many inputs"""


def _fit_point(
    inputs: Iterator[Tensor], batches: Sequence[_Batch], token_weights: Tensor
) -> tuple[Tensor, Tensor, float]:
    """G, c and the held-out accuracy of one input point."""
    num_labelled = sum(int((b.labels != UNLABELLED).sum()) for b in batches)
    num_held = sum(int((b.heldout & (b.labels != UNLABELLED)).sum()) for b in batches)
    scatters: list[Sums] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for x, batch in zip(inputs, batches, strict=True):
        num_inputs = x.shape[-1]
        stride = -(-num_held * num_inputs * 4 // MAX_HELDOUT_BYTES)
        for held in (False, True):
            chosen = (batch.labels != UNLABELLED) & (batch.heldout == held)
            tokens, labels = x[chosen].float(), batch.labels[chosen]
            if not len(tokens):
                continue
            if not scatters:  # in whichever form has the smaller matrix
                form = Scatter if num_inputs <= min(num_labelled, MAX_ROWS) else RowScatter
                shift = tokens.mean(0)
                scatters = [form.empty(len(token_weights), shift) for _ in range(2)]
            scatters[held].add(tokens, labels, token_weights[labels], batch.stands_for[chosen])
            if held:
                kept.append((tokens[::stride], labels[::stride]))
    fitted, checked = scatters  # _hold_out saw to it that every expert has tokens in both
    held_tokens, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    shrinkage, accuracy = choose_shrinkage(fitted, held_tokens, labels, token_weights[labels])
    return *gate_from(fitted + checked, shrinkage), accuracy


def _hold_out(sequences: Sequence[LabelledSequence], names: Sequence[str], seed: int) -> set[int]:
    """Indices of the held-out sequences: a share of each expert's, never tokens of a fitted one.

    A sequence of several experts counts for each of them, and each keeps one to be fitted on.
    """
    own = owned(sequences, names)
    left = [len(indices) for indices in own]
    heldout: set[int] = set()
    for e, indices in enumerate(own):
        random.Random(seed * len(names) + e).shuffle(indices)  # noqa: S311  (a deal, no secret)
        wanted = max(1, round(len(indices) * HELDOUT_SHARE))
        for i in indices:
            if len(indices) - left[e] >= wanted:
                break
            if i not in heldout and all(left[owner] > 1 for owner in sequences[i].owners):
                heldout.add(i)
                for owner in sequences[i].owners:
                    left[owner] -= 1
    return heldout


def owned(sequences: Sequence[LabelledSequence], names: Sequence[str]) -> list[list[int]]:
    """The indices of the sequences in which each expert has tokens."""
    own: list[list[int]] = [[] for _ in names]
    for i, sequence in enumerate(sequences):
        for e in sequence.owners:
            if not 0 <= e < len(names):
                raise TrainingError(
                    f"sequence {i} has a token of expert {e}; the {len(names)} experts are numbered"
                    f" from 0, and {UNLABELLED} stands for none"
                )
            own[e].append(i)
    for name, indices in zip(names, own, strict=True):
        if len(indices) < 2:
            raise TrainingError(
                f"expert {name} has {len(indices)} examples; a gate needs two or more of each"
                " expert, one to fit and one to check: give it more examples"
            )
    return own


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
        yield _Batch(
            *(part.to(device) for part in (ids, mask.long(), labels, held, torch.ones(shape)))
        )
        start = stop


def _sampled(batches: Sequence[_Batch], num_experts: int) -> list[_Batch]:
    """Choose the tokens that tell the spread at points of many inputs: the same ones at each."""
    labels = torch.cat([b.labels.flatten() for b in batches])
    held = torch.cat([b.heldout.expand_as(b.labels).flatten() for b in batches])
    stands_for = torch.zeros(len(labels), device=labels.device)
    for side, share in ((~held, 1 - HELDOUT_SHARE), (held, HELDOUT_SHARE)):
        own = side & (labels != UNLABELLED)
        stands_for[own] = sample(labels[own], num_experts, round(MAX_ROWS * share))
    split = stands_for.split([b.labels.numel() for b in batches])
    return [
        replace(b, stands_for=part.view_as(b.labels))
        for b, part in zip(batches, split, strict=True)
    ]
