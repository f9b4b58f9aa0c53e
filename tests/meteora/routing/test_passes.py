"""What a pass is called with is read however it is called, and by the watcher of that model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.routing.gates import insert_gates

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
TEMPLATE = Template(OPENING, CLOSING, OPENING[1:])
FIRST = [*OPENING, 7, 8, 9, *CLOSING]
OTHER = [*OPENING, 30, 41, 22, 35, 37, *CLOSING]


@pytest.fixture(params=["turn", "opening"])
def model(request, world):
    """Gates that look at whole prompts, and weigh single tokens enough for every change to show."""
    model = world.load()
    generator = torch.Generator().manual_seed(1)
    gates = {
        path: (3 * torch.randn(4, entry.in_features, generator=generator), torch.zeros(4))
        for path, entry in world.manifest.modules.items()
    }
    options = RouterOptions("gate", 1, 1.0)
    if request.param == "turn":
        options = RouterOptions("gate", 1, 1.0, share="turn")
    insert_gates(model, Gates(gates, template=TEMPLATE), options)
    return model


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_of_a_model_sees_its_own_passes(model, copied):
    expected = model(torch.tensor([OTHER])).logits
    model(torch.tensor([FIRST]))
    assert torch.equal(copied(model)(torch.tensor([OTHER])).logits, expected)
