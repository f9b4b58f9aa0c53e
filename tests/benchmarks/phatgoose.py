"""PHATGOOSE (arXiv 2402.05859): each adapter learns its own gate, alone, and all are put together.

For an adapter that changes a module, a vector v with

    y = W x + sigmoid(v · x) · scaling · B A x

learns from the adapter's own examples, all else frozen. Afterwards v and the tokens are brought to
mean 0 and standard deviation 1, each by itself, and with n inputs

    logits_e = v_e · x / sqrt(n)        y = W x + sum over the two largest  softmax(logits)_e ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from meteora.artifacts import RouterOptions
from meteora.routing.layer import routed_layers
from meteora.routing.routers import Router
from pipelines.stages.train_adapters import fit, lessons, shuffled_for_ever

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tests.benchmarks.gate_world import World

STEPS, BATCH_SIZE, PEAK = 100, 4, 5e-3
TOP_K = 2
EPSILON = 1e-6


class OneGate(Router):
    """One expert, as much of it as its gate says; v starts at 0, so with a half."""

    def __init__(self, expert: int, num_experts: int, num_inputs: int) -> None:
        super().__init__(num_experts, RouterOptions("gate", 1, 1.0))
        self.expert = expert
        self.v = nn.Parameter(torch.zeros(num_inputs))

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid(tokens.float() @ self.v)[:, None]
        return weights, torch.full_like(weights, self.expert, dtype=torch.long)


class AllGates(Router):
    """The gates of all experts, as they are used together."""

    def __init__(self, v: Tensor) -> None:
        """Take v [E, IN]; a row of NaN belongs to an expert that does not change this module."""
        super().__init__(len(v), RouterOptions("gate", TOP_K, 1.0))
        self.v = standardised(v)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = standardised(tokens.float()) @ self.v.T / tokens.shape[-1] ** 0.5
        return logits.nan_to_num(nan=-torch.inf)


def standardised(rows: Tensor) -> Tensor:
    """Rows [N, IN] with mean 0 and standard deviation 1."""
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / (rows.std(-1, keepdim=True, correction=0) + EPSILON)


def gates_of(world: World, model: PreTrainedModel, name: str, count: int) -> dict[str, Tensor]:
    """The v [IN] of one adapter, by the path of each module that it changes."""
    file = world.folder / f"phatgoose-{name}.safetensors"
    if not file.is_file():
        place = world.names.index(name)
        for layer in routed_layers(model).values():
            rank, num_inputs = layer.stack.pair(place)[0].shape
            layer.router = OneGate(place, len(world.names), num_inputs) if rank else None
        few = shuffled_for_ever(world.examples[name][:count])
        batches = lessons(world.tokenizer, few, BATCH_SIZE)
        fit(model, batches, steps=STEPS, peak=PEAK, what=name)
        routers = {path: layer.router for path, layer in routed_layers(model).items()}
        learnt = {path: r.v.detach() for path, r in routers.items() if isinstance(r, OneGate)}
        save_file(learnt, file)
    return load_file(file)


def put_together(world: World, model: PreTrainedModel, count: int) -> None:
    """Learn each adapter's gates from so many examples, and give all of them to the model."""
    for layer in routed_layers(model).values():
        layer.router = None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    own = {name: gates_of(world, model, name, count) for name in world.names}
    for path, layer in routed_layers(model).items():
        nobody = torch.full_like(layer.stack.a[0], torch.nan, dtype=torch.float32)
        layer.router = AllGates(torch.stack([own[name].get(path, nobody) for name in world.names]))
