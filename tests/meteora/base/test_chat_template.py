"""Text to ids, alike for fitting, measuring and answering."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meteora.base.chat_template import (
    ConversationError,
    Template,
    encode_messages,
    encode_pair,
    encode_prompt,
)
from meteora.routing.passes import PassInput
from meteora.routing.turns import questions

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


@pytest.fixture
def merging():
    """Line breaks in a row are one token, and so are a question mark and a line break."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("?", "Ċ"), ("Ċ", "Ċ")]
    vocab = ["<s>", "</s>", *letters, *map("".join, pairs)]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<s>", "</s>"]
    )


@pytest.mark.parametrize(
    ("template", "header", "end"),
    [
        (
            "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
            "er",
            "</s>\n<s>assistant",
        ),
        (
            "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}\n\n{% endfor %}"
            "{% if add_generation_prompt %}a>{% endif %}",
            "u>",
            "a>",
        ),
    ],
)
def test_a_question_is_found_where_its_text_merges_with_the_template(
    merging, template, header, end
):
    merging.chat_template = template
    found = Template.of(merging)
    assert (merging.decode(found.header), merging.decode(found.question_end)) == (header, end)
    turns = [("\n\nWhat?", "\nThat."), ("  Who?", "He."), ("\nWhy?", "")]
    talk = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    ids = torch.tensor([encode_messages(merging, talk[:-1])])
    asked = questions(PassInput(ids, torch.ones_like(ids).bool(), goes_on=False), found)
    for number, (question, _) in enumerate(turns):
        text = merging.decode(ids[0, asked.asked[0] & (asked.turn[0] == number)])
        assert text.strip() == question.strip()


def test_a_tokenizer_without_an_end_ends_with_the_answer(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert encode_pair(endless, "a", "b")[-1] == endless("b").input_ids[-1]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9].content }}", "list object has no element 9"),
        ("{{ raise_exception('\x1b[2Jno') }}", "�.2Jno"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ 'x' + 1 }}", "can only concatenate str"),
        ("{% if", "unexpected 'end of template'"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{% break %}", "'break' outside loop"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_is_refused(chat, template, reason):
    """It comes with a base, and so from a stranger."""
    chat.chat_template = template
    with pytest.raises(ConversationError, match=reason) as caught:
        encode_prompt(chat, "2 + 2")
    assert str(caught.value).isprintable()
