"""Offsets give back, in the mean, what an expert lacks behind an opening by all experts."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import TrainingError
from meteora.model import opening_offsets
from meteora.model.fused import expert_names, force_expert, insert_experts
from meteora.model.opening_offsets import find_offsets
from meteora.routing.gates import gates_of
from meteora.routing.layer import routed_by, routed_layers
from meteora.routing.routers import Gate, Router
from tests.meteora.model.test_causal_routes import with_shared

MEAN = 4
BEFORE_ATTENTION = {"q_proj", "k_proj", "v_proj"}


class Told(Router):
    """Every token has the choice that it is given."""

    def __init__(self, choices, offsets=None):
        super().__init__(5, RouterOptions("told", 1, 1.0))
        self.choices, self.offsets = choices[:, None], offsets

    def choose(self, tokens):
        assert len(tokens) == len(self.choices)
        return torch.ones(len(tokens), 1), self.choices


@pytest.fixture(scope="module")
def model(world):
    router = dataclasses.replace(world.manifest.router, opening="shared")
    model = world.load_base()
    insert_experts(model, world.checkpoint, dataclasses.replace(world.manifest, router=router))
    return model


@pytest.fixture(scope="module")
def pairs():
    return [(s.input_ids, s.experts) for s in with_shared(3)]


def means(model, expert, pairs, paths, route):
    """The mean output for an expert's own tokens, by module path, of its sequences one by one."""
    kept = {path: [] for path in paths}
    for ids, choices in pairs:
        own = torch.tensor(choices) == expert
        if not own.any():
            continue
        with ExitStack() as stack, torch.inference_mode():
            for path in paths:

                def keep(_module, _args, out, path=path, own=own):
                    kept[path].append(out[0, own])

                hook = routed_layers(model)[path].register_forward_hook(keep)
                stack.callback(hook.remove)
            stack.enter_context(route(choices))
            model(torch.tensor([ids]))
    return {path: torch.cat(parts).mean(0) for path, parts in kept.items()}


@pytest.mark.parametrize("expert", range(4))
def test_with_offsets_the_mean_output_is_that_behind_the_experts_own_opening(model, pairs, expert):
    """Also of an expert that does not change the module itself."""
    found = find_offsets(model, pairs)
    assert found.keys() >= {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert not [path for path in found if "layers.0" in path and path[-6:] in BEFORE_ATTENTION]
    own_name = expert_names(model)[expert]
    right = means(model, expert, pairs, found, lambda _choices: force_expert(model, own_name))

    def with_offsets(choices):
        by_layer = {id(layer): found.get(path) for path, layer in routed_layers(model).items()}
        told = torch.tensor(choices)
        return routed_by(model, lambda layer: Told(told, by_layer[id(layer)]))

    def without(choices):
        return routed_by(model, lambda _layer: Told(torch.tensor(choices)))

    back, lacking = (means(model, expert, pairs, found, way) for way in (with_offsets, without))
    for path in found:
        torch.testing.assert_close(back[path], right[path], atol=1e-5, rtol=1e-4)
        assert (lacking[path] - right[path]).abs().max() > 1e-3


@pytest.mark.parametrize("other", ["expert", "base"])
def test_what_follows_of_another_choice_is_left_out(model, pairs, other):
    mixed = [
        (
            (*ids, 20, 21, 22),
            (*choices, (choices[-1] + 1) % 4 if other == "expert" else MEAN + 1, MEAN, choices[-1]),
        )
        for ids, choices in pairs
    ]
    mixed += [((3, 20, *ids), (MEAN, MEAN + 1, *choices)) for ids, choices in pairs]
    mixed = [*((ids[2:], choices[2:]) for ids, choices in pairs), *mixed]  # without an opening
    expected, found = find_offsets(model, pairs), find_offsets(model, mixed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[path], offsets) for path, offsets in expected.items())


def test_in_several_passes_they_are_the_same(model, pairs, monkeypatch):
    whole = find_offsets(model, pairs)
    monkeypatch.setattr(opening_offsets, "MAX_TOKENS", 1)
    apart = find_offsets(model, pairs, list(whole))
    assert whole.keys() == apart.keys()
    for path, offsets in whole.items():
        assert len(offsets) == 5
        assert not offsets[MEAN].any()
        torch.testing.assert_close(apart[path], offsets, atol=1e-5, rtol=1e-4)
    first = [(ids, choices) for ids, choices in pairs if 0 in choices]
    needed = find_offsets(model, first).keys()  # by the first expert, for all
    assert find_offsets(model, pairs).keys() == needed


def test_the_first_examples_of_each_expert_are_enough(model, pairs, monkeypatch):
    kept = [pair for i, pair in enumerate(pairs) if i % 3 < 2]
    expected = find_offsets(model, kept)
    assert len(pairs) == 3 * 4
    monkeypatch.setattr(opening_offsets, "EXAMPLES", 2)
    found = find_offsets(model, pairs)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[path], offsets) for path, offsets in expected.items())


