"""Text that belongs to no adapter: what the base is told by where it is one of a router's choices.

The texts are our own. Questions come without answers: the base answers them itself, since what it
would say is what must not change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.encode import Template, encode_prompt
from meteora.generate import answer_all
from meteora.model import without_experts
from meteora.train import UNLABELLED, LabelledSequence
from pipelines.examples import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = Path(__file__).parent / "background" / "texts.jsonl"
MAX_NEW_TOKENS = 48
"""Of an answer of the base: enough to show how it speaks."""


def background_rows() -> list[Row]:
    """Questions without an answer, and plain texts without a question."""
    found = []
    for line in TEXTS.read_text(encoding="utf-8").splitlines():
        body = json.loads(line)
        found.append(Row(body.get("prompt", ""), body.get("text", "")))
    return found


def background_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    choice: int,
    advance: Callable[[int], None] = lambda _rows: None,
) -> list[LabelledSequence]:
    """Rows as tokens that belong to `choice`, the base; it answers the questions itself."""
    opening = len(Template.of(tokenizer).opening)
    asked = [encode_prompt(tokenizer, row.prompt) for row in rows if row.prompt]
    with without_experts(model):
        answers = answer_all(model, tokenizer, asked, MAX_NEW_TOKENS, advance)
    sequences = [
        LabelledSequence(
            (*ids, *said), (*[UNLABELLED] * opening, *[choice] * (len(ids) + len(said) - opening))
        )
        for ids, said in zip(asked, answers, strict=True)
    ]
    for row in rows:
        if not row.prompt:
            ids = tuple(tokenizer(row.response).input_ids)
            sequences.append(LabelledSequence(ids, (choice,) * len(ids)))
            advance(1)
    return sequences
