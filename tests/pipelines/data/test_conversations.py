"""Conversations made from single questions: each token has the owner that a reader gives it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meteora.base.chat_template import encode_pair
from pipelines.data.conversations import (
    CONVERSATION_TURNS,
    STAY,
    STORY,
    SYSTEM_PROMPTS,
    TOOLS,
    Conversation,
    Turn,
    converse,
    default_system_prompts,
    takes,
    within,
)
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXAMPLES = {
    "red": [Row(f"red {i}?", f"crimson {i}") for i in range(7)],
    "blue": [Row(f"blue {i}?", f"azure {i}") for i in range(5)],
}


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch):
    """The byte tokenizer with a chat template that puts a system prompt of its own in front."""
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    return tokenizer


def text_by_owner(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> list[tuple[str | None, str]]:
    ids, owners = conversation.encode(tokenizer)
    pieces: list[tuple[str | None, str]] = []
    for token, owner in zip(ids, owners, strict=True):
        text = str(tokenizer.decode([token]))
        if pieces and pieces[-1][0] == owner:
            pieces[-1] = owner, pieces[-1][1] + text
        else:
            pieces.append((owner, text))
    return pieces


def test_a_turn_owns_its_question_its_answer_and_the_token_that_ends_it(chat) -> None:
    turns = (Turn("red", " red? ", "crimson"), Turn("blue", "blue?", "azure"))
    assert text_by_owner(chat, Conversation(turns, "red? blue?")) == [
        (None, "<|system|>red? blue?<|end|><|user|>"),
        ("red", "red?<|end|><|assistant|>crimson<"),  # a byte a token: the end is `<|end|>`'s first
        (None, "|end|><|user|>"),
        ("blue", "blue?<|end|><|assistant|>azure</s>"),
    ]


def test_a_conversation_of_one_turn_is_encoded_as_a_pair(chat) -> None:
    ids, _ = Conversation((Turn("red", "red?", "crimson"),)).encode(chat)
    assert ids == encode_pair(chat, "red?", "crimson")


def test_every_example_is_one_turn_and_every_other_system_prompt_is_the_templates() -> None:
    made = converse(EXAMPLES, [*EXAMPLES], (2, 3), SYSTEM_PROMPTS, seed=1)
    turns = Counter((turn.expert, turn.prompt) for one in made for turn in one.turns)
    assert turns == {(name, row.prompt): 1 for name, rows in EXAMPLES.items() for row in rows}
    assert {len(one.turns) for one in made[:-1]} <= {2, 3}
    assert [one.system for one in made[::2]] == [None] * len(made[::2])
    assert [one.system for one in made[1::2]] == list(SYSTEM_PROMPTS[: len(made[1::2])])
    assert made == converse(EXAMPLES, [*EXAMPLES], (2, 3), SYSTEM_PROMPTS, seed=1)
    assert made != converse(EXAMPLES, [*EXAMPLES], (2, 3), SYSTEM_PROMPTS, seed=2)


def test_gates_see_system_prompts_of_many_lengths() -> None:
    """Those that saw short ones alone route worse under long ones."""
    lengths = [len(prompt) for prompt in SYSTEM_PROMPTS]
    assert min(lengths) == 0
    assert sum(length < 100 for length in lengths) >= 20
    assert sum(length > 600 for length in lengths) >= 2


@pytest.mark.parametrize("count", [8, 16, 24, 64])
def test_fits_of_few_examples_see_long_system_prompts(count: int) -> None:
    rows = {name: [Row(f"{name}{i}", "") for i in range(count)] for name in "abcdef"}
    systems = default_system_prompts(6 * count, CONVERSATION_TURNS)
    made = converse(rows, [*rows], CONVERSATION_TURNS, systems, seed=0)
    taken = {one.system for one in made[1::2]}
    assert {"", SYSTEM_PROMPTS[1], TOOLS, STORY} <= taken
    assert sorted(systems) == sorted(SYSTEM_PROMPTS)


def test_a_turn_is_more_often_of_the_same_expert_than_a_draw_gives() -> None:
    rows = [Row(str(i), "") for i in range(1000)]
    made = converse(dict.fromkeys("abcde", rows), [*"abcde"], (4,), [], seed=0)
    stays = [one.expert == then.expert for talk in made for one, then in pairwise(talk.turns)]
    assert sum(stays) / len(stays) == pytest.approx(STAY + (1 - STAY) / 5, abs=0.02)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param(
            "{{ raise_exception('System role not supported') }}",
            "not take these messages: System role not supported; set `gates",
            id="refuses",
        ),
        pytest.param(CHATML.replace("| trim", "| upper"), "changes what", id="changes"),
    ],
)
def test_a_template_that_takes_no_conversation_is_refused_in_a_sentence(
    chat, template: str, said: str
) -> None:
    chat.chat_template = template
    with pytest.raises(ExamplesError, match=said):
        Conversation((Turn("red", "red?", "crimson"),), "be brief").encode(chat)


def test_a_turn_is_not_found_in_the_templates_own_words(chat) -> None:
    turns = (Turn("red", "kind", "a"), Turn("blue", "user", "s"), Turn("red", "end", "<"))
    assert text_by_owner(chat, Conversation(turns)) == [
        (None, "<|system|>Be kind.<|end|><|user|>"),
        ("red", "kind<|end|><|assistant|>a<"),
        (None, "|end|><|user|>"),
        ("blue", "user<|end|><|assistant|>s<"),
        (None, "|end|><|user|>"),
        ("red", "end<|end|><|assistant|><</s>"),
    ]


def test_a_template_may_be_another_for_some_contents(chat) -> None:
    thinks = "{% if messages[0].content == 'red?' %}<think>{% endif %}"
    chat.chat_template = thinks + CHATML
    turns = (Turn("red", "red?", " crimson "), Turn("blue", "red?", "azure"))
    assert text_by_owner(chat, Conversation(turns))[1:] == [
        ("red", "red?<|end|><|assistant|>crimson<"),
        (None, "|end|><|user|>"),
        ("blue", "red?<|end|><|assistant|>azure</s>"),
    ]


def test_a_template_may_leave_out_the_thoughts_of_earlier_answers(chat) -> None:
    chat.chat_template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    turns = (Turn("red", "red?", "hm</think> crimson"), Turn("blue", "blue?", "azure"))
    assert text_by_owner(chat, Conversation(turns))[1:3] == [
        ("red", "red?<|end|><|assistant|>crimson<"),
        (None, "|end|><|user|>"),
    ]


def test_the_first_token_of_a_question_may_begin_with_the_templates_space() -> None:
    inner = Tokenizer(models.WordLevel({"user": 0, "Ġred": 1}))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chat = PreTrainedTokenizerFast(tokenizer_object=inner)
    chat.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    ids, owners = Conversation((Turn("red", "red", ""),)).encode(chat)
    assert (ids, owners) == ([0, 1], [None, "red"])


def test_a_conversation_without_room_is_one_of_each_of_its_turns(chat) -> None:
    short, long = Turn("red", "red?", "crimson"), Turn("blue", "b" * 40, "azure")
    talk = Conversation((short, long), "Be brief.")
    most = len(talk.encode(chat)[0])
    assert within(most, [talk], chat) == [talk]
    alone = [Conversation((turn,), "Be brief.") for turn in (short, long)]
    assert within(most - 1, [talk], chat) == alone
    least = len(alone[1].encode(chat)[0]) - 1
    assert within(least, [talk], chat) == [alone[0], Conversation((long,))]


def test_a_tokenizer_in_python_gives_no_places_but_its_template_takes_turns(
    python_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert takes(python_tokenizer, turns=2, system="Be brief.")
    with pytest.raises(ExamplesError, match="gives no places of its tokens"):
        Conversation((Turn("red", "red?", "crimson"),)).encode(python_tokenizer)
