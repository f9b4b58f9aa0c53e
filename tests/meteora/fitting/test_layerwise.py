"""A sweep hands each module what the whole model would, whatever the parts of a layer are like."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from meteora.fitting.layerwise import Sweep
from tests.meteora.model.test_architectures import _Chain, routed

BATCHES = [(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))]


class _Part(nn.Module):
    """A part of a layer that returns something else than a tensor or a tuple."""

    def __init__(self, form):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.form = form

    def forward(self, x):
        return self.form(self.proj(x))


class _Formed(_Chain.Layer):
    def __init__(self, form, read):
        super().__init__()
        self.part = _Part(form)
        self.read = read

    def forward(self, hidden_states, *, before):
        x = self.read(self.part(hidden_states))
        return super().forward(hidden_states + x, before=before)


class _Repeated(_Chain.Layer):
    """Calls a part twice; another part has one of the same name, with a routed module in it."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.other = nn.ModuleDict({"part": _Part(torch.sin)})

    def forward(self, hidden_states, *, before):
        x = self.part(hidden_states + self.other["part"](hidden_states))
        return super().forward(self.part(x), before=before)


def check(layer, path):
    """Compare the input of a layer's last module, after that at `path`, with the whole model's."""
    model: Any = _Chain(linked=False)
    model.layers[1] = layer
    seen = []
    with torch.inference_mode():
        hook = layer.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.run(*BATCHES[0], use_cache=False)
        hook.remove()
    for one in (path, "layers.1.proj"):
        routed(model, one)
    sweep = Sweep(model, BATCHES)
    sweep.advance(0)
    for _ in range(3):
        torch.testing.assert_close([*sweep.inputs(1, "layers.1.proj")], seen)


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (namedtuple("Named", "states"), lambda out: out.states),
        (BaseModelOutput, lambda out: out.last_hidden_state),
        (lambda x: [x], lambda out: out.pop()),
    ],
    ids=["a named tuple", "an output of transformers", "a list"],
)
def test_a_part_of_a_layer_may_return_what_it_likes(form, read):
    check(_Formed(form, read), "layers.1.part.proj")


def test_a_part_that_a_layer_calls_twice_is_computed_twice():
    check(_Repeated(), "layers.1.other.part.proj")


def test_an_output_that_is_overwritten_and_computed_again_takes_its_room_once():
    model: Any = _Chain(linked=False)
    model.layers[1] = _Formed(lambda x: x, lambda out: out.mul_(2))
    for path in ("layers.1.part.proj", "layers.1.proj"):
        routed(model, path)
    sweep = Sweep(model, BATCHES)
    sweep.advance(0)
    for _ in range(3):
        (x,) = sweep.inputs(1, "layers.1.proj")
        assert sweep._output_bytes == 2 * x.nbytes  # of the module, and of the part around it
