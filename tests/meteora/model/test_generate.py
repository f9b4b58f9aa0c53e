"""The layer keeps the signature that it replaces: caches, padding, batches and beams just work."""

import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, BartForCausalLM

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import ConversationError, Template
from meteora.base.loading import load_folder
from meteora.model.fused import make_router
from meteora.model.generate import EmptyPromptError, answer_all
from meteora.routing.layer import routed_by
from tests.meteora.serving.served_world import with_router

TEMPLATE = Template((3, 4), (5,))
PROMPTS = ["a", "some words", "rather more words than that"]


@pytest.fixture
def model(world):
    """Routed by norms: each token by itself, so that a wrong token shows."""
    model = world.load()
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 1.0), layer)):
        yield model


def generate(model, tokenizer, prompts, **asked):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, **asked)
    return out[:, batch.input_ids.shape[1] :]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_cache_and_every_number_of_beams_generate_what_none_does(
    model, tokenizer, kind, num_beams
):
    asked = {"num_beams": num_beams, "cache_implementation": kind}
    without = generate(model, tokenizer, PROMPTS, num_beams=num_beams, use_cache=False)
    assert torch.equal(generate(model, tokenizer, PROMPTS, **asked), without)


def test_a_left_padded_batch_generates_what_its_rows_do(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = generate(model, tokenizer, [prompt])
        assert torch.equal(row[: len(alone)], alone)


def test_a_left_padded_batch_equals_its_rows_one_by_one(model, tokenizer):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model(**batch).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(**tokenizer([prompt], return_tensors="pt")).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_beams_and_returned_sequences_run(model, tokenizer):
    out = generate(model, tokenizer, PROMPTS, num_beams=3, num_return_sequences=2)
    assert out.shape[0] == 2 * len(PROMPTS)


def test_the_pipeline_of_transformers_runs(model, tokenizer):
    from transformers import pipeline  # noqa: PLC0415  (slow to import)

    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = answer("words", max_new_tokens=3, do_sample=False, return_full_text=False)
    assert isinstance(found["generated_text"], str)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_an_answer_ends_where_the_model_s_longest_text_does(kind, build_base, monkeypatch) -> None:
    """Beyond it there are no positions: an IndexError, or a fault of the device."""
    model, tokenizer = load_folder(build_base(kind))
    longest = model.config.max_position_embeddings
    monkeypatch.setattr("meteora.model.generate.end_tokens", lambda *_: [])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    prompt = tokenizer("x" * (longest - 4)).input_ids
    (answer,) = answer_all(model, tokenizer, [prompt], 256)
    assert len(prompt) + len(answer) == longest
    with pytest.raises(ConversationError, match=f"the model takes {longest} with its answer"):
        meteora.generate(model, tokenizer, ["a", "x" * longest])


def test_a_long_prompt_does_not_cut_the_answers_to_short_ones(world, tokenizer, monkeypatch):
    model = world.load()
    monkeypatch.setattr("meteora.model.generate.end_tokens", lambda *_: [])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    longest = model.config.max_position_embeddings
    prompts = [tokenizer("x" * n).input_ids for n in (longest - 3, 5, longest - 4, 7)]
    answers = answer_all(model, tokenizer, prompts, 10)
    assert [len(answer) for answer in answers] == [3, 10, 4, 10]
    assert answers == [answer_all(model, tokenizer, [prompt], 10)[0] for prompt in prompts]


def test_answers_as_long_as_the_model_s_text_are_given_together(world, tokenizer, monkeypatch):
    model, batches = world.load(), []
    longest = model.config.max_position_embeddings
    prompts = [tokenizer("x" * n).input_ids for n in range(1, 9)]

    def ends_at_once(_model, _tokenizer, input_ids, **_):
        batches.append(len(input_ids))
        return torch.nn.functional.pad(input_ids, (0, 1), value=2)

    monkeypatch.setattr("meteora.model.generate.generate_ids", ends_at_once)
    assert answer_all(model, tokenizer, prompts, longest) == [[2]] * 8
    assert batches == [8]


def test_a_prompt_without_tokens_is_refused(world, tokenizer) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.add_bos_token = False
    bare._tokenizer.post_processor = None
    for ask in (meteora.generate, meteora.trace):
        with pytest.raises(EmptyPromptError, match="the prompt has no tokens"):
            ask(world.load(), bare, "")
    with pytest.raises(EmptyPromptError, match="prompt 2 has no tokens"):
        meteora.generate(world.load(), bare, ["w1", ""])


def test_a_prompt_that_is_too_long_is_named(model, tokenizer) -> None:
    with pytest.raises(ConversationError, match=r"^prompt 2, .*, has .* tokens, and the model"):
        meteora.generate(model, tokenizer, ["some words", "words " * 400])


def test_several_prompts_are_answered_as_each_alone(model, tokenizer) -> None:
    prompts = ["w1 w2 w3", "w9", "w4 w5"]
    ask = partial(meteora.generate, model, tokenizer, max_new_tokens=5)
    alone = [ask(one) for one in prompts]
    assert ask(prompts) == alone
    assert len(set(alone)) > 1
    assert ask([]) == []


def test_half_a_character_in_a_prompt_is_refused(model, tokenizer) -> None:
    with pytest.raises(ConversationError, match="half of a surrogate pair"):
        meteora.generate(model, tokenizer, "one \ud800")


@pytest.mark.parametrize("prompts", [[{"role": "user", "content": "w1"}], ["w1", None], b"w1"])
@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_what_is_no_text_is_no_prompt(world, tokenizer, prompts, template) -> None:
    asked = copy.deepcopy(tokenizer)
    asked.chat_template = template
    with pytest.raises(ConversationError, match="a prompt is text, and this is a"):
        meteora.generate(world.load(), asked, prompts)


def test_an_answer_ends_with_the_first_of_several_ends(world, tokenizer) -> None:
    model = world.load()
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    model.generation_config.eos_token_id = None
    whole = answer_all(model, tokenizer, prompts, 8)
    ends = {whole[0][2], whole[1][5]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = [
        answer[: next((i for i, token in enumerate(answer) if token in ends), 8) + 1]
        for answer in whole
    ]
    assert answer_all(model, tokenizer, prompts, 8) == expected
    assert len({*map(len, expected)}) > 1


def test_an_answer_ends_where_examples_do_though_the_base_names_another_end(
    world, tokenizer
) -> None:
    """Experts and gates learn from examples that end with the tokenizer's own end token."""
    model, ids = world.load(), tokenizer("some words").input_ids
    assert model.generation_config.eos_token_id == 2
    (whole,) = answer_all(model, tokenizer, [ids], 8)
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(whole[3])
    (expected,) = answer_all(model, ending, [ids], 8)
    assert len(expected) < 8
    text = ending.decode(expected, skip_special_tokens=True)
    assert meteora.generate(model, ending, "some words", max_new_tokens=8) == text
    traced = meteora.trace(model, ending, ids, max_new_tokens=8)
    assert list(traced.ids[len(ids) :]) == expected


def test_a_base_whose_config_asks_for_samples_beams_or_no_cache_answers_as_others(
    model, tokenizer, monkeypatch
) -> None:
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = answer_all(model, tokenizer, prompts, 8)
    text = meteora.generate(model, tokenizer, "some words", max_new_tokens=8)
    unusual = {
        "use_cache": False, "num_beams": 3, "do_sample": True, "temperature": 9.0,
        "return_dict_in_generate": True, "num_return_sequences": 2, "stop_strings": ["a"],
        "max_time": 1e-9, "prompt_lookup_num_tokens": 3,
    }  # fmt: skip
    for name, value in unusual.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert answer_all(model, tokenizer, prompts, 8) == expected
    assert meteora.generate(model, tokenizer, "some words", max_new_tokens=8) == text


def test_a_padding_token_inside_a_prompt_is_read_as_any_other(model, tokenizer) -> None:
    """Some bases pad with the token that ends each turn of a conversation."""
    ids = torch.tensor([[70, *[tokenizer.pad_token_id] * 6, 80, 90]])
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0].tolist()
    assert list(meteora.trace(model, tokenizer, ids[0].tolist(), max_new_tokens=8).ids) == expected


def test_prompts_that_a_batch_would_mix_are_answered_one_by_one(build_base) -> None:
    """In transformers' RWKV each row of a batch reads the states of all."""
    model, tokenizer = load_folder(build_base("rwkv"))
    prompts = [tokenizer(prompt).input_ids for prompt in (*PROMPTS, "OTHER WORDS")]
    alone = [answer_all(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert answer_all(model, tokenizer, prompts, 8) == alone


def test_progress_counts_each_prompt_once(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("meteora.model.generate.PROMPTS_PER_BATCH", 2)
    counts = []
    answer_all(
        model, tokenizer, [tokenizer(prompt).input_ids for prompt in PROMPTS], 1, counts.append
    )
    assert counts == [2, 1]


def test_a_base_whose_positions_count_padding_is_asked_one_by_one(tokenizer):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=259, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    model = BartForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # else all answers are alike
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    alone = [answer_all(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert answer_all(model, tokenizer, prompts, 6) == alone


class NoDoubles(TorchDispatchMode):
    """Refuses what a device without 64-bit floats, such as `mps`, cannot compute."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            assert getattr(tensor, "dtype", None) is not torch.float64, func
        return result


@pytest.mark.parametrize(
    "options",
    [
        RouterOptions("gate", 2, 1.0, opening="shared", share="point"),
        RouterOptions("gate", 1, 1.0, opening="prompt", share="turn"),
        RouterOptions("arrow", 1, 1.0),
        RouterOptions("norm", 2, 1.0),
    ],
    ids=["shared", "turn", "arrow", "norm"],
)
def test_an_answer_needs_no_64_bit_floats(world, tokenizer, options, tmp_path):
    folder = with_router(
        world.checkpoint, world.manifest, world.base, options, tmp_path / "made", TEMPLATE
    )
    model, _ = meteora.load(folder, base_folder=world.base)
    with NoDoubles():
        assert generate(model, tokenizer, PROMPTS).numel()
        meteora.trace(model, tokenizer, PROMPTS[2], max_new_tokens=4)
