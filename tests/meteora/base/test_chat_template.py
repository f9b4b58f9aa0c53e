"""Text to ids, alike for fitting, measuring and answering."""

from __future__ import annotations

import copy

import pytest

from meteora.base.chat_template import Template, encode_pair, encode_prompt

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    return chat


def test_a_pair_begins_with_its_prompt_and_ends_the_sequence(tokenizer, chat):
    for one in (tokenizer, chat):
        prompt, pair = encode_prompt(one, "2 + 2"), encode_pair(one, "2 + 2", "4")
        assert pair[: len(prompt)] == prompt
        assert pair[len(prompt) :] == [*one("4").input_ids, one.eos_token_id]


def test_a_chat_template_is_applied_once(chat):
    text = chat.decode(encode_prompt(chat, "hello"))
    assert text == "<s>user: hello</s><s>assistant: "


def test_the_opening_is_what_all_prompts_begin_with(tokenizer, chat):
    assert Template.of(tokenizer) == Template()
    found = Template.of(chat)
    assert (chat.decode(found.opening), chat.decode(found.closing)) == (
        "<s>user: ",
        "</s><s>assistant: ",
    )


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (TEMPLATE, "r: "),  # its last tokens, which are single characters here
        ("<s>{% for m in messages %}{{ '[' if m.role == 'user' else ']' }}{{ m.content }}"
         "{% endfor %}]", "["),  # only the first question has <s> before it
        ("<s>[{{ messages[0].content }}]", ""),  # no second question
        ("{{ raise_exception('one turn') if messages[1:] }}[{{ messages[0].content }}]", ""),
    ],
)  # fmt: skip
def test_a_header_stands_before_later_questions_too(chat, template, header):
    chat.chat_template = template
    assert chat.decode(Template.of(chat).header) == header


@pytest.mark.parametrize(
    ("opens", "footer"),
    [
        ("<t></t>", "</s><s>assistant: "),  # an empty block, which the history leaves out
        ("<t>", "</s><s>assistant: "),
        ("", ""),  # nothing but the closing
    ],
)
def test_a_footer_stands_behind_earlier_questions_where_the_closing_does_not(chat, opens, footer):
    chat.chat_template = TEMPLATE.replace(
        "assistant: {% endif %}", f"assistant: {opens}{{% endif %}}"
    )
    found = Template.of(chat)
    assert chat.decode(found.closing) == f"</s><s>assistant: {opens}"
    assert chat.decode(found.footer) == footer
    assert chat.decode(found.question_end) == "</s><s>assistant: "


def test_a_tokenizer_without_an_end_ends_with_the_answer(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert encode_pair(endless, "a", "b")[-1] == endless("b").input_ids[-1]
