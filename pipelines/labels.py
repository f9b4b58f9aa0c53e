"""Examples as tokens, each labelled with the choice of a router that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.encode import Template, encode_pair, encode_prompt
from meteora.generate import answer_all
from meteora.model import without_experts
from meteora.sequences import UNLABELLED, LabelledSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.examples import Row
    from pipelines.plan import Plan

MAX_NEW_TOKENS = 48
"""Of an answer of the base: enough to show how it speaks."""


def label(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[LabelledSequence]:
    """Every example as tokens that belong to its expert; the template's opening to none."""
    opening = len(Template.of(tokenizer).opening)
    sequences = []
    for e, name in enumerate(plan.fused.names):
        for row in plan.examples[name]:
            ids = encode_pair(tokenizer, row.prompt, row.response)
            labels = [UNLABELLED] * opening + [e] * (len(ids) - opening)
            sequences.append(LabelledSequence(tuple(ids), tuple(labels)))
    return sequences


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
