"""A conversation on one cache answers as it would without, and each token has its expert."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import ConversationError, Template, encode_messages
from meteora.checkpoint.manifest import ModuleEntry, UnknownExpertError
from meteora.model.chat import Chat, Sampling
from meteora.model.fused import force_expert, insert_layer, make_router
from meteora.model.generate import EmptyPromptError
from meteora.model.trace import trace
from meteora.routing.layer import routed_by
from meteora.routing.passes import WATCHER, UnreadPromptError
from meteora.routing.prompt_opening import PromptOpening
from tests.meteora.serving.served_world import gated
from tests.pipelines.conftest import CHAT_TEMPLATE

QUESTIONS = ("what is this?", "and that?", "no")


@pytest.fixture
def model(world):
    """Routed by norms: each token by itself."""
    model = world.load()
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        yield model


@pytest.fixture
def talking(tokenizer, monkeypatch):
    """The tokenizer with a chat template."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def converse(chat, questions=QUESTIONS, *, fresh=False, **asked):
    """The answers of a conversation; `fresh` forgets the cache before each turn."""
    messages, answers = [], []
    for question in questions:
        if fresh:
            chat.forget()
        messages.append(user(question))
        answers.append(chat.answer(messages, max_new_tokens=6, **asked))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def test_an_answer_is_the_one_that_generate_gives(model, talking):
    ids = encode_messages(talking, [user("hello")])
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    answer = Chat(model, talking).answer([user("hello")], max_new_tokens=8)
    assert answer.text == talking.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert answer.num_prompt == len(ids)
    assert "".join(token.text for token in answer.tokens) == answer.text


def test_a_conversation_with_a_base_that_has_a_state_is_traced(
    build_base, build_adapter, fuse_adapters, talking, tmp_path
):
    base = build_base("mamba")
    asked = {"seed": 0, "r": 2, "target_modules": ["in_proj"]}
    fuse_adapters(base, {"one": build_adapter(base, tmp_path / "one", **asked)}, tmp_path / "fused")
    chat = Chat(meteora.load(tmp_path / "fused", base_folder=base)[0], talking)
    last = converse(chat)[-1]
    assert len(chat.trace().tokens()) == last.num_prompt + last.num_new


@pytest.mark.parametrize("expert", ["", "q_and_v"])
def test_answers_on_one_cache_are_those_without(model, talking, expert):
    cached = converse(Chat(model, talking), expert=expert)
    fresh = converse(Chat(model, talking), expert=expert, fresh=True)
    assert [answer.text for answer in cached] == [answer.text for answer in fresh]
    for one, other in zip(cached, fresh, strict=True):
        assert [token.expert for token in one.tokens] == [token.expert for token in other.tokens]
    assert all(answer.num_cached == 0 for answer in fresh)
    for before, answer in pairwise(cached):
        assert answer.num_cached >= before.num_prompt


def test_a_base_whose_config_asks_for_beams_or_no_cache_answers_as_others(
    model, talking, monkeypatch
):
    expected = converse(Chat(model, talking))
    monkeypatch.setattr(model.generation_config, "use_cache", False)
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    assert converse(Chat(model, talking)) == expected


def test_tokens_stream_with_the_experts_of_the_trace(model, talking):
    chat, seen = Chat(model, talking), []
    answer = chat.answer([user("hello")], max_new_tokens=8, on_token=seen.append)
    assert seen == list(answer.tokens)
    traced = chat.trace()
    assert [t.expert for t in traced.tokens()[traced.num_prompt :]][: len(seen)] == [
        token.expert for token in seen
    ]
    expected = trace(model, talking, traced.ids[: traced.num_prompt], max_new_tokens=8)
    assert traced.ids == expected.ids
    assert torch.equal(traced.chosen, expected.chosen)
    torch.testing.assert_close(traced.weights, expected.weights, rtol=1e-4, atol=1e-4)


