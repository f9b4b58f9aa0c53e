"""What is recorded is what the layers did, and nothing is paid outside the block."""

from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import nn

from meteora.artifacts import RouterOptions
from meteora.kernels import reference
from meteora.model.fused import make_router, without_experts
from meteora.routing.hooks import recorded_logits, recorded_routes
from meteora.routing.layer import routed_by, routed_layers
from tests.meteora.routing.test_layer import Allocations, make


@pytest.fixture
def model(world):
    model = world.load()
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        yield model


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("recorded", [recorded_logits, recorded_routes])
def test_every_routed_layer_is_recorded_and_no_hook_is_left(world, model, recorded):
    ids = torch.tensor([[5, 8, 13, 21]])
    before = hooks(model)
    with torch.no_grad(), recorded(model) as found:
        model(ids)
    assert found.keys() == world.manifest.modules.keys()
    assert hooks(model) == before
    found.clear()
    model(ids)
    assert not found


@pytest.mark.parametrize("recorded", [recorded_logits, recorded_routes])
def test_outside_the_block_the_model_computes_what_it_did_before(model, recorded):
    """Operator for operator; the routes are made within."""
    ids, seen = torch.tensor([[5, 8, 13, 21]]), []
    for observed in (False, True, False):
        with ExitStack() as blocks, torch.no_grad():
            if observed:
                blocks.enter_context(recorded(model))
            seen.append(blocks.enter_context(Allocations()).sizes)
            model(ids)
    before, within, after = seen
    assert before == after
    assert (len(within) > len(before)) == (recorded is recorded_routes)


def test_routes_are_those_that_the_layer_took(model):
    """The layer's output is made again from the recorded weights and experts."""
    path = "model.layers.1.self_attn.q_proj"
    layer = routed_layers(model)[path]
    seen = []
    hook = layer.register_forward_hook(lambda _layer, args, out: seen.append((args[0], out)))
    with torch.no_grad(), recorded_routes(model) as routes, recorded_logits(model) as logits:
        model(torch.tensor([[5, 8, 13, 21], [3, 1, 4, 1]]))
    hook.remove()
    (x, out), (weights, experts) = seen[0], routes[path]
    assert weights.shape == experts.shape == (8, 2)
    tokens = x.reshape(8, -1)
    expected = layer.projection(tokens) + reference.lora_delta_loop(
        tokens, layer.stack, weights, experts
    )
    torch.testing.assert_close(out.reshape(8, -1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts[:, 0], logits[path].argmax(-1))


def test_blocks_nest_and_an_exception_leaves_no_hook(world, model):
    before = hooks(model)
    with (
        suppress(ZeroDivisionError),
        torch.no_grad(),
        recorded_logits(model) as outer,
        recorded_routes(model) as routes,
    ):
        with recorded_logits(model) as inner:
            model(torch.tensor([[5, 8, 13]]))
        model(torch.tensor([[5, 8]]))
        raise ZeroDivisionError
    assert hooks(model) == before
    assert inner.keys() == outer.keys() == routes.keys() == world.manifest.modules.keys()
    lengths = ({len(found) for found in seen.values()} for seen in (inner, outer))
    assert [*lengths] == [{3}, {2}]


def test_a_compiled_model_is_recorded_too_and_stays_compiled():
    layer, x, graphs = make(), torch.randn(3, 12), []
    model: Any = nn.Sequential(layer)

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        expected = compiled(x)
        with recorded_logits(model) as logits:
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        compiled(x)
    torch.testing.assert_close(logits, {"0": layer.router(x)})
    assert len(graphs) == 1


def test_it_is_recorded_and_compiled_again_in_whatever_order_blocks_end():
    """Such as those of two threads."""
    layer, x, ran = make(), torch.randn(3, 12), []
    model: Any = nn.Sequential(layer)
    compiled = torch.compile(model, backend=lambda graph, _: lambda *a: ran.append(1) or graph(*a))
    first, second = ExitStack(), ExitStack()
    with torch.no_grad():
        compiled(x)
        first.enter_context(recorded_logits(model))
        logits = second.enter_context(recorded_logits(model))
        first.close()
        compiled(x)
        second.close()
        assert logits
        assert len(ran) == 1
        compiled(x)
    assert len(ran) == 2


def test_the_base_alone_has_nothing_to_record(model):
    with without_experts(model), recorded_routes(model) as routes:
        model(torch.tensor([[5, 8]]))
    assert not routes
