"""Several threads call one model at once: each gets the answer that it gets alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.model.trace import trace
from meteora.routing.gates import insert_gates
from meteora.routing.layer import routed_layers

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
TEMPLATE = Template(OPENING, CLOSING, OPENING[1:])
ONE = [*OPENING, 7, 8, 9, *CLOSING, 60]
OTHER = [*OPENING, 30, 41, *CLOSING, 60, 61]
"""As long as `ONE`, with its question at other places."""


def interrupted(model, run, between):
    """What `run` returns if another thread calls `between` before each routed layer of its passes.

    And what the calls of the other thread return.
    """
    found, here = [], get_ident()
    with ThreadPoolExecutor(1) as other:

        def call(*_):
            if get_ident() == here:
                found.append(other.submit(between).result())

        layers = routed_layers(model).values()
        hooks = [layer.register_forward_pre_hook(call) for layer in layers]
        try:
            return run(), found
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def read(model, prompt):
    return model(torch.tensor([prompt])).logits


def gated(model, share, template=None):
    """Random gates; layers that share one follow the first of them."""
    generator, own, follows = torch.Generator().manual_seed(1), {}, {}
    leaders = {}
    for path, layer in routed_layers(model).items():
        parent, _, name = path.rpartition(".")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name, name)
        point = path.split(".")[2] if share == "layer" else (parent, first)
        if (leader := leaders.setdefault(point, path)) != path:
            follows[path] = leader
            continue
        size = layer.num_choices, layer.stack.a.shape[1]
        own[path] = 3 * torch.randn(size, generator=generator), torch.zeros(size[0])
    options = RouterOptions("gate", 1, 1.0, share=share)
    insert_gates(model, Gates(own, follows, template or Template()), options)
    return model


@pytest.mark.parametrize(
    ("share", "template"),
    [("point", None), ("layer", None), ("point", TEMPLATE), ("turn", TEMPLATE)],
)
def test_each_thread_has_its_own_decisions(world, share, template):
    model = gated(world.load(), share, template)
    expected, others = read(model, ONE), read(model, OTHER)
    got, found = interrupted(model, lambda: read(model, ONE), lambda: read(model, OTHER))
    assert torch.equal(got, expected)
    assert all(torch.equal(one, others) for one in found)


def test_a_trace_has_the_routes_of_its_own_thread(world, tokenizer):
    model = gated(world.load(), "point")

    def traced():
        return trace(model, tokenizer, ONE, max_new_tokens=1)

    expected = traced()
    got, _ = interrupted(model, traced, lambda: read(model, OTHER))
    assert got.ids == expected.ids
    assert torch.equal(got.chosen, expected.chosen)
