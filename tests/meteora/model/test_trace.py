"""A trace says where every token went: what the layers did, and not what they would have done."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from meteora.artifacts import RouterOptions
from meteora.checkpoint.manifest import ModuleEntry
from meteora.kernels import reference
from meteora.model.fused import (
    EXPERTS,
    force_expert,
    insert_layer,
    load,
    make_router,
    without_experts,
)
from meteora.model.trace import Pieces, TraceError, trace
from meteora.routing.hooks import recorded_logits
from meteora.routing.layer import routed_by, routed_layers

TEXT = "where do these go?"


@pytest.fixture
def model(world):
    """Routed by norms, two experts a token: every token is sent by itself."""
    model = world.load()
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        yield model


@pytest.fixture
def prompt(tokenizer):
    return tokenizer(TEXT).input_ids


@pytest.mark.parametrize(
    "asked", [{"use_cache": False, "num_beams": 3}, {"cache_implementation": "static"}]
)
def test_a_base_whose_config_asks_for_beams_no_cache_or_a_static_one_is_traced_as_others(
    model, tokenizer, prompt, monkeypatch, asked
):
    expected = trace(model, tokenizer, prompt, max_new_tokens=4)
    for name, value in asked.items():
        monkeypatch.setattr(model.generation_config, name, value)
    found = trace(model, tokenizer, prompt, max_new_tokens=4)
    assert found.ids == expected.ids
    assert torch.equal(found.chosen, expected.chosen)


def test_a_forced_expert_takes_every_token_of_prompt_and_answer(model, tokenizer, prompt):
    with force_expert(model, "q_and_v"):
        found = trace(model, tokenizer, prompt, max_new_tokens=5)
    assert found.experts[2] == "q_and_v"
    assert found.modules == tuple(routed_layers(model))
    assert found.chosen.shape == (len(found.modules), len(prompt) + 5, 1)
    assert (found.chosen == 2).all()
    assert (found.weights == 1).all()
    assert torch.equal(found.shares()[:, 2], torch.ones(len(prompt) + 5))


def test_a_trace_with_a_cache_is_what_one_forward_pass_over_all_of_it_says(
    model, tokenizer, prompt
):
    found = trace(model, tokenizer, prompt, max_new_tokens=8)
    assert len(found.ids) == len(prompt) + 8
    with torch.inference_mode(), recorded_logits(model) as logits:
        model(torch.tensor([found.ids]))
    for m, (path, layer) in enumerate(routed_layers(model).items()):
        lacking = torch.tensor([rank == 0 for rank in layer.stack.ranks])  # they get no weight
        own = logits[path].masked_fill(lacking, -torch.inf)
        weights, chosen = reference.route(own, 2, 0.5)
        assert torch.equal(found.chosen[m], chosen), path
        torch.testing.assert_close(found.weights[m], weights, rtol=1e-4, atol=1e-4)
    assert len(found.chosen.unique()) > 1  # or the claim would be empty


def test_the_answer_is_the_one_that_the_model_gives_untraced(model, tokenizer, prompt):
    found = trace(model, tokenizer, prompt, max_new_tokens=8)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert found.ids == tuple(out[0].tolist())
    assert "".join(found.pieces) == tokenizer.decode(out[0])
    assert found.num_prompt == len(prompt)


def test_without_new_tokens_the_prompt_alone_is_traced(model, tokenizer, prompt):
    found = trace(model, tokenizer, prompt)
    assert "".join(found.pieces) == TEXT
    longer = trace(model, tokenizer, prompt, max_new_tokens=2)
    assert torch.equal(found.chosen, longer.chosen[:, : len(prompt)])


def test_shares_are_mean_weights_over_all_modules_or_those_of_a_layer(model, tokenizer, prompt):
    found = trace(model, tokenizer, prompt)
    assert set(found.layers) == {0, 1}
    for layer in (None, 1):
        expected = torch.zeros(len(prompt), len(found.experts))
        kept = [m for m, path in enumerate(found.modules) if layer is None or ".1." in path]
        for m in kept:
            for t in range(len(prompt)):
                for e, w in zip(found.chosen[m, t], found.weights[m, t], strict=True):
                    expected[t, e] += w / len(kept)
        torch.testing.assert_close(found.shares(layer), expected)
        torch.testing.assert_close(expected.sum(1), torch.ones(len(prompt)))
    with pytest.raises(TraceError, match="no module of layer 7 is routed"):
        found.shares(7)


def test_a_character_of_several_tokens_stands_with_its_last_one(model, tokenizer):
    ids = tokenizer("é→x").input_ids  # two bytes, three bytes, one: a token each
    found = trace(model, tokenizer, ids)
    assert found.pieces == ("", "é", "", "", "→", "x")
    assert trace(model, tokenizer, ids[:3]).pieces == ("", "é", "\N{REPLACEMENT CHARACTER}")


def test_a_space_behind_a_special_token_that_is_left_out_stays():
    """As in tokenizers of SentencePiece's kind, which strip the space that begins a text."""
    ids = {token: i for i, token in enumerate(["<s>", "</s>", "▁Hi", "▁there"])}
    inner = Tokenizer(models.BPE(vocab=ids, merges=[]))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner)
    spaced.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    pieces = Pieces(spaced, skip_special_tokens=True)
    said = ["<s>", "▁Hi", "</s>", "<s>", "▁there"]
    found = [pieces.add(ids[token]) for token in said]
    assert found == ["", "Hi", "", "", " there"]
    assert "".join(found) == spaced.decode([ids[t] for t in said], skip_special_tokens=True)