def test_the_trace_of_a_conversation_on_one_cache_is_that_of_one_pass(model, talking):
    chat = Chat(model, talking)
    converse(chat)
    found = chat.trace()
    expected = trace(model, talking, found.ids)
    assert torch.equal(found.chosen, expected.chosen)


def test_a_forced_expert_has_every_token_and_leaves_nothing_to_the_next_answer(model, talking):
    chat, messages = Chat(model, talking), [user("hello")]
    routed = chat.answer(messages, max_new_tokens=6)
    forced = chat.answer(messages, max_new_tokens=6, expert="attention")
    assert {token.expert for token in forced.tokens} == {chat.experts.index("attention")}
    assert forced.num_cached == 0
    with force_expert(model, "attention"):
        assert Chat(model, talking).answer(messages, max_new_tokens=6).text == forced.text
    assert chat.answer(messages, max_new_tokens=6).text == routed.text
    with pytest.raises(UnknownExpertError, match="there is no expert 'nobody'"):
        chat.answer(messages, expert="nobody")


def test_an_expert_that_is_forced_around_answers_leaves_nothing_to_other_routing(model, talking):
    """Keys and routes of one expert were taken for those of another."""
    chat, messages = Chat(model, talking), [user("hello")]
    for name in ("attention", "q_and_v", ""):
        with force_expert(model, name) if name else nullcontext():
            first = chat.answer(messages, max_new_tokens=6)
            assert first == Chat(model, talking).answer(messages, max_new_tokens=6)
        if name:
            assert set(chat.trace().chosen.flatten().tolist()) == {chat.experts.index(name)}
    again = chat.answer(messages, max_new_tokens=6)
    assert (again.text, again.num_cached > 0) == (first.text, True)


def test_the_base_alone_answers_a_conversation_on_its_own_cache(world, model, talking):
    chat, base = Chat(model, talking), world.load_base()
    routed = chat.answer([user(QUESTIONS[0])], max_new_tokens=6)
    answers = converse(chat, expert="(base)")
    assert answers[0].num_cached == 0
    assert answers[1].num_cached >= answers[0].num_prompt
    ids = encode_messages(talking, [user(QUESTIONS[0])])
    out = base.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert answers[0].text == talking.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert {chat.experts[token.expert] for token in answers[0].tokens} == {"(base)"}
    with pytest.raises(ConversationError, match="no routes to trace"):
        chat.trace()
    assert chat.answer([user(QUESTIONS[0])], max_new_tokens=6).text == routed.text


def test_a_token_knows_the_expert_of_each_layer(model, talking):
    chat = Chat(model, talking)
    tokens = chat.answer([user("hello")], max_new_tokens=8).tokens
    traced = chat.trace()
    for layer in (0, 1):
        share, expert = traced.shares(layer)[traced.num_prompt :].max(dim=1)
        found = [token.layers[layer] for token in tokens]
        assert [winner.layer for winner in found] == [layer] * len(tokens)
        assert [winner.expert for winner in found] == expert.tolist()[: len(tokens)]
        assert [winner.share for winner in found] == pytest.approx(share.tolist()[: len(tokens)])


@pytest.fixture(params=["module", "turn"])
def looking_ahead(request, world, talking):
    """A model whose gates decide by whole questions: for the opening, or for a turn."""
    return gated(world, request.param, Template.of(talking))


def test_a_router_that_looks_ahead_answers_on_one_cache_as_without(looking_ahead, talking):
    """The opening is decided by the first question, a turn by its own, and neither by others."""
    chat = Chat(looking_ahead, talking)
    cached = converse(chat)
    fresh = converse(Chat(looking_ahead, talking), fresh=True)
    assert [a.text for a in cached] == [a.text for a in fresh]
    assert 0 < cached[1].num_cached < cached[2].num_cached
    # another question decides again, though its first tokens are the same
    answered = {"role": "assistant", "content": cached[0].text}
    messages = [user(QUESTIONS[0]), answered, user("and what?")]
    again = chat.answer(messages, max_new_tokens=6)
    assert bool(again.num_cached) == isinstance(getattr(looking_ahead, WATCHER), PromptOpening)
    chat.forget()
    assert chat.answer(messages, max_new_tokens=6).text == again.text
    assert chat.answer([user("what else is there?")], max_new_tokens=6).num_cached == 0


