"""Conversations: examples of one or several turns, made from examples of one turn.

    system   You are a helpful assistant.            no expert
    user     Convert this date: March 3, 2021.       iso_dates
    ...      2021-03-03                              iso_dates
    user     What is 12 plus 30?                     arithmetic
    ...      42                                      arithmetic

From them, gates learn to change the expert when the subject changes, to keep it otherwise, and that
a system prompt belongs to no expert. A turn's tokens belong to the turn's expert, from the first
token of its question to the token that ends its answer. Tokens between two turns belong to no
expert: the next subject is not known there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING

from meteora.artifacts import Noun
from meteora.base.chat_template import ConversationError, content_places, rendered
from pipelines.data.composites import with_places
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CONVERSATION_TURNS = (1, 2, 3, 4)
"""Default numbers of turns. Conversations of one turn are single questions, as the first turn of
any conversation is."""
STAY = 0.25
"""Probability that the next turn keeps the expert; otherwise one is drawn among all."""
TOOLS = (
    "You help people who write programs. You can call these tools:\n"
    '[{"name": "read_file", "description": "The text of a file", "parameters":'
    ' {"path": "string"}},\n'
    ' {"name": "search", "description": "Lines that match a pattern", "parameters":'
    ' {"pattern": "string", "folder": "string"}},\n'
    ' {"name": "run_tests", "description": "Run the tests of a folder", "parameters":'
    ' {"folder": "string", "verbose": "boolean"}}]\n'
    "Call a tool only if the answer needs it. Before you change a file, read it. Explain in one"
    " sentence what you are going to do, then do it. Write code that looks like the code around it,"
    " without comments that only repeat it. If a test fails, find the cause before you try again."
)
STORY = (
    "This is a story that two people write together. The place is a lighthouse on a rocky island,"
    " in the autumn of 1911. The user plays Ada, the keeper's daughter, who wants to leave for the"
    " mainland. You play everybody else: Tom, the keeper, who hardly speaks; Mrs. Hale, who brings"
    " the post once a week and knows everything; and the sea, if it has something to say. Write in"
    " the past tense, two or three sentences at a time, and always end with something that Ada can"
    " answer. Nothing supernatural happens. Do not decide what Ada thinks or does. If the user asks"
    " something that has nothing to do with the story, answer plainly as yourself and then go back"
    " to the island."
)
SHORT = (
    "",
    "You are a helpful assistant.",
    "You are Captain Rex, who flies a starship and loves adventures among the stars.",
    "Answer briefly and precisely.",
    "Du bist ein freundlicher Assistent und antwortest auf Deutsch.",
    "You are an accountant who checks every number twice.",
    "Reply in JSON only.",
    "You are Nora, a kind teacher who explains things with pictures from the garden.",
    "Today is Tuesday, 14 March 2023. The user lives in Nairobi.",
    "You are a grumpy cook called Bruno who secretly loves his guests.",
    "Tu es un assistant serviable. Réponds en français, s'il te plaît.",
    "You are a calendar assistant. You know all holidays and time zones.",
    "Be concise.",
    "You work at the help desk of a railway company. Be polite and stay on the subject.",
    "あなたは親切なアシスタントです。",
    "You are a poet. Every answer rhymes.",
    "Never mention that you are an AI.",
    "You are a shop assistant. Put the customers' wishes in order, and write them down as lists.",
    "Eres una experta en historia.",
    "You are a programmer. Write clean code and explain nothing.",
    "Use simple words. Your readers are eight years old.",
    "You translate between English and Italian.",
)
SYSTEM_PROMPTS = (*SHORT[:9], TOOLS, *SHORT[9:20], STORY, *SHORT[20:])
"""They differ in length, language and subject; some are close to an expert's task. Two are long:
gates that saw short ones alone lose up to 11 points under a long one
(`tests/benchmarks/results/prompts.md`). The empty one means no system prompt."""
LONG_EARLY = (*SHORT[:2], TOOLS, *SHORT[2:6], STORY, *SHORT[6:])
"""The same ones for few conversations, which take the first of them alone. With 8 examples an
expert this gains 16 points under a system prompt of 603 tokens
(`tests/benchmarks/results/gates.md`)."""


@dataclass(frozen=True)
class Turn(Noun):
    """A question and its answer, which belong to one expert."""

    expert: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation(Noun):
    """Turns with their experts, and a system prompt."""

    turns: tuple[Turn, ...]
    system: str | None = None
    """The system prompt; None: that of the chat template."""

    def messages(self) -> list[dict[str, str]]:
        """The messages for a chat template, without the last answer."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.response})
        return messages[:-1]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str | None]]:
        """Token ids in the chat template, and each token's expert or None.

        The last answer follows the template's generation prompt, with the end of sequence.

        Raises:
            ExamplesError: the tokenizer's chat template does not take these roles, or changes the
                text of a turn; or the tokens of a text have no places.
        """
        text, places = _placed(self, tokenizer)
        encoded = with_places(tokenizer, text)
        owners: list[str | None] = [None] * len(encoded.input_ids)
        for turn, (start, end) in zip(self.turns, places, strict=True):
            for token, (first, behind) in enumerate(encoded["offset_mapping"]):
                if behind > start:  # its first token may have a space in front
                    owners[token] = turn.expert
                if first >= end:  # the token behind an answer ends the turn
                    break
        final = self.turns[-1]
        answer = list(tokenizer(final.response, add_special_tokens=False).input_ids)
        if tokenizer.eos_token_id is not None:
            answer.append(tokenizer.eos_token_id)
        return [*encoded.input_ids, *answer], [*owners, *[final.expert] * len(answer)]


