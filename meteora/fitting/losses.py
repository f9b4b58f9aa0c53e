"""The losses of joint training and their gradients, for the sequences of one optimiser step.

    loss = L_LM + gate_loss_weight · L_gate             (MeteoRA, arXiv 2405.13053, section 3)

    L_LM     mean cross-entropy of the next token, over all tokens of prompt and response
    L_gate   mean cross-entropy of a gate's logits against the token's expert, over all gates and
             all labelled tokens, without temperature or load balancing. Tokens that open answers
             have `ANSWER_START_SHARE` of their expert's weight (the paper has no such weights: its
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
from torch.utils.checkpoint import checkpoint

from meteora.artifacts.specs import place_of
from meteora.base.placement import replaced_forward
from meteora.fitting.sequences import (
    UNLABELLED,
    Batch,
    LabelledSequence,
    batched,
    each_of_kind,
    num_of_kinds,
)
from meteora.model.fused import without_dropout
from meteora.routing.gates import as_in_this_pass, gates_in, old_routers_after_error
from meteora.routing.hooks import recorded_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.routing.routers import Gate


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

    The weights of an expert's tokens sum to their number. Each is 1 if no answer's start is known.

    Args:
        sequences: all of the training

    Returns:
        [E, 2] float32: [:, 0] for ordinary tokens, [:, 1] for those that open an answer; None if no
        sequence has starts of answers
    """
    if not any(sequence.answer_starts for sequence in sequences):
        return None
    batches = [*batched(sequences, set(), torch.device("cpu"))]
    counts = num_of_kinds(batches, num_experts)
    return each_of_kind(counts) * counts.sum(1, keepdim=True)


def backward_together(
    model: PreTrainedModel,
    batch: Batch,
    each: Tensor | None,
    counts: Counts,
    gate_loss_weight: float,
    scale: float = 1.0,
) -> Tensor:
    """Add a batch's part of the step's gradients, as the module's docstring defines them.

    Args:
        each: the result of `loss_weights`
        scale: of the gradients

    Returns:
        [M + 1] the batch's part of the loss of each of the M gates, and of L_LM.
    """
    with recorded_logits(model) as recorded:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        following = batch.input_ids.masked_fill(batch.attention_mask == 0, UNLABELLED)[:, 1:]
        lm_loss = _sum_of_losses(out.logits[:, :-1].flatten(0, 1), following)
        lm_loss = lm_loss / counts.predicted
        weights = _weights_of(batch, each)
        of_gates = torch.stack(
            [_sum_of_losses(recorded[path], batch.labels, weights) for path in gates_in(model)]
        )
        of_gates = of_gates / counts.labelled
        loss = lm_loss + gate_loss_weight * of_gates.mean()
        loss.backward(torch.full_like(loss, scale))
    return torch.cat([of_gates, lm_loss[None]]).detach()


def backward_apart(
    model: PreTrainedModel,
    batch: Batch,
    each: Tensor | None,
    counts: Counts,
    gate_loss_weight: float,
) -> None:
    """As `backward_together`, for `top_k = 1`: no backward pass through the model."""
    gates, weights = gates_in(model).values(), _weights_of(batch, each)

    def teach(gate: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        with torch.enable_grad():
            logits = gate.forward(inputs[0])  # not gate(...): that would run this hook again
            loss = _sum_of_losses(logits, batch.labels, weights) / counts.labelled
            (gate_loss_weight * loss / len(gates)).backward()

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
            for gate in gates_in(model).values():
                gate.requires_grad_(requires_grad=False)
                gate.__dict__.pop("forward", None)
            for parameter, requires_grad in before:  # old gates that an error put back among them
                parameter.requires_grad_(requires_grad)


def _weights_of(batch: Batch, each: Tensor | None) -> Tensor | None:
    """[B × L] the weight of each token in L_gate; None if all are 1."""
    return None if each is None else each.flatten()[batch.kinds.clamp_min(0).flatten().cpu()]


def _sum_of_losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of logits [B × L, C] against labels [B, L]; `UNLABELLED` is left out."""
    labels = labels.flatten().to(logits.device)  # a gate may be on another device than the input
    if weights is None:
        return cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    losses = cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="none")
    return losses @ weights.to(losses.device)


def decoder_layers(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The numbered layers that hold these modules or parameters, in order."""
    places = filter(None, map(place_of, paths))
    layers = dict.fromkeys(f"{place.stem}.{place.layer}" for place in places)
    return [model.get_submodule(path) for path in layers]


@contextmanager
def computed_again(layers: Sequence[nn.Module]) -> Generator[None]:
    """A context in which layers keep no activations; the backward pass computes them again.

    transformers' own switch needs training mode, which turns dropout on.
    """
    with ExitStack() as replaced:
        for layer in layers:
            again = partial(_with_routes_again, layer, layer.forward)
            replaced.enter_context(replaced_forward(layer, again))
        yield


def _with_routes_again(
    layer: nn.Module,
    forward: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A layer's output; the backward pass computes it again with the routes of this pass."""
    run = as_in_this_pass(layer, forward)
    return checkpoint(run, *args, use_reentrant=False, **kwargs)