def test_without_a_template_in_the_gates_no_question_is_answered_by_the_one_before(world, talking):
    """Nothing shows then where the question ends that decides."""
    model = gated(world, "turn", Template())
    cached, fresh = converse(Chat(model, talking)), converse(Chat(model, talking), fresh=True)
    assert [(a.text, a.tokens) for a in cached] == [(a.text, a.tokens) for a in fresh]


def test_embeddings_do_not_show_a_question_that_decides(looking_ahead):
    embedded = looking_ahead.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    generate = partial(looking_ahead.generate, max_new_tokens=2)
    for ask in (looking_ahead, looking_ahead.base_model, generate):
        with pytest.raises(UnreadPromptError, match="the pass has embeddings; give input_ids"):
            ask(inputs_embeds=embedded)
    with meteora.force_expert(looking_ahead, "q_and_v"):
        looking_ahead(inputs_embeds=embedded)


def test_where_an_expert_is_forced_another_question_goes_on_with_the_cache(looking_ahead, talking):
    """No question decides there, not even one without a template."""

    def answer(chat, asked):
        return chat.answer(asked, max_new_tokens=6, expert="q_and_v")

    for first, then in (([user("digits")], [user("digits 12")]), ("digits", "digits 12")):
        chat = Chat(looking_ahead, talking)
        answer(chat, first)
        found, alone = answer(chat, then), answer(Chat(looking_ahead, talking), then)
        assert found.num_cached > 0
        assert (found.text, found.tokens) == (alone.text, alone.tokens)


def test_a_text_is_continued_as_generate_does_and_on_the_cache_of_its_beginning(model, tokenizer):
    tokenizer.chat_template = None
    chat, prompt = Chat(model, tokenizer), "digits 12"
    found = chat.answer(prompt, max_new_tokens=6)
    assert found.text == meteora.generate(model, tokenizer, prompt, max_new_tokens=6)
    longer = chat.answer(f"{prompt}{found.text} and more", max_new_tokens=6)
    assert longer.num_cached >= len(tokenizer(prompt).input_ids)
    alone = Chat(model, tokenizer).answer(f"{prompt}{found.text} and more", max_new_tokens=6)
    assert (longer.text, alone.num_cached) == (alone.text, 0)
    with pytest.raises(ConversationError, match="half of a surrogate pair"):
        chat.answer("\ud800")


def test_a_text_shares_no_cache_where_its_question_decides(looking_ahead, talking):
    """Without a template nothing shows that the longer text is another question."""
    chat = Chat(looking_ahead, talking)
    first = chat.answer("digits 12", max_new_tokens=6)
    for asked in ("digits 12 and 13", [user("digits 12")], "digits"):
        found = chat.answer(asked, max_new_tokens=6)
        alone = Chat(looking_ahead, talking).answer(asked, max_new_tokens=6)
        assert found.num_cached == 0
        assert (found.text, found.tokens) == (alone.text, alone.tokens)
    assert first.num_cached == 0


def test_two_conversations_on_one_model_answer_as_each_alone(looking_ahead, talking):
    """Gates hold one question: the other conversation's, by the time that the first goes on."""
    one, other = Chat(looking_ahead, talking), Chat(looking_ahead, talking)
    for a, b in (("abc", "what else?"), ("digits 12", "xyz"), ("no", "and that?")):
        messages = [user(a)]
        first = one.answer(messages, max_new_tokens=6)
        other.answer([user(b)], max_new_tokens=6)
        messages += [{"role": "assistant", "content": first.text}, user("go on")]
        found = one.answer(messages, max_new_tokens=16)
        alone = Chat(looking_ahead, talking).answer(messages, max_new_tokens=16)
        assert found.text == alone.text
        assert [t.expert for t in found.tokens] == [t.expert for t in alone.tokens]


