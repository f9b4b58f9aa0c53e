"""Read examples whose parts belong to different experts, from a file with one JSON object a line.

    {"prompt": [{"text": "When was it, and "}, {"text": "what is 3 + 4?", "expert": "sums"}],
     "response": [{"text": "2021-03-03", "expert": "dates"}, {"text": ", 7", "expert": "sums"}]}

    {"turns": [{"expert": "dates", "prompt": "When was it?", "response": "2021-03-03"},
               {"expert": "sums", "prompt": "What is 3 + 4?", "response": "7"}]}

From them, gates learn where in a text to switch, in addition to each expert's own examples. The
texts of the parts are joined without anything between them. A part of a prompt may have no expert;
a part of a response must have one. Turns are those of a conversation in the base's chat template.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.artifacts import Noun
from meteora.base.sources import path_from
from meteora.untrusted.findings import MOST_NAMED, listed
from pipelines.data.composites import Composite, spans_of
from pipelines.data.conversations import Conversation, Turn
from pipelines.data.row_sources import json_lines, json_of, refuse_half_characters
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDED = (
    '{"prompt": [{"text": "…", "expert": "…"}, …], "response": [{"text": "…", …}, …]} is needed, or'
    ' {"turns": [{"expert": "…", "prompt": "…", "response": "…"}, …]}'
)


@dataclass(frozen=True)
class Part(Noun):
    """A piece of text of one expert."""

    text: str
    expert: str = ""
    """The expert's name; empty if the text belongs to no expert."""


@dataclass(frozen=True)
class SpannedRow(Noun):
    """A question and its answer, in parts."""

    prompt: tuple[Part, ...]
    response: tuple[Part, ...]

    @property
    def owners(self) -> set[str]:
        """The experts of all parts."""
        return {part.expert for part in (*self.prompt, *self.response)} - {""}

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Expert and text of each part of the prompt that has an expert, and of the whole prompt.

        The whole has the expert that answers first.
        """
        parts = [(part.expert, part.text) for part in self.prompt if part.expert]
        whole = "".join(part.text for part in self.prompt)
        return [*parts, (self.response[0].expert, whole)]

    def composite(self) -> Composite:
        """The same as a composite, which finds the experts of its tokens."""
        return Composite(
            "".join(part.text for part in self.prompt),
            "".join(part.text for part in self.response),
            (),
            spans_of((part.expert or None, part.text) for part in self.prompt),
            spans_of((part.expert or None, part.text) for part in self.response),
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str | None]]:
        """Token ids, and each token's expert or None."""
        return self.composite().encode(tokenizer)


@dataclass(frozen=True)
class SpannedTurns(Noun):
    """A conversation whose turns belong to experts."""

    turns: tuple[Turn, ...]
    place: str = field(default="", compare=False)
    """The file and the line, for messages; not compared or hashed."""

    def to_dict(self) -> dict[str, Any]:
        return {"turns": [turn.to_dict() for turn in self.turns]}

    @property
    def owners(self) -> set[str]:
        """The experts of all turns."""
        return {turn.expert for turn in self.turns}

    @property
    def questions(self) -> list[tuple[str, str]]:
        """The expert and the question of each turn."""
        return [(turn.expert, turn.prompt) for turn in self.turns]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str | None]]:
        """Token ids, and each token's expert or None.

        Raises:
            ExamplesError: there is no chat template, or it does not take these turns.
        """
        if not tokenizer.chat_template:
            raise ExamplesError(
                f"{self.place}: turns need a chat template, and gates are fitted to plain text;"
                " write a `prompt` and a `response` in parts, or choose a base with a chat template"
            )
        try:
            return Conversation(self.turns).encode(tokenizer)
        except ExamplesError as error:
            raise ExamplesError(f"{self.place}: {error}") from error


def prompt_parts(rows: Sequence[SpannedRow | SpannedTurns]) -> dict[str, list[Row]]:
    """Each question in the rows as a separate row, by expert, to compare with tests."""
    by_expert: dict[str, list[Row]] = {}
    for expert, text in (question for row in rows for question in row.questions):
        by_expert.setdefault(expert, []).append(Row(text.strip(), ""))
    return by_expert


def read_spans(
    source: str, folder: Path, experts: Collection[str]
) -> list[SpannedRow | SpannedTurns]:
    """All rows of a source.

    Args:
        source: `jsonl:<file>`
        folder: paths are relative to it
        experts: names of the experts that have their own examples

    Raises:
        ExamplesError: the file cannot be read, or a line is not a row with spans.
    """
    kind, _, name = source.partition(":")
    if kind != "jsonl" or not name:
        raise ExamplesError(f"{source}: examples with spans come from `jsonl:<file>`")
    rows = [_row(line, place, experts) for line, place in json_lines(path_from(folder, name))]
    if not rows:
        raise ExamplesError(f"{source}: no rows in it")
    return rows


def _row(line: str, place: str, experts: Collection[str]) -> SpannedRow | SpannedTurns:
    row: SpannedRow | SpannedTurns
    try:
        body = json_of(line, place)
        if "turns" in body:
            row = SpannedTurns(_turns(body["turns"], place), place)
        else:
            row = SpannedRow(_parts(body["prompt"]), _parts(body["response"]))
            _check_parts(row, place)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExamplesError(f"{place}: not a row with spans; {NEEDED}") from error
    refuse_half_characters(json.dumps(row.to_dict(), ensure_ascii=False), place)
    if strange := row.owners - set(experts):
        raise ExamplesError(
            f"{place}: {listed(sorted(strange))} is not an expert with its own examples; those"
            f" are {listed([*experts], MOST_NAMED)}"
        )
    return row


def _turns(entries: Any, place: str) -> tuple[Turn, ...]:  # noqa: ANN401  (JSON)
    turns = []
    for number, one in enumerate(entries, 1):
        for name in ("expert", "prompt", "response"):
            text = one.get(name)
            if not isinstance(text, str) or not text.strip():
                raise ExamplesError(
                    f"{place}: turn {number} has no {name}; each turn needs expert, prompt and"
                    " response, as texts"
                )
        turns.append(Turn(one["expert"], one["prompt"], one["response"]))
    if not turns:
        raise ValueError(entries)
    return tuple(turns)


def _check_parts(row: SpannedRow, place: str) -> None:
    composite = row.composite()
    if composite.prompt.strip() != composite.prompt:
        raise ExamplesError(
            f"{place}: its prompt begins or ends with white space, which chat templates remove;"
            " remove it"
        )
    if not all(part.expert for part in row.response):
        raise ExamplesError(f"{place}: a part of its response has no expert; give each part one")


def _parts(entries: Any) -> tuple[Part, ...]:  # noqa: ANN401  (JSON)
    parts = tuple(Part(one["text"], one.get("expert", "")) for one in entries)
    if not parts or not all(isinstance(p.text, str) and p.text for p in parts):
        raise ValueError(entries)
    if not all(isinstance(part.expert, str) for part in parts):
        raise TypeError(entries)
    return parts
