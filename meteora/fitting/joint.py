"""Train the gates by gradient descent, as the paper does (MeteoRA, arXiv 2405.13053, section 3).

`losses` defines the loss. The gates route during training as they do afterwards; base and adapters
are frozen. (The paper's code trains the adapters too; its text says that they are frozen.)

No random number is drawn here: the sequences and the learning rate of a step follow from the seed
and the step (`training_state`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor

from meteora.artifacts import JointSettings, RouterOptions, canonical_sha256
from meteora.artifacts.routers import ANSWER_START_SHARE, POINT_GATES
from meteora.base.placement import input_device, is_offloaded, own_head, settle
from meteora.fitting.calibrate import calibrate
from meteora.fitting.losses import (
    Counts,
    backward_apart,
    backward_together,
    computed_again,
    decoder_layers,
    frozen,
    learning_gates,
    loss_weights,
)
from meteora.fitting.sequences import Batch, LabelledSequence, TrainingError, owned
from meteora.fitting.statistics import Fit
from meteora.fitting.training_state import TrainingState, chosen_sequences, learning_rate
from meteora.model.fused import expert_names
from meteora.model.opening_offsets import find_offsets
from meteora.routing.gates import gates_in, give_offsets
from meteora.routing.layer import routed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.base.chat_template import Template
    from meteora.routing.routers import Gate

LOSS_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""Factors of the loss where its gradient goes through a base in float16, in which many entries
would be too small to differ from zero. Each step takes the first with which none is too large, and
divides the gradients of the gates by it."""


class DivergedError(TrainingError):
    """A loss or a gradient is no longer finite."""