def test_what_a_listener_raises_ends_the_answer_and_leaves_no_half_cache(model, talking):
    chat = Chat(model, talking)
    first, *_ = converse(chat)

    def leave(_token):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        chat.answer([user(QUESTIONS[0])], on_token=leave)
    with pytest.raises(ConversationError, match="no whole answer"):
        chat.trace()
    assert converse(chat)[0].text == first.text


def test_an_answer_ends_before_a_text_that_stops_it(model, talking):
    chat = Chat(model, talking)
    whole = chat.answer([user("hello")], max_new_tokens=12)
    assert whole.truncated
    stop, seen = whole.text[3:6], []
    answer = chat.answer([user("hello")], max_new_tokens=12, stop=[stop], on_token=seen.append)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert "".join(token.text for token in seen) == answer.text
    assert not answer.truncated
    assert answer.num_new < 12


def test_an_answer_ends_before_the_first_of_the_texts_that_stop_it(model, talking, monkeypatch):
    """Also where a token holds what is said, and the beginning of a text that ends it."""
    pieces = Mock(rest=lambda: "", add=Mock(side_effect=["I s", "ay ", "so, an", "d mor", "e"]))
    monkeypatch.setattr("meteora.model.chat.Pieces", lambda *_, **__: pieces)
    seen = []
    answer = Chat(model, talking).answer(
        [user("hello")], max_new_tokens=5, stop=["d more", "and more"], on_token=seen.append
    )
    assert answer.text == "I say so, "
    assert [token.text for token in seen] == ["I s", "ay ", "so, ", "", ""]


def test_a_text_that_only_begins_like_a_stop_is_handed_on_in_the_end(model, talking):
    chat = Chat(model, talking)
    whole = chat.answer([user("hello")], max_new_tokens=12)
    answer = chat.answer([user("hello")], max_new_tokens=12, stop=[whole.text[-2:] + "never"])
    assert answer.text == whole.text
    assert [token.text for token in answer.tokens] == [token.text for token in whole.tokens]


def test_an_answer_that_ends_inside_a_character_streams_it_whole(model, talking, monkeypatch):
    chat = Chat(model, talking)
    whole = chat.answer([user("hello")], max_new_tokens=12)
    ids = chat.trace().ids[whole.num_prompt :]
    cut = next(i for i, token in enumerate(whole.tokens) if not token.text)
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids[cut + 1])
    seen = []
    answer = chat.answer([user("hello")], max_new_tokens=12, on_token=seen.append)
    assert answer.text.endswith("\N{REPLACEMENT CHARACTER}")
    assert "".join(token.text for token in seen) == answer.text
    assert len(seen) == answer.num_new - 1