def test_hooks_are_gone_afterwards(model, tokenizer, prompt):
    trace(model, tokenizer, prompt)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_routers_has_nothing_to_trace(model, tokenizer, prompt):
    with (
        without_experts(model),
        pytest.raises(TraceError, match="no module of the model is routed"),
    ):
        trace(model, tokenizer, prompt)


def test_the_routes_of_many_passes_are_those_of_one(model, tokenizer, monkeypatch):
    """Earlier passes are joined now and then."""
    monkeypatch.setattr("meteora.model.trace.MOST_PASSES", 2)
    found = trace(model, tokenizer, TEXT, max_new_tokens=9)
    monkeypatch.undo()
    expected = trace(model, tokenizer, TEXT, max_new_tokens=9)
    assert found.ids == expected.ids
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.weights, expected.weights)


def test_a_model_whose_head_alone_is_routed_is_traced_without_an_answer(world, tokenizer):
    """The head reads the last token alone of a pass of several."""
    model = world.load_base()
    entry = ModuleEntry(32, model.config.vocab_size, (1, 1), (1.0, 1.0))
    insert_layer(model, "lm_head", torch.ones(2, 32), torch.ones(entry.out_features, 2), entry)
    setattr(model, EXPERTS, ["one", "two"])
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 1, 1.0), layer)):
        with pytest.raises(TraceError, match="only the head is routed"):
            trace(model, tokenizer, TEXT, max_new_tokens=2)
        assert trace(model, tokenizer, TEXT, max_new_tokens=0).modules == ("lm_head",)


@pytest.mark.parametrize(
    ("kind", "modules", "num_prompt"),
    [
        ("mamba", ["in_proj", "x_proj"], 5),
        ("rwkv", ["receptance", "value"], 5),
        ("phi3", ["qkv_proj", "o_proj"], 60),
        ("deepseek", ["q_a_proj", "kv_b_proj", "o_proj"], 5),
    ],
)
def test_a_traced_answer_has_the_routes_of_one_pass_over_all_of_it(
    build_base, build_adapter, fuse_adapters, tokenizer, tmp_path, kind, modules, num_prompt
):
    """Mamba and RWKV read on with a state; Phi 3 reads all again beyond its short positions.

    DeepSeek's `kv_b_proj` gets all tokens that the cache has, so it is left out.
    """
    base = build_base(kind)
    adapters = {
        name: build_adapter(base, tmp_path / name, seed=seed, r=2, target_modules=modules)
        for seed, name in enumerate(("one", "two", "three"))
    }
    fuse_adapters(base, adapters, tmp_path / "fused")
    model, _ = load(tmp_path / "fused", base_folder=base)
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        found = trace(model, tokenizer, list(range(10, 10 + num_prompt)), max_new_tokens=8)
        expected = trace(model, tokenizer, found.ids)
    assert len(found.tokens()) == num_prompt + 8
    kept = [path in found.modules for path in expected.modules]
    assert kept == ["kv_b_proj" not in path for path in expected.modules]
    expected_weights = expected.weights[torch.tensor(kept)]
    torch.testing.assert_close(found.weights, expected_weights, rtol=1e-4, atol=1e-4)
