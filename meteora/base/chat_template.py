"""Text to token ids, the same way wherever a prompt is fitted, measured or answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Self

from meteora.artifacts import MeteoraError
from meteora.artifacts.identity import Noun
from meteora.untrusted.findings import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HEADER = 3
"""Most tokens of a header: enough to find it, and the same after any system prompt."""
MARK = "\ue000"
"""Placeholder for the content of a message: a private-use character, which no template has."""
ODD = ("\n\none", "  one", "\tone", "one?")
"""Texts whose first or last tokens some tokenizers merge with the text beside them."""


class ConversationError(MeteoraError):
    """A conversation cannot be put to a model."""


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages in the chat template, with the generation prompt for the next answer.

    Raises:
        ConversationError: the template does not take them, or is no sound one.
    """
    asked = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a stranger's program can raise anything
        raise ConversationError(
            f"the base's chat template does not take these messages: {brief(error)}"
        ) from error
    return _whole(str(text))


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as the model expects it: in the tokenizer's chat template, if it has one."""
    if not tokenizer.chat_template:
        return prompt
    return rendered(tokenizer, [{"role": "user", "content": prompt}])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt; a chat template has its own special tokens.

    Raises:
        ConversationError: the prompt is no text, or no Unicode, or the template does not take it.
    """
    if not isinstance(prompt, str):  # a template would write whatever it is given
        raise ConversationError(f"a prompt is text, and this is a {type(prompt).__name__}")
    text = render_prompt(tokenizer, prompt)
    return encode_text(tokenizer, text, add_special_tokens=not tokenizer.chat_template)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Return the token ids of a conversation, with the generation prompt for the next answer.

    Args:
        messages: `role` and `content` of each

    Raises:
        ConversationError: there is no chat template, it does not take these messages, or they are
            no Unicode, or there are none.
    """
    if not messages:
        raise ConversationError("there are no messages to answer; ask something")
    if not tokenizer.chat_template:
        raise ConversationError(
            "the base's tokenizer has no chat template, so it has no conversations; ask it with"
            " `meteora generate`, or a server at /v1/completions"
        )
    return encode_text(tokenizer, rendered(tokenizer, messages), add_special_tokens=False)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of a text as it stands, in no chat template.

    Raises:
        ConversationError: the text is no Unicode.
    """
    return list(tokenizer(_whole(text), add_special_tokens=add_special_tokens).input_ids)


def _whole(text: str) -> str:
    """The text itself; raises a `ConversationError` if it is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            "the prompt has half of a surrogate pair, which is no character"
        ) from error
    return text


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Return the token ids of a prompt, its answer and, if the tokenizer has one, the end token."""
    answer = tokenizer(response, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*encode_prompt(tokenizer, prompt), *answer, *end]


def content_places(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], text: str
) -> list[tuple[int, int]] | None:
    """Find the content of each message, except a system prompt, in a rendered conversation.

    The template is rendered with marks as contents; the texts between the marks are its own. A
    plain search would find a short content in the template's words: an answer "a" in "assistant".

    Args:
        messages: `role` and `content` of each
        text: the rendered messages, with the generation prompt

    Returns:
        (start, end) of each in characters, without white space around it. If the template leaves
        out a part, such as thoughts: of the rest. None if it changes a content in another way.
    """
    own = [message["role"] != "system" for message in messages]
    marked = [
        dict(message, content=MARK) if one else message
        for message, one in zip(messages, own, strict=True)
    ]
    frame = rendered(tokenizer, marked).split(MARK)
    contents = [message["content"] for message, one in zip(messages, own, strict=True) if one]
    if len(frame) != len(contents) + 1 or not text.startswith(frame[0]):
        return None
    places, at = [], len(frame[0])
    for content, behind in zip(contents, frame[1:], strict=True):
        form = _form_of(content, text, at, behind)
        if form is None:
            return None
        start = at + len(form) - len(form.lstrip())
        places.append((start, start + len(form.strip())))
        at += len(form) + len(behind)
    return places if at == len(text) else None


def _form_of(content: str, text: str, at: int, behind: str) -> str | None:
    """The form of a content in a text that begins at `at` and ends before `behind`."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(form + behind, at):
            return form
    form, found, _ = text[at:].partition(behind) if behind else (text[at:], True, "")
    return form if found and form.strip() in content else None


@dataclass(frozen=True)
class Template(Noun):
    """The tokens that every prompt begins and ends with; empty without a chat template."""

    opening: tuple[int, ...] = ()
    """Token ids before the prompt's own."""
    closing: tuple[int, ...] = ()
    """Token ids after the prompt's own; the answer follows them."""
    header: tuple[int, ...] = ()
    """The end of the opening that also comes before later questions of a conversation."""
    footer: tuple[int, ...] = ()
    """The tokens after every question, if they are only a part of the closing: some closings open a
    block of thoughts for the next answer, some end with a line break that a tokenizer merges with
    the answer. Empty if they are the whole closing."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Find the template of a tokenizer by comparing two prompts without a common letter.

        Header and footer leave out tokens that the tokenizer merges with some texts beside them.
        """
        one, other = encode_prompt(tokenizer, "one"), encode_prompt(tokenizer, "7")
        opening = common_beginning(one, other)
        closing = common_end(one[len(opening) :], other[len(opening) :])
        odd = [encode_prompt(tokenizer, text) for text in ODD]
        merged = len(closing) - len(common_end(closing, *odd))  # tokens merged with a question
        kept = len(common_beginning(opening, *odd))

        def second(content: str, answer: str = "two") -> list[int]:
            turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answer}]
            return encode_messages(tokenizer, [*turn, {"role": "user", "content": content}])

        try:
            before = common_beginning(second("one"), second("7"))
            kept_before = len(common_beginning(before, *map(second, ODD)))
            answered = [second("one", answer) for answer in ("two", *ODD)]
        except ConversationError:  # no template, or one that takes a single question
            return cls(opening, closing, footer=closing[merged:] if merged else ())
        header = common_end(opening, before)[-HEADER:]
        beside = max(len(opening) - kept, len(before) - kept_before)
        header = header[: max(0, len(header) - beside)] or header
        behind = common_beginning(one, *answered)[len(one) - len(closing) :]
        footer = behind[merged:] or behind
        return cls(opening, closing, header, footer if footer != closing else ())

    @property
    def question_end(self) -> tuple[int, ...]:
        """The token ids after every question of a conversation, earlier ones included."""
        return self.footer or self.closing


def common_beginning(*sequences: Sequence[int]) -> tuple[int, ...]:
    """The longest common beginning of all sequences."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return tuple(tokens[0] for tokens in same)


def common_end(*sequences: Sequence[int]) -> tuple[int, ...]:
    """The longest common end of all sequences."""
    return common_beginning(*(one[::-1] for one in sequences))[::-1]