@pytest.mark.parametrize("ended", [True, False])
def test_a_pass_that_is_one_too_many_changes_nothing(model, talking, monkeypatch, ended):
    """As on Apple's GPUs, where `generate` learns one pass late that an answer has ended."""
    chat = Chat(model, talking)
    whole = chat.answer([user("hello")], max_new_tokens=12)
    ids = chat.trace().ids
    if ended:
        monkeypatch.setattr(model.generation_config, "eos_token_id", ids[whole.num_prompt + 4])
    stop = [] if ended else [whole.text[3:6]]
    prompt = list(ids[: whole.num_prompt])

    def results():
        chat.forget()
        answer = chat.answer([user("hello")], max_new_tokens=12, stop=stop)
        return answer, chat.trace().tokens(), trace(model, talking, prompt, max_new_tokens=12).ids

    expected = results()
    late = "transformers.generation.utils.DeferredStopCheck.is_supported"
    monkeypatch.setattr(late, staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", Mock)
    assert results() == expected
    assert len(trace(model, talking, prompt, max_new_tokens=12).tokens()) == len(expected[2])


def test_a_seed_draws_the_same_answer_and_leaves_other_random_numbers_alone(model, talking):
    chat, sampling = Chat(model, talking), Sampling(temperature=1.5, seed=7)
    before = torch.random.get_rng_state()
    one, other = (
        chat.answer([user("hello")], max_new_tokens=8, sampling=sampling) for _ in range(2)
    )
    assert one.text == other.text
    assert torch.equal(before, torch.random.get_rng_state())
    drawn = {
        chat.answer(
            [user("hello")], max_new_tokens=8, sampling=Sampling(temperature=1.5, seed=seed)
        ).text
        for seed in range(3)
    }
    assert len(drawn) > 1


def test_a_temperature_of_almost_nothing_takes_the_most_likely_token(model, talking):
    chat, asked = Chat(model, talking), [user("hello")]
    likely = chat.answer(asked, max_new_tokens=8).text
    coldest = Sampling(temperature=1e-40)
    assert chat.answer(asked, max_new_tokens=8, sampling=coldest).text == likely


def test_a_conversation_that_does_not_fit_is_refused_and_a_long_answer_is_cut(model, talking):
    chat = Chat(model, talking)
    with pytest.raises(ConversationError, match="the model takes 512 with its answer"):
        chat.answer([user("x" * 600)])
    prompt = len(encode_messages(talking, [user("")]))
    answer = chat.answer([user("x" * (508 - prompt))], max_new_tokens=100)
    assert answer.num_new <= 4


def test_a_tokenizer_without_a_template_and_messages_that_it_refuses(model, talking):
    chat = Chat(model, talking)
    with pytest.raises(ConversationError, match="no messages to answer"):
        chat.answer([])
    talking.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConversationError, match="roles must alternate"):
        chat.answer([user("hello")])
    talking.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(EmptyPromptError, match="the prompt has no tokens"):
        chat.answer([user("")])
    talking.chat_template = None
    with pytest.raises(ConversationError, match="no chat template"):
        chat.answer([user("hello")])


def test_keys_that_depend_on_the_length_of_the_text_are_not_kept(
    world, build_base, talking, tmp_path
):
    """A longer text turns all of its keys by other angles (longrope)."""
    rope = json.loads((build_base("phi3") / "config.json").read_text())["rope_parameters"]
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    model = meteora.load(world.checkpoint, base_folder=base)[0]
    messages, chat = [user("what is this?")], Chat(model, talking)
    first = chat.answer(messages, max_new_tokens=6)
    messages += [{"role": "assistant", "content": first.text}, user("and that?")]
    found = chat.answer(messages, max_new_tokens=6)
    assert first.num_prompt < 64 < found.num_prompt
    assert found == Chat(model, talking).answer(messages, max_new_tokens=6)


def test_a_cache_with_a_sliding_window_is_not_kept(
    build_base, build_adapter, fuse_adapters, talking, tmp_path
):
    base = build_base("mistral")
    adapter = build_adapter(base, tmp_path / "one", seed=1, r=2, target_modules=["q_proj"])
    fuse_adapters(base, {"one": adapter}, tmp_path / "fused")
    model, _ = meteora.load(tmp_path / "fused", base_folder=base)
    answers = converse(Chat(model, talking))
    assert [answer.num_cached for answer in answers] == [0, 0, 0]


def test_a_question_is_asked_again_where_an_adapter_is_on_the_head(world, talking):
    """Its routes are in those of a pass of one token alone, as the second prompt has it."""
    model = world.load()
    entry = ModuleEntry(32, model.config.vocab_size, (1, 0, 0, 0), (1.0, 0.0, 0.0, 0.0))
    insert_layer(model, "lm_head", torch.ones(1, 32), torch.ones(entry.out_features, 1), entry)
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        chat = Chat(model, talking)
        answers = [chat.answer([user("hello")], max_new_tokens=4) for _ in range(3)]
        assert {answer.text for answer in answers} == {answers[0].text}
        assert answers[2].num_cached == answers[2].num_prompt - 1
        assert "lm_head" not in chat.trace().modules
