"""The losses of joint training and their gradients, for the sequences of one optimiser step.

    loss = L_LM + gate_loss_weight · L_gate             (MeteoRA, arXiv 2405.13053, section 3)

    L_LM     mean cross-entropy of the next token, over all tokens of prompt and response
    L_gate   mean cross-entropy of a gate's logits against the token's expert, over all gates and
             all labelled tokens, without temperature or load balancing. Tokens that open answers
             have `OPENING_SHARE` of their expert's weight (the paper has no such weights: its
             examples hold one task each)

`backward_together` is the definition. With `top_k = 1` the weight of the chosen expert is the
constant 1: no gradient passes through the routing, so only the gate loss has a gradient, and each
gate has its own. `backward_apart` computes that case with a forward pass of the model only.

Sums are divided by the counts of the whole step, so that batches add up to one large batch. Token
weights are computed over all sequences of a training; their mean is 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from meteora.base.padding import mask_of, padded
from meteora.base.placement import LAYER, replaced_forward
from meteora.fitting.sequences import UNLABELLED, LabelledSequence, each_of_kind
from meteora.model.fused import without_dropout
from meteora.routing.gates import as_in_this_pass, gates_in, old_routers_after_error
from meteora.routing.hooks import recorded_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.routing.routers import Gate

IGNORED = -100
"""The label of tokens that `cross_entropy` leaves out."""


@dataclass(frozen=True)
class Counts:
    """Token counts of a whole step, over all its batches and processes."""

    labelled: int
    """Tokens that belong to an expert."""
    predicted: int
    """Tokens that are predicted: all but the first of each sequence."""

    @classmethod
    def of(cls, sequences: Sequence[LabelledSequence]) -> Counts:
        """The counts of all sequences of a step."""
        return cls(
            sum(e != UNLABELLED for sequence in sequences for e in sequence.experts),
            sum(len(sequence.input_ids) - 1 for sequence in sequences),
        )


def loss_weights(sequences: Sequence[LabelledSequence], num_experts: int) -> Tensor | None:
    """The weight in L_gate of one token, by its expert and kind.

    The weights of an expert's tokens sum to their number. Without openings each weight is 1.

    Args:
        sequences: all of the training

    Returns:
        [E, 2] float32: [:, 0] for ordinary tokens, [:, 1] for those that open an answer; None if no
        sequence has openings
    """
    if not any(sequence.openings for sequence in sequences):
        return None
    kinds = torch.cat([_kinds(sequence) for sequence in sequences])
    counts = torch.bincount(kinds[kinds >= 0], minlength=2 * num_experts).view(num_experts, 2)
    return each_of_kind(counts) * counts.sum(1, keepdim=True)


def _kinds(sequence: LabelledSequence) -> Tensor:
    """[L] 2 · expert, plus 1 if the token opens an answer; negative for no expert."""
    kinds = torch.tensor(sequence.experts) * 2
    kinds[list(sequence.openings)] += 1
    return kinds


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together. B: sequences, L: length of the longest."""

    input_ids: Tensor
    """[B, L], padded on the right"""
    attention_mask: Tensor
    """[B, L]"""
    labels: Tensor
    """[B × L] experts; `IGNORED` for padding and for tokens that belong to no expert"""
    weights: Tensor | None = None
    """[B × L] the weight of each token in L_gate; None if all are 1"""

    @classmethod
    def of(
        cls,
        sequences: Sequence[LabelledSequence],
        device: torch.device,
        each: Tensor | None = None,
    ) -> Batch:
        """Pad sequences into one batch; `each` is the result of `loss_weights`."""
        rows = [sequence.input_ids for sequence in sequences]
        ids, mask = padded(rows), mask_of(rows)
        labels = padded([sequence.experts for sequence in sequences], IGNORED)
        labels[labels == UNLABELLED] = IGNORED
        weights = None
        if each is not None:
            kinds = [_kinds(sequence).clamp_min(0) for sequence in sequences]
            weights = each.flatten()[pad_sequence(kinds, batch_first=True)].flatten().to(device)
        return cls(ids.to(device), mask.to(device), labels.flatten().to(device), weights)


