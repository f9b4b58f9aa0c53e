"""One decision a turn: by its question, for its answer, in any batch and on any cache."""

import copy
import itertools
import random

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from meteora.artifacts import RouterOptions
from meteora.artifacts.routers import POINT_GATES
from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import UNLABELLED, LabelledSequence
from meteora.model.fused import expert_names, force_expert, without_experts
from meteora.routing.gates import gates_of, insert_gates, watch_prompts
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import routed_layers
from meteora.routing.passes import WATCHER, PassInput, UnreadPromptError
from meteora.routing.turns import Turns, questions
from tests.meteora.fitting.test_calibrate import task_tokens

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
HEADER = OPENING[1:]
TEMPLATE = Template(OPENING, CLOSING)
OPTIONS = RouterOptions("gate", 1, 1.0, opening="prompt", share="turn")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def found(row, *, goes_on=False, padding=0, template=TEMPLATE):
    """Of each token that is there, its turn; and the tokens of questions."""
    ids = torch.tensor([[0] * padding + row])
    there = torch.arange(ids.shape[1])[None] >= padding
    turn, asked, closed = questions(PassInput(ids, there, goes_on), template)
    return turn[0, padding:].tolist(), ids[asked].tolist(), closed.item()


TWO = [*OPENING, 7, 8, *CLOSING, 9, 9, *HEADER, 5, *CLOSING, 4]


@pytest.mark.parametrize("padding", [0, 3])
def test_a_turn_begins_with_its_header_and_its_question_ends_where_it_is_closed(padding):
    expected = [0] * 10 + [1] * 7, [7, 8, 5], True
    assert found(TWO, padding=padding) == expected


def test_a_system_prompt_is_of_the_first_turn_and_no_evidence():
    row = [1, 30, 31, 32, *HEADER, 7, *CLOSING]
    assert found(row) == ([0] * 10, [7], True)


def test_a_later_question_has_its_header_without_the_first_token_of_all():
    template = Template((1, 50), (53,), header=(50,))
    row = [1, 50, 7, 53, 9, 50, 5, 53, 4]
    assert found(row, template=template) == ([0] * 5 + [1] * 4, [7, 5], True)


def test_an_earlier_question_may_have_the_beginning_of_the_closing_alone_behind_it():
    thinks = Template(OPENING, (*CLOSING, 60, 61), HEADER, footer=CLOSING)
    row = [*OPENING, 7, 8, *CLOSING, 9, 9, *HEADER, 5, *CLOSING, 60, 61, 4]
    assert found(row, template=thinks) == ([0] * 10 + [1] * 9, [7, 8, 5], True)
    assert found([9, *HEADER, 5, *CLOSING, 60], template=thinks, goes_on=True)[1] == [5]


def test_a_later_turn_may_come_alone_or_behind_the_end_of_an_answer():
    row = [9, *HEADER, 5, 6, *CLOSING]
    assert found(row) == ([0] * 8, [5, 6], True)
    assert found(row, goes_on=True) == ([0] + [1] * 7, [5, 6], True)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ([9, 9, 9, 9], []),  # an answer goes on
        ([9], []),
        ([7, 8, *CLOSING], [7, 8]),  # a question goes on, and is closed
        ([*CLOSING, 9], []),
    ],
)
def test_what_goes_on_without_a_header_asks_only_up_to_its_closing(row, asked):
    assert found(row, goes_on=True)[1] == asked


def test_without_a_template_or_without_a_question_all_that_is_there_decides():
    assert found([7, 8, 9], template=Template())[1] == [7, 8, 9]
    assert found([7, 8, 9], template=Template(), goes_on=True)[1] == []
    assert found([*OPENING, *CLOSING])[1] == [*OPENING, *CLOSING]
    assert found([7, 8, *CLOSING, 9], padding=3)[1] == [7, 8]
    none = PassInput(None, torch.ones(1, 3, dtype=torch.bool), goes_on=False)
    assert questions(none, TEMPLATE).asked.all()


def decided(choice, turns, row, logits, *, goes_on=False):
    ids = torch.tensor(row)
    turns.see(PassInput(ids, torch.ones_like(ids, dtype=torch.bool), goes_on))
    return choice.decide(lambda tokens: tokens, logits.flatten(0, 1)).view(logits.shape)


