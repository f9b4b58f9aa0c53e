"""Routes that depend on a token and what precedes it alone: one answer in every shape of prompt."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

import meteora
from meteora.artifacts import SHARED, RouterOptions
from meteora.model.fused import expert_names, force_expert, make_router
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import routed_by
from tests.meteora.fitting.test_calibrate import routing_accuracy
from tests.meteora.model.conftest import with_shared

NEW = 12


@pytest.fixture(scope="module")
def model(checkpoint, world):
    return meteora.load(checkpoint, base_folder=world.base)[0]


@pytest.fixture(scope="module")
def prompts():
    """The openings and first tokens of unseen examples, of different lengths."""
    return [list(s.input_ids[: 9 + i]) for i, s in enumerate(with_shared(2, seed=5))]


def answer(model, prompt, **asked):
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **asked)
    return out[0, len(prompt) :].tolist()


def test_tokens_that_say_nothing_go_to_the_mean_and_the_others_to_their_expert(model):
    assert expert_names(model)[-1] == SHARED
    assert routing_accuracy(model, with_shared(4, seed=9)) > 0.9


def test_the_shared_choice_is_the_mean_of_all_experts(model):
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        with force_expert(model, SHARED):
            shared = model(ids).logits
        with routed_by(model, lambda layer: make_router(RouterOptions("uniform", 1, 1.0), layer)):
            torch.testing.assert_close(model(ids).logits, shared)


@pytest.mark.parametrize("kind", ["arrow", "norm", "random"])
def test_routers_without_training_never_take_the_mean(model, kind):
    ids = torch.arange(3, 23)[None]
    with (
        torch.no_grad(),
        routed_by(model, lambda layer: make_router(RouterOptions(kind, 2, 1.0), layer)),
        recorded_routes(model) as routes,
    ):
        model(ids)
    assert not any((experts == 4).any() for _, experts in routes.values())


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"use_cache": False}, id="no cache"),
        pytest.param({"cache_implementation": "static"}, id="static cache"),
        pytest.param({"prefill_chunk_size": 3}, id="chunks"),
        pytest.param({"num_beams": 1, "prompt_lookup_num_tokens": 2}, id="assisted"),
    ],
)
def test_the_same_tokens_come_out_with_any_cache_and_any_chunks(model, prompts, asked):
    for prompt in prompts:
        assert answer(model, prompt, **asked) == answer(model, prompt)


def test_the_same_tokens_come_out_after_a_prefix_of_another_request(model, prompts):
    for prompt in prompts:
        expected = answer(model, prompt)
        for cut in (1, 2, len(prompt) - 1):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(torch.tensor([prompt[:cut]]), past_key_values=cache)
            assert answer(model, prompt, past_key_values=cache) == expected


def test_the_same_tokens_come_out_of_a_padded_batch_and_of_embeddings(model, prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = (torch.arange(width) >= width - torch.tensor([len(p) for p in prompts])[:, None]).long()
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )[:, width:]
    for prompt, out in zip(prompts, together.tolist(), strict=True):
        expected = answer(model, prompt)
        assert out == expected
        embedded = model.get_input_embeddings()(torch.tensor([prompt]))
        asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        assert model.generate(inputs_embeds=embedded, **asked)[0].tolist() == expected


def test_a_cache_of_8_bits_leaves_the_routes_of_a_prompt_alone(model, prompts):
    for prompt in prompts:
        cache = QuantizedCache("fp8", config=model.config)
        with torch.no_grad(), recorded_routes(model) as rounded:
            found = model(torch.tensor([prompt]), past_key_values=cache).logits
        with torch.no_grad(), recorded_routes(model) as exact:
            assert torch.equal(model(torch.tensor([prompt])).logits, found)
        for path, (_, experts) in exact.items():
            assert torch.equal(experts, rounded[path][1]), path
        cache = QuantizedCache("fp8", config=model.config)
        assert answer(model, prompt, past_key_values=cache)[:1] == answer(model, prompt)[:1]


@pytest.mark.parametrize("drafts", [1, 4])
def test_the_same_tokens_come_out_with_drafts_of_another_model(model, prompts, world, drafts):
    draft = world.load_base().eval()
    draft.generation_config.num_assistant_tokens = drafts
    for prompt in prompts:
        assert answer(model, prompt, assistant_model=draft) == answer(model, prompt)


def test_routes_do_not_change_with_what_follows(model, prompts):
    """The same arithmetic on a longer prompt gives the same routes for the tokens before."""
    for prompt in prompts:
        with torch.no_grad(), recorded_routes(model) as whole:
            model(torch.tensor([prompt]))
        with torch.no_grad(), recorded_routes(model) as begun:
            model(torch.tensor([prompt[:-3]]))
        for path, (_, experts) in begun.items():
            assert torch.equal(experts, whole[path][1][: len(experts)]), path
