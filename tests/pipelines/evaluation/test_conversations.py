"""Conversations with a live model: one cache gives what computing the history again gives."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from meteora.artifacts import NULL, RouterOptions
from meteora.artifacts.routers import POINT_GATES
from meteora.base.chat_template import Template
from meteora.fitting.background import fit_to_background
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import UNLABELLED
from meteora.model.fused import expert_names, force_expert, insert_experts, without_experts
from meteora.model.generate import answer_all
from meteora.model.prompt_choice import insert_prompt_routers
from pipelines.data.conversations import converse
from pipelines.data.dialogues import draw_dialogues
from pipelines.data.labels import Labeller
from pipelines.data.rows import ExamplesError, Row
from pipelines.evaluation.conversations import Conversing
from pipelines.evaluation.oracle_routing import send_to
from tests.pipelines.data.test_conversations import CHATML

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.dialogues import Dialogue
    from tests.conftest import World

NAMES = ("all_seven", "attention", "q_and_v", "patterns")
ROWS = {name: [Row(f"{name}{i * '?'}", "x") for i in range(4)] for name in NAMES}
NEW = 5


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    return tokenizer


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return draw_dialogues(ROWS, 3, 5, seed=0)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: list[Dialogue],
    **more: Any,
) -> list[list[dict[str, Any]]]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 3} | more
    return Conversing(model, tokenizer, **settings).ask(dialogues)


def texts(found: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[turn["output"] for turn in turns] for turns in found]


def again(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> list[list[str]]:
    """The answers without a cache between the turns, and one conversation at a time."""
    found = []
    for dialogue in dialogues:
        said: list[str] = []
        for _ in dialogue.questions:
            ids, _ = dialogue.with_answers(said).encode(tokenizer)
            (answer,) = answer_all(model, tokenizer, [ids[:-1]], NEW)
            said.append(str(tokenizer.decode(answer, skip_special_tokens=True)))
        found.append(said)
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "qwen3", "phi3"])
def test_one_cache_over_all_turns_gives_the_same_answers(
    kind: str,
    build_base: Callable[[str], Path],
    chat: PreTrainedTokenizerBase,
    dialogues: list[Dialogue],
) -> None:
    """With all kinds of positions; Mistral's forget, and Phi 3's depend on the longest text."""
    base = AutoModelForCausalLM.from_pretrained(build_base(kind), dtype="float64").eval()
    base.generation_config.num_beams = 2  # what a base asks for is not asked of it here
    found = ask(base, chat, dialogues, batch_size=1 if kind == "phi3" else 3)
    assert texts(found) == again(base, chat, dialogues)
    for turns in found:
        assert turns[0]["computed_tokens"] == turns[0]["prompt_tokens"]
        for before, turn in itertools.pairwise(turns):
            reused = turn["prompt_tokens"] - turn["computed_tokens"]
            assert reused == 0 if kind in {"mistral", "phi3"} else reused >= before["prompt_tokens"]


def test_an_answer_is_read_from_the_cache_and_its_end_is_not_said_again(
    chat: PreTrainedTokenizerBase, build_base: Callable[[str], Path], dialogues: list[Dialogue]
) -> None:
    """The byte that comes after `|` most often ends an answer here, so that some are short."""
    base = AutoModelForCausalLM.from_pretrained(build_base("llama"), dtype="float64").eval()
    everything = texts(ask(base, chat, dialogues, max_new_tokens=12))
    letters = Counter("".join(text[1:] for turns in everything for text in turns))
    common = next(letter for letter, _ in letters.most_common() if letter.isascii())
    base.generation_config.eos_token_id = [2, chat.convert_tokens_to_ids(common)]
    found = ask(base, chat, dialogues, max_new_tokens=12)
    ended = [turn for turns in found for turn in turns if not turn["truncated"]]
    assert 0 < len(ended) < len(found) * 3
    for turn in ended:
        assert common not in turn["output"]
        assert 1 <= turn["new_tokens"] <= 12
    alone = ask(base, chat, dialogues, max_new_tokens=12, batch_size=1)
    assert [[{**turn, "seconds": 0} for turn in turns] for turns in found] == [
        [{**turn, "seconds": 0} for turn in turns] for turns in alone
    ]


RULES = {
    "prompt": replace(POINT_GATES, opening="prompt"),
    "shared": replace(POINT_GATES, opening="shared"),
    "turn": replace(POINT_GATES, opening="prompt", share="turn"),
}


@pytest.fixture(scope="module", params=RULES)
def fused(
    request: pytest.FixtureRequest, world: World, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Gates fitted to conversations, with each rule for the opening, and for whole turns."""
    options = RULES[request.param]
    model = world.load_base()
    insert_experts(model, world.checkpoint, replace(world.manifest, router=options))
    chat = copy.copy(tokenizer)
    chat.chat_template = CHATML
    names = world.manifest.names
    talks = converse(ROWS, NAMES, (2, 3), (), seed=0) * 3
    shared = request.param == "shared"
    nobody = len(names) if shared else UNLABELLED
    sequences = Labeller(chat, names, nobody).spans(talks)
    calibrate(model, sequences, options, template=None if shared else Template.of(chat))
    return model


