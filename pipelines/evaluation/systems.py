"""One loaded model as each of the systems that it is compared with.

The base is the model without its experts, an adapter alone is the model with that expert forced;
tests prove both equal to the real thing. So no second model is ever loaded.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import MeteoraError
from meteora.model.fused import force_expert, make_router, routed_by, without_experts
from meteora.routing.layer import routed_layers
from pipelines.evaluation.measurements import BASE, FUSED, TOLD
from pipelines.evaluation.oracle_routing import told

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import MergeSpec, RouterSpec
    from meteora.routing.layer import MoELoRALinear
    from pipelines.evaluation.measurements import Measurement
    from pipelines.evaluation.tasks import Task


def as_system(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measurement: Measurement,
    tasks: Mapping[str, Task],
    merges: Mapping[str, MergeSpec],
    others: Mapping[str, RouterSpec],
) -> AbstractContextManager[None]:
    """The model as the system that is measured, until the context ends.

    Args:
        tasks: all tasks, by name
        merges: static merges to compare with, by method
        others: routers to compare with, by kind
    """
    system, composites = measurement.system, tasks[measurement.spec.task].composites
    if composites and system in TOLD:
        return told(model, tokenizer, composites, system)
    if system == FUSED:
        return nullcontext()
    if system == BASE:
        return without_experts(model)
    if measurement.adapter:
        return force_expert(model, measurement.adapter)
    if system in merges:
        return merged(model, merges[system])
    return routed_as(model, others[system])


def routed_as(model: PreTrainedModel, spec: RouterSpec) -> AbstractContextManager[None]:
    """The model with another router in every layer."""
    number = count(spec.seed * len(routed_layers(model)))  # every layer draws for itself
    return routed_by(
        model,
        lambda layer: make_router(spec.options, layer, seed=next(number)),
    )


@contextmanager
def merged(model: PreTrainedModel, spec: MergeSpec) -> Generator[None]:
    """The base with all experts merged into one change of each layer, as PEFT merges them.

    The whole B A of each expert is merged, so experts of any ranks can be; one that lacks a layer
    has no say there. The base's weights are left alone: what the merge adds is computed beside
    them, which needs as much memory as the layers that it changes.
    """
    with ExitStack() as hooks, torch.random.fork_rng():
        torch.manual_seed(spec.seed)  # of what DARE drops
        for layer in routed_layers(model).values():
            delta = merge_deltas(layer, spec).to(layer.weight.dtype)
            hook = layer.projection.register_forward_hook(_adding(delta))
            hooks.callback(hook.remove)
        with without_experts(model):
            yield


def _adding(delta: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds to a projection's output what `delta` [OUT, IN] makes of its input."""

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + torch.nn.functional.linear(inputs[0], delta)

    return add


def merge_deltas(layer: MoELoRALinear, spec: MergeSpec) -> Tensor:
    """What the merge adds to a layer's weight [OUT, IN], in float32."""
    from peft.utils import merge_utils  # noqa: PLC0415  (seconds, and only merges need it)

    device, stack = layer.weight.device, layer.stack
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
    if spec.method == "ties":
        return merge_utils.ties(deltas, weights, spec.density)
    if spec.method == "dare_ties":
        return merge_utils.dare_ties(deltas, weights, spec.density)
    raise MeteoraError(f"merge {spec.method!r} is none of linear, ties, dare_ties")
