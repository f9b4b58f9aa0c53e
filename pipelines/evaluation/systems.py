"""One loaded model in the place of each system to compare.

The base is the model without its experts, and an adapter alone is the model with that expert
forced; tests show that both equal the real ones. So a second model is never loaded.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora.model.fused import force_expert, make_router, without_experts
from meteora.routing.layer import MoELoRALinear, routed_by, routed_layers
from pipelines.evaluation.measurements import BASE, FUSED, ORACLES, Measurement, control_of
from pipelines.evaluation.oracle_routing import use_oracle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import MergeSpec, RouterSpec
    from pipelines.evaluation.measurements import Subjects
    from pipelines.evaluation.tasks import Task


def use_system(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measurement: Measurement,
    task: Task,
    subjects: Subjects,
) -> AbstractContextManager[None]:
    """The model as the system of a measurement on a task, until the context ends."""
    system = measurement.system
    if task.composites and system in ORACLES:
        return use_oracle(model, tokenizer, task.composites, system)
    if system == FUSED or control_of(system, task):  # `Conversing` routes a control itself
        return nullcontext()
    if system == BASE:
        return without_experts(model)
    if measurement.adapter:
        return force_expert(model, measurement.adapter)
    if system in subjects.merges:
        return use_merge(model, subjects.merges[system])
    return use_router(model, subjects.others[system])


def use_router(model: PreTrainedModel, spec: RouterSpec) -> AbstractContextManager[None]:
    """The model with another router in every layer, until the context ends."""
    number = count(spec.seed * len(routed_layers(model)))  # every layer has its own seed
    return routed_by(model, lambda layer: make_router(spec.options, layer, seed=next(number)))


@contextmanager
def use_merge(model: PreTrainedModel, spec: MergeSpec) -> Generator[None]:
    """The base with all experts merged in every layer, as PEFT merges them; until the context ends.

    The products B A are merged, so the experts can have any ranks. An expert takes no part at a
    layer that its adapter does not change. The base's weights stay: the merge is a second weight
    whose output is added, so it needs as much memory as the weights of those layers.
    """
    with ExitStack() as hooks, torch.random.fork_rng():
        torch.manual_seed(spec.seed)  # DARE drops at random
        for layer in routed_layers(model).values():
            # a quantised layer computes in the model's dtype
            one = layer.weight if layer.weight.is_floating_point() else model
            delta = merge_deltas(layer, spec).to(one.dtype)
            hooks.enter_context(layer.projection.register_forward_hook(partial(_add, delta)))
        with without_experts(model):
            yield


def _add(delta: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A projection's output, and `delta` [OUT, IN] times its input."""
    return output + torch.nn.functional.linear(inputs[0], delta)


def merge_deltas(layer: MoELoRALinear, spec: MergeSpec) -> Tensor:
    """The merge's change of a layer's weight: [OUT, IN], float32."""
    from peft.utils import merge_utils  # noqa: PLC0415  (slow to import; only merges need it)

    device, stack = layer.device, layer.stack
    parts = zip(
        stack.a.split(stack.ranks), stack.b.split(stack.ranks, dim=1), stack.scaling, strict=True
    )
    deltas = [
        scaling * b.to(device, torch.float32) @ a.to(device, torch.float32)
        for a, b, scaling in parts
        if len(a)
    ]
    weights = torch.full((len(deltas),), spec.weight, device=device)
    if spec.method == "linear":
        return merge_utils.task_arithmetic(deltas, weights)
    merge = {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties}[spec.method]
    return merge(deltas, weights, spec.density)