def test_a_fused_model_answers_as_if_it_read_everything_again(
    fused: PreTrainedModel, chat: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> None:
    """With the rule that looks ahead, too: what decides for the opening ends with a question."""
    assert texts(ask(fused, chat, dialogues)) == again(fused, chat, dialogues)


def given(dialogue: Dialogue, said: list[str], control: str, chat: Any) -> Any:
    """The tokens of a turn's prompt, and their experts as the definition of a control has it."""
    ids, owners = dialogue.with_answers(said).encode(chat)
    ids, owners = ids[:-1], owners[:-1]
    own = owners[-1]
    if control == "swap":
        return ids, [own] * len(ids)
    start = len(ids) - owners[::-1].index(None)
    if control == "alora":
        return ids, [NULL] * start + [own] * (len(ids) - start)
    experts, place = [], -1
    for before, owner in zip([None, *owners], owners, strict=False):
        place += owner is not None and before is None  # a turn begins
        following = dialogue.questions[max(0, place if owner else place + 1)].task
        experts.append(owner or following)
    return ids, experts


@pytest.mark.parametrize("control", ["oracle", "swap", "alora"])
def test_a_control_routes_each_turn_as_its_definition_says(
    fused: PreTrainedModel,
    chat: PreTrainedTokenizerBase,
    dialogues: list[Dialogue],
    control: str,
) -> None:
    hooks = dict(fused._forward_pre_hooks)  # of the rule that looks ahead, which stays
    found = ask(fused, chat, dialogues, control=control)
    for dialogue, turns in zip(dialogues, found, strict=True):
        said: list[str] = []
        for turn in turns:
            ids, experts = given(dialogue, said, control, chat)
            passes = itertools.chain([experts], itertools.repeat(experts[-1:]))
            with send_to(fused, lambda _ids, _more, left=passes: [next(left)]):
                (answer,) = answer_all(fused, chat, [ids], NEW)
            assert turn["output"] == chat.decode(answer, skip_special_tokens=True)
            assert turn["prompt_tokens"] == len(ids)
            said.append(turn["output"])
        computed = [turn["computed_tokens"] for turn in turns]
        total = [turn["prompt_tokens"] for turn in turns]
        assert (computed == total) == (control == "swap")
        if control == "alora":  # the base reads the turn before, which its expert has read
            assert computed[2] > total[2] - total[1]
    assert fused._forward_pre_hooks == hooks


@pytest.mark.parametrize("control", ["oracle", "swap", "alora"])
def test_a_control_is_the_same_where_the_model_reads_whole_prompts_first(
    world: World, chat: PreTrainedTokenizerBase, dialogues: list[Dialogue], control: str
) -> None:
    """A second pass, to read a prompt, would take the routes of the first."""
    options = RouterOptions("prompt", top_k=1, temperature=1.0)
    model = world.load_base()
    insert_experts(model, world.checkpoint, replace(world.manifest, router=options))
    expected = ask(model, chat, dialogues, control=control)
    texts_of_others = [[3 + (i * j) % 40 for j in range(1, 20)] for i in range(1, 30)]
    gates = fit_to_background(model, texts_of_others, options, Template.of(chat))
    insert_prompt_routers(model, gates, options)
    found = ask(model, chat, dialogues, control=control)
    assert texts(found) == texts(expected)


def test_single_and_one_expert_are_the_expert_forced(
    fused: PreTrainedModel, chat: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> None:
    with force_expert(fused, "attention"):
        expected = again(fused, chat, dialogues)
    found = ask(fused, chat, dialogues, control="one_expert", expert="attention")
    assert texts(found) == expected
    found = ask(fused, chat, dialogues, control="single")
    for dialogue, turns in zip(dialogues, found, strict=True):
        for place, turn in enumerate(turns):
            with force_expert(fused, dialogue.questions[place].task):
                assert again(fused, chat, [dialogue.alone(place)]) == [[turn["output"]]]
            assert turn["computed_tokens"] == turn["prompt_tokens"]


def test_tokens_are_sent_to_the_base_where_it_is_no_choice(
    fused: PreTrainedModel, chat: PreTrainedTokenizerBase
) -> None:
    ids = chat("any text", return_tensors="pt").input_ids
    with torch.inference_mode():
        with without_experts(fused):
            expected = fused(input_ids=ids).logits
        assert NULL not in expert_names(fused)
        with send_to(fused, lambda ids, _more: [[NULL] * ids.shape[1]]):
            torch.testing.assert_close(fused(input_ids=ids).logits, expected)


def test_prompts_that_are_too_long_and_templates_that_refuse_are_told(
    fused: PreTrainedModel, chat: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> None:
    lengths: list[int] = []
    done: list[int] = []
    found = ask(fused, chat, dialogues, check=lengths.extend, advance=done.append)
    assert lengths[:3] == [turns[0]["prompt_tokens"] for turns in found[:3]]
    assert (len(lengths), done) == (15, [3, 3, 3, 2, 2, 2])
    chat.chat_template = "{{ raise_exception('one turn alone') }}"
    with pytest.raises(ExamplesError, match=r"does not take these messages: .*; set"):
        ask(fused, chat, dialogues)