def train_jointly(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    settings: JointSettings,
    options: RouterOptions = POINT_GATES,
    *,
    template: Template | None = None,
    offsets: bool = True,
    seed: int = 0,
    folder: Path | None = None,
    checkpoint_every: int = 100,
    gradient_checkpointing: bool = False,
    sharded: bool | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Fit:
    """Give every routed layer a gate that is trained on `sequences`, in place.

    Under `accelerate launch` the processes share every batch, and the gates are those of a single
    process up to rounding. With FSDP each process holds only a part of the base, even at the start
    if the layers are still on disk (`loading.layers_on_disk`).

    Args:
        model: with its experts inserted; routers that it has are replaced
        sequences: two or more for each expert
        settings: as recorded in the router's spec
        options: how the gates route, in training and afterwards
        template: as in `calibrate`
        offsets: as in `calibrate`; they are not trained
        seed: shuffles the sequences
        folder: for the state; a training resumes from a state that is there
        checkpoint_every: steps from one state to the next
        gradient_checkpointing: compute layers again in the backward pass, to save memory
        sharded: divide the base among the processes; None: as `accelerate launch` configures it
        scratch: a folder for hidden states that do not fit in memory, during calibration
        progress: called with (steps done, steps in all)

    Raises:
        TrainingError: an expert has too few sequences, or a batch fewer than there are processes;
            or no gradient goes through the base.
        DivergedError: a gradient is not finite; `folder` has the state before that step.
        StateError: the state in `folder` is damaged, or belongs to another training.
    """
    started = time.perf_counter()
    names = expert_names(model)
    owned(sequences, names)
    accelerator = Accelerator()
    if settings.batch_size < accelerator.num_processes:
        raise TrainingError(
            f"a batch of {settings.batch_size} sequences cannot be shared by"
            f" {accelerator.num_processes} processes; give each of them one or more"
        )
    _refuse_lost_gradients(model, options)
    routing = [options.top_k, options.temperature, options.margin, options.share]
    routing += [offsets] if offsets else []  # without them the hash is that of older versions
    asked_sha256 = canonical_sha256(
        [settings.to_dict(), *routing, seed, names]
        + [list(routed_layers(model)), None if template is None else asdict(template)]
        + [_hashed(sequence) for sequence in sequences]
    )
    state = None if folder is None else TrainingState.read(folder, asked_sha256)
    started -= state.wall_seconds if state else 0.0
    if accelerator.num_processes > 1 and not any(map(is_offloaded, model.modules())):
        torch.nn.Module.to(model, accelerator.device)
    calibrated = state is None and settings.start == "calibrate"
    with frozen(model):
        further = {"template": template, "seed": seed, "scratch": scratch}
        gates = _first_gates(
            model, sequences, options, calibrated=calibrated, offsets=offsets, **further
        )
        each = loss_weights(sequences, len(names))
        learner = _Learner(model, gates, settings, accelerator, each)
        by_fsdp = accelerator.distributed_type == DistributedType.FSDP
        if accelerator.num_processes > 1 and (by_fsdp if sharded is None else sharded):
            shard(model)
        if state is not None:
            state.restore(learner.parameters, learner.optimizer)

        def save(step: int) -> None:
            if folder is not None and accelerator.is_main_process:
                seconds = time.perf_counter() - started
                learnt = learner.parameters, learner.optimizer
                TrainingState.of(step, *learnt, wall_seconds=seconds).write(folder, asked_sha256)

        layers = decoder_layers(model, routed_layers(model))
        with computed_again(layers) if gradient_checkpointing else nullcontext():
            for step in range(state.step if state else 0, settings.steps):
                chosen = chosen_sequences(len(sequences), settings, seed, step)
                try:
                    learner.learn(step, [sequences[i] for i in chosen])
                except DivergedError:
                    save(step)
                    accelerator.wait_for_everyone()  # who ends first may end the one that writes
                    raise
                if (step + 1) % checkpoint_every == 0 or step + 1 == settings.steps:
                    save(step + 1)
                progress(step + 1, settings.steps)
    return Fit(
        num_tokens=Counts.of(sequences).labelled,
        heldout_accuracy=None,
        wall_seconds=time.perf_counter() - started,
    )


def _hashed(sequence: LabelledSequence) -> list[object]:
    answer_starts = [sequence.answer_starts, ANSWER_START_SHARE] if sequence.answer_starts else []
    return [sequence.input_ids, sequence.experts, *answer_starts]


def _first_gates(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    options: RouterOptions,
    *,
    calibrated: bool,
    offsets: bool,
    **further: Any,  # noqa: ANN401
) -> dict[str, Gate]:
    """Trainable gates by module path: in closed form, or zero.

    Args:
        further: arguments of `calibrate`
    """
    few = sequences
    if not calibrated:  # gates at zero need no fit, only their places: two of each expert suffice
        chosen = {i for own in owned(sequences, expert_names(model)) for i in own[:2]}
        few = [sequences[i] for i in sorted(chosen)]
    calibrate(model, few, options, refined=False, offsets=offsets and calibrated, **further)
    if offsets and not calibrated:
        pairs = [(sequence.input_ids, sequence.experts) for sequence in sequences]
        rows = find_offsets(model, pairs)
        for path, layer in routed_layers(model).items():
            give_offsets(layer, rows.get(path))
    return learning_gates(model, zeros=not calibrated)


def _refuse_lost_gradients(model: PreTrainedModel, options: RouterOptions) -> None:
    """Refuse bitsandbytes' 4-bit layers in the form for new CPUs: they pass no gradient."""
    for path, module in model.named_modules():
        packed = getattr(module, "support_avx512bf16_for_cpu", False)
        if options.top_k > 1 and packed and next(module.parameters()).device.type == "cpu":
            raise TrainingError(
                f"{path}: no gradient goes through linear layers of 4 bits on this CPU, and gates"
                " with `top_k` above 1 are trained through them; choose `top_k: 1` or"
                " `method: calibrate`, or train on a GPU"
            )


class _Learner:
    """The gates of a model and their optimiser."""

    def __init__(
        self,
        model: PreTrainedModel,
        gates: dict[str, Gate],
        settings: JointSettings,
        accelerator: Accelerator,
        each: Tensor | None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.accelerator = accelerator
        self.each = each
        self.parameters = {
            f"{path}.{name}": parameter
            for path, gate in gates.items()
            for name, parameter in gate.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=0.0)
        self.device = input_device(model)
        self._one_expert = next(iter(gates.values())).options.top_k == 1
        through_16_bits = model.dtype == torch.float16 and not self._one_expert
        self._loss_scales = LOSS_SCALES if through_16_bits else LOSS_SCALES[-1:]
        if accelerator.num_processes > 1:
            for parameter in self.parameters.values():
                broadcast(parameter.data)

    def learn(self, step: int, sequences: list[LabelledSequence]) -> None:
        """Take one step of the optimiser, unless a gradient is not finite."""
        for scale in self._loss_scales:
            self.optimizer.zero_grad()
            grads = self._gradients(sequences, scale)
            norm = torch.nn.utils.get_total_norm(grads.values())
            if norm.isfinite():
                break
        else:  # before clipping, which would spread NaN to all gradients
            raise _diverged(step, grads)
        torch.nn.utils.clip_grads_with_norm_(
            self.parameters.values(), self.settings.max_grad_norm, norm
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self, sequences: list[LabelledSequence], scale: float) -> dict[str, Tensor]:
        """The gradient of each parameter for one step, by name; it is in the parameter, too."""
        counts, size = Counts.of(sequences), self.settings.batch_size
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for first in range(0, len(sequences), size):
            own = sequences[first : first + size][rank::world]
            asked = self.model, Batch.of(own, self.device), self.each, counts
            with _fast(self.model, self.device):
                if self._one_expert:
                    backward_apart(*asked, self.settings.gate_loss_weight)
                else:
                    backward_together(*asked, self.settings.gate_loss_weight, scale)
        self._add_up()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for grad in grads.values():
            grad.div_(scale)
        return grads

    def _add_up(self) -> None:
        """Sum the gradients over the processes, in place."""
        if self.accelerator.num_processes == 1:
            return
        trained = {p: p.grad.flatten() for p in self.parameters.values() if p.grad is not None}
        total = self.accelerator.reduce(torch.cat([*trained.values()]), "sum")
        sums = total.split([len(grad) for grad in trained.values()])
        for parameter, grad in zip(trained, sums, strict=True):
            parameter.grad = grad.view_as(parameter)


def _diverged(step: int, grads: Mapping[str, Tensor]) -> DivergedError:
    """Name the first gate whose gradient is not finite, or the largest, whose square is not."""
    name = max(grads, key=lambda name: grads[name].abs().max().nan_to_num(torch.inf).item())
    return DivergedError(
        f"step {step + 1}: the gradient of the gate of {name.rpartition('.')[0]} is not finite,"
        f" or too large, and the gates are left as they were after step {step}; lower the"
        " learning rate, raise a `temperature` that is nearly zero, or look for NaN in the base"
        " and the adapters"
    )


def _fast(model: PreTrainedModel, device: torch.device) -> torch.autocast:
    """Run a float32 base in bfloat16 on a GPU that supports it; a 16-bit base stays as it is."""
    enabled = (
        device.type == "cuda"
        and model.dtype == torch.float32
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def shard(model: PreTrainedModel) -> None:
    """Divide the base among the processes, layer by layer; every process has all gates.

    Layers on disk are read one at a time, so a process holds at most one of them as a whole. The
    embeddings, and a head that has its own weights, are gathered like a layer.
    """
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (a second, and few recipes need it)

    gates = {parameter for gate in gates_in(model).values() for parameter in gate.parameters()}
    for layer in decoder_layers(model, routed_layers(model)):
        settle(layer)
        fully_shard(layer, ignored_params=gates & set(layer.parameters()))
    settle(model)
    if (head := own_head(model)) is not None:  # else both are one, and in use from first to last
        for part in (model.get_input_embeddings(), head):
            fully_shard(part)
    fully_shard(model, ignored_params=gates)