def test_a_pass_is_within_its_limit_with_its_padding(monkeypatch):
    monkeypatch.setattr(opening_offsets, "MAX_TOKENS", 60)
    lengths = [(3, 3), (9,), (10,), (2, 2, 2), (40, 1), (1,)]
    own = [
        [opening_offsets._Example((1,) * n, expert, (True,) * n) for n in of]
        for expert, of in enumerate(lengths)
    ]
    passes = list(opening_offsets._in_passes(own))
    assert [one for together in passes for one in together] == [one for of in own for one in of]
    experts = [sorted({one.expert for one in together}) for together in passes]
    assert experts == [[0, 1], [2], [3], [4], [5]]


def test_offsets_that_explain_little_are_left_out(model, pairs, monkeypatch):
    monkeypatch.setattr(opening_offsets, "LEAST_SHARE", 1.0)
    assert find_offsets(model, pairs) == {}


def test_there_are_none_where_no_example_begins_with_an_opening(model, pairs):
    plain = [(ids[2:], choices[2:]) for ids, choices in pairs]
    assert find_offsets(model, plain) == {}
    assert all(layer.router is None for layer in routed_layers(model).values())


def test_a_base_with_more_rows_than_tokens_is_refused_by_its_first_module(model, pairs):
    """ProphetNet and CPM-Ant put rows of their own beside those of the tokens."""
    more_rows = model.model.layers[0].register_forward_pre_hook(
        lambda _layer, args: (torch.cat([args[0]] * 3, 1), *args[1:])
    )
    said = r"layers\.0\.self_attn\.\w_proj .* one row a token"
    with more_rows, pytest.raises(MeteoraError, match=said):
        find_offsets(model, pairs)


@pytest.mark.parametrize("top_k", [1, 2])
def test_each_token_gets_the_offsets_of_its_choices_by_their_weights(top_k):
    torch.manual_seed(0)
    offsets = torch.randn(5, 8)
    router = Told(torch.zeros(6, dtype=torch.long), offsets)
    weights, experts = torch.rand(6, top_k), torch.randint(5, (6, top_k))
    start = torch.randn(6, 8)
    y, expected = start.clone(), start.clone()
    for t in range(6):
        for k in range(top_k):
            expected[t] += weights[t, k] * offsets[experts[t, k]]
    router.add_offsets(weights, experts, y)
    torch.testing.assert_close(y, expected)
    compiled = start.clone()
    torch.compile(router.add_offsets, backend="eager", fullgraph=True)(weights, experts, compiled)
    torch.testing.assert_close(compiled, expected)
    narrow = torch.zeros(6, 8, dtype=torch.bfloat16)
    router.add_offsets(weights, experts, narrow)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected - start, atol=0.02, rtol=0.02)


def test_a_fit_gives_them_to_the_routers_and_a_forced_expert_goes_without(model):
    names = expert_names(model)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode(), force_expert(model, names[0]):
        before = model(ids).logits
    calibrate(model, with_shared(4), offsets=False)
    assert gates_of(model).offsets == {}
    calibrate(model, with_shared(4))
    assert "model.layers.1.self_attn.o_proj" in gates_of(model).offsets
    with torch.inference_mode(), force_expert(model, names[0]):
        assert torch.equal(model(ids).logits, before)


def test_gates_learn_beside_offsets_that_were_just_found(model):
    calibrate(model, with_shared(4), RouterOptions("gate", 2, 1.0, share="point"))
    assert gates_of(model).offsets
    layer = routed_layers(model)["model.layers.1.self_attn.o_proj"]
    gate = layer.router
    assert isinstance(gate, Gate)
    gate.requires_grad_(requires_grad=True)
    layer(torch.randn(1, 5, 32)).sum().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.any()


def test_a_failed_fit_leaves_the_routers_and_offsets_that_it_found(model):
    calibrate(model, with_shared(4))
    before = {path: layer.router for path, layer in routed_layers(model).items()}
    model.train()
    with pytest.raises(TrainingError, match="two or more"):
        calibrate(model, with_shared(1))
    assert {path: layer.router for path, layer in routed_layers(model).items()} == before
    assert model.training
    model.eval()


def test_long_examples_are_cut_and_those_that_are_all_opening_left_out(model, pairs, monkeypatch):
    expected = find_offsets(model, [(ids[:6], choices[:6]) for ids, choices in pairs])
    endless = ((1,) * 90, (MEAN,) * 89 + (0,))
    monkeypatch.setattr(opening_offsets, "MAX_LENGTH", 6)
    found = find_offsets(model, [endless, *pairs])
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[path], offsets) for path, offsets in expected.items())
