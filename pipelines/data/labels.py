"""Examples as tokens, each labelled with the choice of a router that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.fitting.sequences import UNLABELLED, LabelledSequence
from meteora.model.fused import without_experts
from meteora.model.generate import answer_all
from pipelines.data.composites import answer_openings, compose, encode_composite, fits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.composites import Composite
    from pipelines.data.rows import Row
    from pipelines.data.spans import SpannedRow

MAX_NEW_TOKENS = 48
"""Of an answer of the base: enough to show how it speaks."""
QUESTIONS_IN_COMPOSITES = 24
"""How often each expert is asked in composites of one length: enough to see it follow others, and
what its answers begin with there."""


def label(
    examples: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[LabelledSequence]:
    """Every example as tokens that belong to its expert; the template's opening to none.

    Args:
        names: of all experts in order
    """
    return [
        sequence
        for e, name in enumerate(names)
        for sequence in label_rows(examples.get(name, ()), e, tokenizer)
    ]


def label_rows(
    rows: Sequence[Row], expert: int, tokenizer: PreTrainedTokenizerBase
) -> list[LabelledSequence]:
    """Rows as tokens that belong to one expert; the template's opening to none."""
    opening = len(Template.of(tokenizer).opening)
    sequences = []
    for row in rows:
        ids = encode_pair(tokenizer, row.prompt, row.response)
        labels = [UNLABELLED] * opening + [expert] * (len(ids) - opening)
        sequences.append(LabelledSequence(tuple(ids), tuple(labels)))
    return sequences


def label_composites(
    examples: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sizes: Sequence[int],
    seed: int,
) -> list[LabelledSequence]:
    """Examples of several experts in one prompt, each token with the expert of its question.

    Args:
        examples: by expert; one whose answers cannot stand under a number is left out
        names: of all experts in order
        sizes: how many questions the prompts hold, for each kind of prompt
    """
    fit = {name: examples[name] for name in names if any(map(fits, examples.get(name, ())))}
    places = {name: e for e, name in enumerate(names)}
    return [
        _labelled(composite, places, tokenizer)
        for n in sizes
        for composite in compose(fit, n, -(-QUESTIONS_IN_COMPOSITES * len(names) // n), seed)
    ]


def label_lists(
    rows: Sequence[Row],
    expert: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sizes: Sequence[int],
    seed: int,
) -> list[LabelledSequence]:
    """Rows of one expert in one prompt, all tokens its own: what its answers begin with there.

    Args:
        sizes: as of `label_composites`; none come of rows whose answers cannot stand under a number
    """
    if not any(map(fits, rows)):
        return []
    return [
        _labelled(composite, {"": expert}, tokenizer)
        for n in sizes
        for composite in compose({"": rows}, n, -(-QUESTIONS_IN_COMPOSITES // n), seed)
    ]


def label_spans(
    rows: Sequence[SpannedRow], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[LabelledSequence]:
    """Rows whose parts belong to different experts, each token with that of its first character.

    Args:
        names: of all experts in order
    """
    places = {name: e for e, name in enumerate(names)}
    found = []
    for row in rows:
        ids, owners = encode_composite(tokenizer, row.composite())
        found.append(LabelledSequence(tuple(ids), _labels(owners, places)))
    return found


def _labelled(
    composite: Composite, places: Mapping[str, int], tokenizer: PreTrainedTokenizerBase
) -> LabelledSequence:
    ids, tasks = encode_composite(tokenizer, composite)
    openings = answer_openings(tokenizer, composite)
    return LabelledSequence(tuple(ids), _labels(tasks, places), openings)


def _labels(owners: Sequence[str | None], places: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(UNLABELLED if owner is None else places[owner] for owner in owners)


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