def backward_together(
    model: PreTrainedModel,
    batch: Batch,
    counts: Counts,
    gate_loss_weight: float,
    scale: float = 1.0,
) -> Tensor:
    """Add a batch's part of the step's gradients, as the module's docstring defines them.

    Args:
        scale: of the gradients

    Returns:
        [M + 1] the batch's part of the loss of each of the M gates, and of L_LM.
    """
    with recorded_logits(model) as recorded:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        following = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)[:, 1:]
        lm_loss = _sum_of_losses(out.logits[:, :-1].flatten(0, 1), following.flatten())
        lm_loss = lm_loss / counts.predicted
        of_gates = torch.stack(
            [
                _sum_of_losses(recorded[path], batch.labels, batch.weights)
                for path in gates_in(model)
            ]
        )
        of_gates = of_gates / counts.labelled
        loss = lm_loss + gate_loss_weight * of_gates.mean()
        loss.backward(torch.full_like(loss, scale))
    return torch.cat([of_gates, lm_loss[None]]).detach()


def backward_apart(
    model: PreTrainedModel, batch: Batch, counts: Counts, gate_loss_weight: float
) -> Tensor:
    """As `backward_together`, for `top_k = 1`: no backward pass through the model.

    Returns:
        [M + 1] as there, but L_LM is not computed and is NaN.
    """
    gates = gates_in(model).values()
    losses: list[Tensor] = []

    def teach(gate: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        with torch.enable_grad():
            logits = gate.forward(inputs[0])  # not gate(...): that would run this hook again
            loss = _sum_of_losses(logits, batch.labels, batch.weights) / counts.labelled
            (gate_loss_weight * loss / len(gates)).backward()
        losses.append(loss.detach())

    # the whole model, since watchers of prompts and FSDP hook its forward; its logits are not used
    can_skip_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    with ExitStack() as hooks, torch.no_grad():
        for gate in gates:
            hooks.enter_context(gate.register_forward_hook(teach))
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **({"logits_to_keep": 1} if can_skip_logits else {}),
        )
    return torch.stack([*losses, losses[0].new_tensor(torch.nan)])


def learning_gates(model: PreTrainedModel, *, zeros: bool) -> dict[str, Gate]:
    """Make all gates trainable; they compute in their own precision, without autocast."""
    gates = gates_in(model)
    for gate in gates.values():
        if zeros:
            gate.weight.zero_()
            gate.bias.zero_()
        gate.requires_grad_(requires_grad=True)
        gate.forward = torch.autocast(gate.weight.device.type, enabled=False)(gate.forward)
    return gates


@contextmanager
def frozen(model: PreTrainedModel) -> Generator[None]:
    """A context in which the whole model is frozen; gates that are added are frozen at the end.

    After an error the old routers are put back. Dropout is off, as it is when gates route later.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    with without_dropout(model):
        model.requires_grad_(requires_grad=False)
        try:
            with old_routers_after_error(model):
                yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)
            for gate in gates_in(model).values():
                gate.requires_grad_(requires_grad=False)
                gate.__dict__.pop("forward", None)


def _sum_of_losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    if weights is None:
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    losses = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return losses @ weights


def decoder_layers(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The numbered layers that hold these modules or parameters, in order."""
    matches = [LAYER.match(path) for path in paths]
    paths = dict.fromkeys(match[0].rstrip(".") for match in matches if match)
    return [model.get_submodule(path) for path in paths]


@contextmanager
def computed_again(layers: Sequence[nn.Module]) -> Generator[None]:
    """A context in which layers keep no activations; the backward pass computes them again.

    transformers' own switch needs training mode, which turns dropout on.
    """
    with ExitStack() as replaced:
        for layer in layers:
            again = partial(_checkpointed, layer, layer.forward)
            replaced.enter_context(replaced_forward(layer, again))
        yield


def _checkpointed(
    layer: nn.Module,
    forward: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A layer's output; the backward pass computes it again with the routes of this pass."""
    run = as_in_this_pass(layer, forward)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)
