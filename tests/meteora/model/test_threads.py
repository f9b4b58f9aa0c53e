"""Several threads call one model at once: each gets the answer that it gets alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, get_ident

import pytest
import torch

from meteora.base.chat_template import Template
from meteora.model.trace import every_pass, trace
from meteora.routing.layer import routed_layers
from tests.meteora.serving.served_world import NO_TEMPLATE, gated

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


@pytest.mark.parametrize(
    ("share", "template"),
    [("point", NO_TEMPLATE), ("layer", NO_TEMPLATE), ("point", TEMPLATE), ("turn", TEMPLATE)],
)
def test_each_thread_has_its_own_decisions(world, share, template):
    model = gated(world, share, template)
    expected, others = read(model, ONE), read(model, OTHER)
    got, found = interrupted(model, lambda: read(model, ONE), lambda: read(model, OTHER))
    assert torch.equal(got, expected)
    assert all(torch.equal(one, others) for one in found)


def test_a_trace_has_the_routes_of_its_own_thread(world, tokenizer):
    model = gated(world, "point")

    def traced():
        return trace(model, tokenizer, ONE, max_new_tokens=1)

    expected = traced()
    got, _ = interrupted(model, traced, lambda: read(model, OTHER))
    assert got.ids == expected.ids
    assert torch.equal(got.chosen, expected.chosen)


def test_a_trace_may_end_while_another_thread_begins_a_pass(world):
    """The hook of the trace is then called once more, as it is removed."""
    model, begun, ended = gated(world, "point"), Event(), Event()
    expected = read(model, ONE)

    def wait(*_):
        begun.set()
        ended.wait(10)

    with ThreadPoolExecutor(1) as other, model.register_forward_pre_hook(wait):
        with every_pass(model) as passes:
            found = other.submit(read, model, ONE)
            begun.wait(10)
        ended.set()
        assert torch.equal(found.result(), expected)
    assert not passes


def test_hidden_states_of_a_conversation_go_on_in_another_thread(world):
    """The cache has the decisions, also one that the base makes without the whole model."""
    model, more = gated(world, "turn", TEMPLATE), torch.tensor([[60]])
    expected = read(model, [*ONE, 60])

    @torch.no_grad()
    def go_on(cache):
        return model.base_model(more, past_key_values=cache).last_hidden_state

    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        cache = model.base_model(torch.tensor([ONE]), use_cache=True).past_key_values
        hidden = other.submit(go_on, cache).result()
        torch.testing.assert_close(model.lm_head(hidden)[:, -1], expected[:, -1])


def test_each_thread_has_its_own_decisions_in_compiled_code(world):
    model = gated(world, "point", TEMPLATE)
    compiled = torch.compile(model, backend="eager")
    with ThreadPoolExecutor(1) as other:
        for prompt in (ONE, [*OTHER, 62], ONE):  # a second length compiles for all lengths
            found = read(compiled, prompt), other.submit(read, compiled, prompt).result()
            expected = read(model, prompt)
            torch.testing.assert_close(found, (expected, expected))