def test_a_turn_has_the_mean_log_probability_of_its_question():
    turns = Turns(TEMPLATE)
    choice = turns.at_gate()
    other = [*OPENING, 7, 8, 8, 8, *CLOSING, 9, 9, 9, 9, 9, 9, 9]  # one turn only
    logits = torch.randn(2, 17, 3)
    got, own = decided(choice, turns, [TWO, other], logits), logits.log_softmax(-1)
    torch.testing.assert_close(got[0, :10], own[0, 4:6].mean(0).expand(10, -1))
    torch.testing.assert_close(got[0, 10:], own[0, 13].expand(7, -1))
    torch.testing.assert_close(got[1], own[1, 4:8].mean(0).expand(17, -1))
    # the answers go on, three beams each
    held = decided(choice, turns, [[9]] * 6, torch.randn(6, 1, 3), goes_on=True)
    expected = torch.stack([own[0, 13], own[1, 4:8].mean(0)]).repeat_interleave(3, 0)
    torch.testing.assert_close(held[:, 0], expected)
    # a header without a question changes nothing
    empty = [[9, *HEADER, *CLOSING]] * 6
    held = decided(choice, turns, empty, torch.randn(6, 6, 3), goes_on=True)
    torch.testing.assert_close(held, expected[:, None].expand(-1, 6, -1))
    # of other sequences nothing is held: what precedes a header is decided with it
    logits = torch.randn(1, 7, 3)
    new = decided(choice, turns, [[9, *HEADER, 5, *CLOSING]], logits, goes_on=True)
    torch.testing.assert_close(new[0], logits.log_softmax(-1)[0, 4].expand(7, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_question_is_summed_up_in_32_bits(dtype):
    """In 16 bits, such as a model may be put into, the sums of a long one are rounded."""
    turns, ids = Turns(Template()), torch.ones(1, 3000).long()
    logits = torch.randn(1, 3000, 4).to(dtype)
    turns.see(PassInput(ids, ids > 0, goes_on=False))
    found = turns.at_gate().decide(lambda tokens: tokens, logits[0])
    expected = logits.float().log_softmax(-1).mean(1).expand(3000, -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_draft_of_an_answer_that_repeats_the_closing_asks_nothing():
    turns = Turns(Template(OPENING, CLOSING, HEADER))
    choice = turns.at_gate()
    first, draft = torch.randn(1, 6, 3), torch.randn(2, 4, 3)
    decided(choice, turns, [[*OPENING, 7, 8]], first)  # a question in two parts
    rest = torch.randn(1, 3, 3)
    own = decided(choice, turns, [[9, *CLOSING]], rest, goes_on=True)[:, -1:]
    torch.testing.assert_close(own[0, 0], rest.log_softmax(-1)[0, 0])
    decided(choice, turns, [[9]], torch.randn(1, 1, 3), goes_on=True)
    held = decided(choice, turns, [[7, *CLOSING, 9]] * 2, draft, goes_on=True)  # two beams
    torch.testing.assert_close(held, own.expand(2, 4, -1))
    new = decided(choice, turns, [[*HEADER, 5, *CLOSING]] * 2, torch.randn(2, 6, 3), goes_on=True)
    assert not torch.allclose(new[:, 0], own[:, 0])


@pytest.mark.parametrize(
    "begun",
    [
        [[*OPENING, 7, *CLOSING, 9, *HEADER, 5]],
        [[*OPENING, 7, *CLOSING], [9, *HEADER, 5]],
    ],
)
def test_a_later_question_may_come_in_two_parts(begun):
    turns = Turns(Template(OPENING, CLOSING, HEADER))
    choice = turns.at_gate()
    for place, row in enumerate(begun):
        decided(choice, turns, [row], torch.randn(1, len(row), 3), goes_on=place > 0)
    rest = torch.randn(1, 3, 3)
    found = decided(choice, turns, [[6, *CLOSING]], rest, goes_on=True)
    torch.testing.assert_close(found[0], rest.log_softmax(-1)[0, 0].expand(3, -1))


def test_where_later_questions_have_no_header_a_closing_alone_shows_them():
    turns = Turns(TEMPLATE)
    choice = turns.at_gate()
    decided(choice, turns, [[*OPENING, 7, *CLOSING]], torch.randn(1, 7, 3))
    logits = torch.randn(1, 4, 3)
    found = decided(choice, turns, [[30, 5, *CLOSING]], logits, goes_on=True)
    torch.testing.assert_close(found[0], logits.log_softmax(-1)[0, :2].mean(0).expand(4, -1))


def test_an_empty_row_of_a_batch_leaves_the_others_their_questions():
    turns, ids = Turns(TEMPLATE), torch.tensor([[*OPENING, 7, *CLOSING], [0] * 7])
    logits = torch.randn(2, 7, 3)
    turns.see(PassInput(ids, ids > 0, goes_on=False))
    found = turns.at_gate().decide(lambda tokens: tokens, logits.flatten(0, 1)).view(2, 7, 3)
    torch.testing.assert_close(found[0], logits.log_softmax(-1)[0, 4].expand(7, -1))
    assert found.isfinite().all()


def test_what_was_not_seen_is_refused():
    turns = Turns(TEMPLATE)
    choice = turns.at_gate()
    with pytest.raises(UnreadPromptError, match=r"5 tokens are to be routed .* a pass of 0"):
        choice.decide(lambda tokens: tokens, torch.randn(5, 3))
    with pytest.raises(UnreadPromptError, match="2 sequences go on, and the beginnings of 0"):
        decided(choice, turns, [[9], [9]], torch.randn(2, 1, 3), goes_on=True)
    decided(choice, turns, [[7]], torch.randn(1, 1, 3))
    turns.stop()
    with pytest.raises(UnreadPromptError, match="a pass of 0 was seen"):
        choice.decide(lambda tokens: tokens, torch.randn(1, 3))


def question(e, seed=0, length=6):
    """A question about task e, in the template."""
    return [*OPENING, *task_tokens(e, length, random.Random(seed)), *CLOSING]


def asked(num_each, template=TEMPLATE):
    """Examples that are questions alone, of different lengths."""
    opening, closing = template.opening, template.closing
    return [
        LabelledSequence(
            (*opening, *task_tokens(e, length, random.Random(1000 + i)), *closing),
            (*[UNLABELLED] * len(opening), *[e] * length, *[UNLABELLED] * len(closing)),
        )
        for e in range(4)
        for i, length in zip(range(num_each), itertools.cycle([5, 9, 24]), strict=False)
    ]


@pytest.fixture(scope="module")
def model(world):
    """Gates that are fitted to turns."""
    model = world.load()
    calibrate(model, asked(24), OPTIONS, template=TEMPLATE)
    yield model
    getattr(model, WATCHER).stop()


def answer(model, prompt, **options):
    return model.generate(torch.tensor([prompt]), **GREEDY, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_the_whole_answer_is_that_of_the_expert_whose_question_it_is(model, options):
    for e, name in enumerate(expert_names(model)):
        with force_expert(model, name):
            expected = answer(model, question(e), **options)
        assert answer(model, question(e), **options) == expected


def test_a_fit_that_is_stopped_leaves_a_model_that_answers_as_before(model):
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    prompt = question(1)
    before = answer(model, prompt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, asked(4), OPTIONS, template=TEMPLATE, progress=stop)
    assert answer(model, prompt) == before


def test_gates_that_decide_token_by_token_leave_nothing_that_watches_the_model(world):
    model = world.load()
    watch_prompts(model, TEMPLATE, OPTIONS)
    calibrate(model, asked(4), POINT_GATES)
    assert getattr(model, WATCHER) is None
    assert not model._forward_pre_hooks


def test_prompts_of_one_batch_have_decisions_of_their_own(model):
    prompts = [question(e, length=5 + 2 * e) for e in range(4)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, width:]
    assert together.tolist() == [answer(model, prompt) for prompt in prompts]


@torch.no_grad()
def test_a_conversation_on_one_cache_is_the_one_that_is_read_at_once(model):
    first, second = question(1), question(2)[1:]
    cache = DynamicCache()
    with recorded_routes(model) as one:
        before = model(torch.tensor([first]), past_key_values=cache).logits
    with recorded_routes(model) as two:
        after = model(torch.tensor([second]), past_key_values=cache).logits
    with recorded_routes(model) as whole:
        at_once = model(torch.tensor([[*first, *second]])).logits
    torch.testing.assert_close(torch.cat([before, after], 1), at_once, atol=1e-4, rtol=1e-4)
    for path, (_, experts) in whole.items():
        assert torch.equal(experts, torch.cat([one[path][1], two[path][1]])), path
    assert all(len(experts.unique()) == 1 for _, experts in two.values())


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_conversations_on_caches_of_their_own_take_turns(model, given, copied):
    """Whether the caller makes the cache or the model, and whether it goes on with a copy."""
    prompts = [question(1), question(2)]
    expected = [answer(model, prompt) for prompt in prompts]
    caches = [DynamicCache(), DynamicCache()] if given else [None, None]
    steps, found = [torch.tensor([prompt]) for prompt in prompts], [[], []]
    for _ in expected[0]:
        for i in (0, 1):
            out = model(steps[i], past_key_values=caches[i], use_cache=True)
            caches[i] = copy.deepcopy(out.past_key_values) if copied else out.past_key_values
            steps[i] = out.logits[:, -1:].argmax(-1)
            found[i].append(steps[i].item())
    assert found == expected


def routes_of(model, row, cache):
    """The expert of each token at each module."""
    with recorded_routes(model) as routes:
        model(torch.tensor([row]), past_key_values=cache)
    return {path: experts.flatten().tolist() for path, (_, experts) in routes.items()}


def cut(cache, length):
    cache.crop(length - cache.get_seq_length())


def rebuilt(cache):
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


@torch.no_grad()
def test_a_cache_without_decisions_takes_no_other_conversation_s(model):
    cache = DynamicCache()
    model(torch.tensor([question(1)]), past_key_values=cache)
    built = rebuilt(cache)
    with pytest.raises(UnreadPromptError, match="1 sequences go on, and the beginnings of 0"):
        model(torch.tensor([[9]]), past_key_values=built)
    # a question decides for itself
    built = rebuilt(cache)
    assert routes_of(model, question(2)[1:], built) == routes_of(model, question(2)[1:], cache)


@torch.no_grad()
def test_a_cache_that_is_cropped_has_the_decision_of_the_turn_in_which_it_ends(model):
    cache, later = DynamicCache(), question(2)[1:]
    model(torch.tensor([question(1)]), past_key_values=cache)
    first = routes_of(model, [9], cache)
    second = routes_of(model, later, cache)
    cache.crop(-2)
    assert {path: [e] for path, (e, *_) in second.items()} == routes_of(model, [9], cache) != first
    cache.crop(1 - len(later))  # and the 9
    assert routes_of(model, [9], cache) == first
    assert routes_of(model, later, cache) == second
    whole = DynamicCache()  # of what was read at once, only the last decision is kept
    model(torch.tensor([[*question(1), *later]]), past_key_values=whole)
    whole.crop(-len(later))
    with pytest.raises(UnreadPromptError, match="the beginnings of 0"):
        model(torch.tensor([[9]]), past_key_values=whole)


@torch.no_grad()
@pytest.mark.parametrize("kept", [len(OPENING), len(OPENING) + 2])
def test_a_cache_that_is_cut_inside_a_question_is_refused(model, kept):
    """Words that are gone decided: an end of another question would go where they said."""
    cache = DynamicCache()
    model(torch.tensor([question(1)]), past_key_values=cache)
    first = routes_of(model, [9], cache)
    second = routes_of(model, question(2)[1:], cache)
    cut(cache, len(question(1)) + kept)
    with pytest.raises(UnreadPromptError, match=f"crop it to {len(question(1)) + 1} or fewer"):
        routes_of(model, question(3)[kept:], cache)
    cut(cache, len(question(1)) + 1)
    assert routes_of(model, question(2)[1:], cache) == second
    cut(cache, len(question(1)) + 1)
    model(torch.tensor([[9, *HEADER]]), past_key_values=cache)  # a draft that is rejected
    cut(cache, len(question(1)) + 1)
    draft = routes_of(model, [7, 7, *CLOSING], cache)
    assert draft == {path: [e] * len(draft[path]) for path, (e,) in first.items()}


@torch.no_grad()
@pytest.mark.parametrize("alone", [without_experts, lambda model: force_expert(model, "q_and_v")])
def test_where_no_question_decides_a_cache_may_be_cut_inside_one(model, alone):
    """As the base's may, and PEFT's."""
    cache, ids = DynamicCache(), torch.tensor([question(1)])
    with alone(model):
        expected = model(ids, past_key_values=cache).logits[:, -4:]
        cut(cache, ids.shape[1] - 4)
        again = model(ids[:, -4:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["argument", "config", "own config"])
def test_a_prompt_is_not_to_be_cut(model, how, monkeypatch):
    prompt, asked = question(1), {"prefill_chunk_size": 4}
    if how == "config":
        asked = {"generation_config": GenerationConfig(**GREEDY, **asked)}
    elif how == "own config":
        monkeypatch.setattr(model.generation_config, "prefill_chunk_size", 4)
        asked = {}
    with pytest.raises(UnreadPromptError, match=f"a prompt of {len(prompt)} tokens"):
        answer(copy.deepcopy(model), prompt, **asked)
    with force_expert(model, expert_names(model)[0]):
        answer(model, prompt, **asked)
    model.generation_config.prefill_chunk_size = None
    whole = {"prefill_chunk_size": len(prompt)}
    assert answer(model, prompt, **whole) == answer(model, prompt)


def test_guidance_reads_another_prompt_beside(model):
    other = torch.tensor([question(3)])
    asked = {
        "guidance_scale": 1.5,
        "negative_prompt_ids": other,
        "negative_prompt_attention_mask": torch.ones_like(other),
    }
    assert answer(model, question(1), **asked) == answer(
        model, question(1), use_cache=False, **asked
    )


def test_gates_are_read_back_with_their_template(model):
    gates = gates_of(model)
    assert gates.template == TEMPLATE
    assert len(gates.own) + len(gates.follows) == len(routed_layers(model))
    assert gates.follows  # one gate for modules of one input


def test_plain_text_is_one_question(world):
    model = world.load()
    calibrate(model, asked(24, Template()), OPTIONS, template=Template())
    own = gates_of(model)
    insert_gates(model, Gates(own.own, own.follows), OPTIONS)  # as it is loaded
    for e, name in enumerate(expert_names(model)):
        prompt = task_tokens(e, 9, random.Random(3))
        with force_expert(model, name):
            expected = answer(model, prompt)
        assert answer(model, prompt) == expected
