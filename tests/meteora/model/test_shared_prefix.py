"""What the prompts of a batch begin with is read once, and each answer is what it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.padding import padded_and_mask
from meteora.model.fused import make_router
from meteora.model.shared_prefix import SHORTEST, share_prefix
from meteora.routing.layer import routed_by
from meteora.routing.routers import Gate
from meteora.routing.turns import Turns
from tests.meteora.model.test_architectures import TARGETS

SHARED = list(range(5, 5 + SHORTEST))
PROMPTS = [[*SHARED, 30, 31, 32], [*SHARED, 30, 33], [*SHARED, 40], [*SHARED, 50, *range(60, 66)]]
NOT_SHARED = {"mistral", "gemma2", "gemma3", "gemma3n", "gemma4", "mamba", "bloom"}
"""They have sliding windows, no keys and values, or take no positions."""


def batch_of(prompts):
    return padded_and_mask(prompts, 0, "left")


def answers(model, prompts, **batch):
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**batch, **greedy)[:, max(map(len, prompts)) :].tolist()


@pytest.mark.parametrize("kind", TARGETS)
def test_every_architecture_answers_as_it_does_without(kind, build_base):
    model = AutoModelForCausalLM.from_pretrained(build_base(kind), dtype=torch.float64).eval()
    ids, mask = batch_of(PROMPTS)
    shared = share_prefix(model, ids, mask).to_generate()
    assert ("past_key_values" in shared) == (kind not in NOT_SHARED)
    expected = answers(model, PROMPTS, input_ids=ids, attention_mask=mask)
    assert answers(model, PROMPTS, **shared) == expected


def test_a_fused_model_answers_as_it_does_without_and_reads_the_prefix_once(world):
    model = world.load()
    ids, mask = batch_of(PROMPTS)
    read = []
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 1.0), layer)):
        expected = answers(model, PROMPTS, input_ids=ids, attention_mask=mask)
        layer = model.model.layers[0]
        layer.register_forward_hook(lambda _layer, _args, out: read.append(out.shape[:2].numel()))
        started = share_prefix(model, ids, mask)
        assert answers(model, PROMPTS, **started.to_generate()) == expected
    rest = max(map(len, PROMPTS)) - SHORTEST
    assert read[:2] == [SHORTEST, len(PROMPTS) * rest]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_over_the_rest_gives_what_the_whole_pass_gives(world, side):
    model = world.load(dtype="float64")
    rows = padded_and_mask(PROMPTS, 0, side)
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 1.0), layer)):
        started = share_prefix(model, *rows, at_most=SHORTEST)
        assert started.num_read == SHORTEST
        with torch.inference_mode():
            found = model(**started.to_read()).logits
            for row, there, prompt in zip(found, started.mask, PROMPTS, strict=True):
                alone = model(torch.tensor([prompt])).logits[0, SHORTEST:]
                torch.testing.assert_close(row[there[SHORTEST:].bool()], alone)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[:1],
        [[*SHARED[1:], 30], [*SHARED[1:], 31]],
        [SHARED, [*SHARED, 31]],  # one token of each is left to be read
        [[9, *SHARED, 3], [8, *SHARED, 3]],
    ],
)
def test_too_little_in_common_is_read_with_each(world, prompts):
    ids, mask = batch_of(prompts)
    started = share_prefix(world.load(), ids, mask)
    assert started.cache is None
    assert started.ids is ids


def test_what_a_gap_or_a_setting_would_change_is_read_with_each(world, build_base):
    batch = batch_of(PROMPTS)
    model = world.load()
    for asked in (
        {"num_beams": 3},
        {"num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
    ):
        assert share_prefix(model, *batch, asked=asked).cache is None
    model.generation_config.cache_implementation = "static"
    assert share_prefix(model, *batch).cache is None
    by_length = {"rope_type": "dynamic"}
    for change in (
        {"window_size": 256},
        {"rope_parameters": by_length},
        {"rope_parameters": {"full_attention": by_length}},
    ):
        model = AutoModelForCausalLM.from_pretrained(build_base("llama"))
        assert share_prefix(model, *batch).cache is not None
        for name, value in change.items():
            setattr(model.config, name, value)
        assert share_prefix(model, *batch).cache is None


def waits(layer):
    """A gate that waits for a whole question."""
    num_choices, num_in = layer.num_choices, layer.stack.sizes.num_in
    options = RouterOptions("gate", 1, 1.0, opening="prompt", share="turn")
    turns = Turns(Template()).at_gate()
    gate = torch.zeros(num_choices, num_in), torch.zeros(num_choices)
    return Gate(*gate, options, by_question=turns)


def draws(layer):
    return make_router(RouterOptions("random", 1, 1.0), layer)


@pytest.mark.parametrize("router", [waits, draws])
def test_a_router_that_needs_whole_prompts_gets_them(world, router):
    model = world.load()
    batch = batch_of(PROMPTS)
    with routed_by(model, router):
        assert share_prefix(model, *batch).cache is None
        with meteora.without_experts(model):
            assert share_prefix(model, *batch).cache is not None
