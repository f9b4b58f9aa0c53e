"""Experts without examples, in company of experts that have some."""

import re
from dataclasses import replace

import pytest
import torch

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.artifacts.routers import POINT_GATES
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import GATES, CheckpointError
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import TrainingError
from meteora.kernels import reference
from meteora.model.fused import insert_experts
from meteora.routing.gates import gates_of, insert_gates
from meteora.routing.hooks import recorded_logits
from meteora.routing.layer import routed_layers
from meteora.routing.routers import Arrow, Gate
from meteora.routing.weight_scores import StandIn
from tests.meteora.fitting.test_calibrate import examples, routing_accuracy
from tests.meteora.routing.test_layer import make

LAYER, LATER = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def gate_of(model, path):
    gate = routed_layers(model)[path].router
    assert isinstance(gate, Gate)
    return gate


@pytest.fixture(scope="module", params=["arrow", "norm"])
def mixed(request, world):
    """The world's model: gates of three experts are fitted, the fourth is told by its weights."""
    model = world.load()
    calibrate(model, examples(8, experts=range(3)), replace(POINT_GATES, stand_in=request.param))
    return request.param, model


def test_the_experts_with_examples_lose_next_to_nothing(world, mixed):
    _, model = mixed
    alone = world.load()
    assert routing_accuracy(model, examples(4, seed=9, experts=range(3))) > 0.9
    with pytest.raises(TrainingError, match="has 0 examples"):
        calibrate(alone, examples(8, experts=range(3)))


def test_a_token_along_what_the_expert_acts_on_goes_to_it(mixed):
    _, model = mixed
    assert gate_of(model, LAYER).stand_in.experts == [3]
    own = routed_layers(model)[LATER]
    direction = Arrow(own.stack, POINT_GATES).get_buffer("prototypes")[3]
    tokens = torch.stack([direction * 1e3, torch.zeros_like(direction)])
    chosen = gate_of(model, LATER)(tokens).argmax(-1).tolist()
    assert chosen[0] == 3
    assert chosen[1] != 3


def test_an_expert_is_never_chosen_where_it_lacks_the_layer(mixed):
    _, model = mixed
    tokens = torch.randn(200, 32) * 100
    # `patterns` begins with the second layer
    assert routed_layers(model)[LAYER].stack.ranks[3] == 0
    logits = gate_of(model, LAYER)(tokens)
    assert not (logits.argmax(-1) == 3).any()
    weights, experts = reference.route(logits, 2, 1.0)
    assert not weights[experts == 3].any()


def test_one_held_out_token_scales_no_expert_to_nan(world):
    layer = routed_layers(world.load())[LATER]
    options = replace(POINT_GATES, stand_in="norm")
    found = StandIn.scaled(options, layer, [0, 2], torch.randn(1, 32))
    assert (found.above_best(torch.randn(5, 32)) < -1_000).all()


def test_of_the_tokens_it_is_measured_on_one_in_a_hundred_goes_astray(world):
    layer = routed_layers(world.load())[LATER]
    tokens = torch.randn(4000, 32)
    options = replace(POINT_GATES, stand_in="arrow")
    found = StandIn.scaled(options, layer, [0, 2], tokens).above_best(tokens)
    assert 0.005 < (found.max(-1).values > 0).float().mean() <= 0.0101


class Unsearched(list[int]):
    def __contains__(self, _one):
        raise AssertionError("searched")


@torch.no_grad()
def test_no_pass_looks_at_the_choices_one_by_one():
    """With hundreds of them, that took a millisecond a module and token."""
    layer = make(ranks=(1, 2, 3, 1))
    score = Arrow(layer.stack, POINT_GATES)
    stand_in = StandIn(score, Unsearched([1, 3]), torch.ones(3, 2))
    tokens, logits = torch.randn(5, 12), torch.randn(5, 4)
    found = stand_in(logits, tokens)
    best = logits[:, [0, 2]].max(-1, keepdim=True).values
    torch.testing.assert_close(found[:, [1, 3]], best + score(tokens)[:, [1, 3]] - 2)
    assert torch.equal(found[:, [0, 2]], logits[:, [0, 2]])


def test_a_mixed_checkpoint_comes_back_equal(world, mixed, tmp_path):
    kind, model = mixed
    names = list(world.adapters)
    entry = RouterOptions("gate", 1, 1.0, share="module", stand_in=kind, stand_ins=(names[3],))
    written = gates_of(model)
    assert written.without_examples == (3,)
    tensors.write_gates(tmp_path / GATES, written)
    manifest = replace(world.manifest, router=entry)
    again = world.load()
    insert_gates(again, tensors.read_gates(tmp_path, manifest), entry)
    ids = torch.tensor([examples(1, seed=4)[0].input_ids])
    with torch.no_grad(), recorded_logits(model) as before:
        model(input_ids=ids)
    with torch.no_grad(), recorded_logits(again) as after:
        again(input_ids=ids)
    for path, logits in before.items():
        assert torch.equal(logits, after[path])
    other = replace(manifest, router=replace(entry, stand_ins=tuple(names[2:])))
    with pytest.raises(CheckpointError, match=r"stand_in has the shapes \[\(3, 1\)\]"):
        tensors.read_gates(tmp_path, other)


@pytest.mark.parametrize(
    ("name", "asked"), [("(mean)", {"opening": "shared"}), ("(base)", {"null": True})]
)
def test_nothing_stands_in_for_the_tokens_of_all_experts_or_of_none(world, name, asked):
    model = world.load_base()
    router = replace(world.manifest.router, **asked)
    insert_experts(model, world.checkpoint, replace(world.manifest, router=router))
    options = replace(POINT_GATES, stand_in="norm", **asked)
    with pytest.raises(TrainingError, match=re.escape(f"expert {name} has 0 examples")):
        calibrate(model, examples(4, experts=range(3)), options)


def test_only_arrow_and_norm_can_stand_in(world):
    with pytest.raises(MeteoraError, match="'uniform' cannot stand in"):
        calibrate(
            world.load(), examples(4, experts=range(3)), replace(POINT_GATES, stand_in="uniform")
        )