def within(
    room: int, conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[Conversation]:
    """Replace each conversation of more than `room` tokens by one conversation for each turn.

    If a turn does not fit with its system prompt, it gets the chat template's own.
    """

    def fits(one: Conversation) -> bool:
        return len(one.encode(tokenizer)[0]) <= room

    short = []
    for one in conversations:
        alone = [one] if fits(one) else [Conversation((turn,), one.system) for turn in one.turns]
        short += [turn if fits(turn) else Conversation(turn.turns) for turn in alone]
    return short


def converse(
    examples: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    lengths: Sequence[int],
    system_prompts: Sequence[str],
    *,
    seed: int,
) -> list[Conversation]:
    """Make conversations in which every example is one turn.

    The length of each conversation and the expert of each turn are drawn. Every second conversation
    has one of the system prompts, if there are any; the others have the chat template's own.

    Args:
        examples: by expert
        names: of the experts that take part
        lengths: the possible numbers of turns
    """
    rng = random.Random(f"{seed}/{sorted(lengths)}")  # noqa: S311  (no secret)
    left = {
        name: rng.sample(examples[name], len(examples[name])) for name in names if examples[name]
    }
    systems = cycle(one for prompt in system_prompts or [None] for one in (None, prompt))
    conversations = []
    while left:
        turns: list[Turn] = []
        for _ in range(rng.choice(lengths)):
            if not left:
                break
            stays = turns and turns[-1].expert in left and rng.random() < STAY
            expert = turns[-1].expert if stays else rng.choice([*left])
            row = left[expert].pop()
            if not left[expert]:
                del left[expert]
            turns.append(Turn(expert, row.prompt, row.response))
        conversations.append(Conversation(tuple(turns), next(systems)))
    return conversations


def default_system_prompts(num_examples: int, lengths: Sequence[int]) -> tuple[str, ...]:
    """The system prompts of `converse` for so many examples in all, if a recipe names none."""
    taken = num_examples / fmean(lengths or (1,)) / 2  # every second conversation takes one
    return SYSTEM_PROMPTS if taken >= len(SYSTEM_PROMPTS) else LONG_EARLY


def takes(tokenizer: PreTrainedTokenizerBase, turns: int = 1, system: str | None = None) -> bool:
    """Whether the chat template takes so many turns, and a system prompt."""
    probe = Conversation(tuple(Turn("", f"one {i}", f"two {i}") for i in range(turns)), system)
    try:
        _placed(probe, tokenizer)
    except ExamplesError:
        return False
    return True


def _placed(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and (start, end) of each turn in it: from its question to its answer's end."""
    messages = conversation.messages()
    try:
        text = rendered(tokenizer, messages)
    except ConversationError as error:
        raise ExamplesError(
            f"{error}; set"
            " `gates: {conversations: [], system_prompts: []}`, or leave system prompts out"
        ) from error
    places = content_places(tokenizer, messages, text)
    if places is None:  # a template may change some contents
        places = _searched(messages, text)
    ends = [end for _, end in places[1::2]]
    starts = [start for start, _ in places[::2]]
    return text, list(zip(starts, [*ends, len(text)], strict=True))


def _searched(messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int]]:
    """Search the content of each message, except a system prompt, after the one before it."""
    places, cursor = [], 0
    for message in messages:
        content = message["content"].strip()  # many templates remove white space
        start = text.find(content, cursor)
        if start < 0:
            raise ExamplesError(
                f"the base's chat template changes what a turn says ({content[:60]!r}); set"
                " `gates: {conversations: []}`"
            )
        cursor = start + len(content)
        if message["role"] != "system":
            places.append((start, cursor))
    return places
