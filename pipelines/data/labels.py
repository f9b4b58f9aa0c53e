"""Turn examples into tokens, each labelled with the choice that a router should make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.fitting.sequences import UNLABELLED, LabelledSequence
from meteora.model.fused import without_experts
from meteora.model.generate import answer_all
from pipelines.data.background import background_rows
from pipelines.data.composites import (
    answer_openings,
    compose,
    encode_composite,
    fits,
    mixable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.conversations import Conversation
    from pipelines.data.rows import Row
    from pipelines.data.spans import SpannedRow, SpannedTurns

MAX_NEW_TOKENS = 48
"""Most tokens of an answer of the base; this is enough to show its style."""
QUESTIONS_IN_COMPOSITES = 24
"""Questions of each expert in composites of one length: enough to see it after other experts, and
to see the starts of its answers."""


def label(
    examples: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nobody: int = UNLABELLED,
) -> list[LabelledSequence]:
    """Every example as tokens with the label of its expert; the template's opening has `nobody`.

    Args:
        examples: by expert
        names: of all experts in order; a label is an index into them
        nobody: the label of tokens that belong to no expert
    """
    return [
        sequence
        for e, name in enumerate(names)
        for sequence in label_rows(examples.get(name, ()), e, tokenizer, nobody)
    ]


def label_rows(
    rows: Sequence[Row],
    expert: int,
    tokenizer: PreTrainedTokenizerBase,
    nobody: int = UNLABELLED,
) -> list[LabelledSequence]:
    """Rows as tokens with the label of one expert; those of `_num_opening` have `nobody`."""
    opening = _num_opening(tokenizer, nobody)
    encoded = (encode_pair(tokenizer, row.prompt, row.response) for row in rows)
    return [_of_one(ids, expert, opening, nobody) for ids in encoded]


def _of_one(ids: Sequence[int], label: int, opening: int, nobody: int) -> LabelledSequence:
    """Tokens with one label, but the first `opening` of them with `nobody`."""
    labels = [nobody] * opening + [label] * (len(ids) - opening)
    return LabelledSequence(tuple(ids), tuple(labels))


def _num_opening(tokenizer: PreTrainedTokenizerBase, nobody: int) -> int:
    """How many tokens open every prompt: those of the template.

    Without such an opening it is the first token, if `nobody` is a choice.
    """
    return max(len(Template.of(tokenizer).opening), int(nobody != UNLABELLED))


def label_composites(
    examples: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Sequence[tuple[int, int]],
    seed: int,
    nobody: int = UNLABELLED,
    digits: bool = True,
) -> list[LabelledSequence]:
    """Examples of several experts in one prompt; each token has the expert of its question.

    Args:
        examples: by expert; experts whose answers do not fit into composites are left out
        names: of all experts in order
        kinds: of prompts: (number of questions, number of solved prompts before them)
        digits: whether the digits of an answer's number are labelled, too; else the fit leaves
            them out

    Raises:
        ExamplesError: as `mixable` and `compose`.
    """
    fit = mixable({name: examples.get(name, ()) for name in names}) if kinds else {}
    places = {name: e for e, name in enumerate(names)}
    return _composed(fit, places, tokenizer, kinds, seed, nobody, digits=digits)


def label_lists(
    rows: Sequence[Row],
    expert: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Sequence[tuple[int, int]],
    digits: bool = True,
) -> list[LabelledSequence]:
    """Several rows of one expert in one prompt, to show the starts of its answers in composites.

    Args:
        kinds: as for `label_composites`; with too few rows, fewer solved prompts are shown
        digits: as for `label_composites`

    Returns:
        An empty list if no row fits into composites.
    """
    if not (num_prompts := len({row.key for row in rows if fits(row)})):
        return []
    possible = [(n, min(solved, max(0, num_prompts // n - 1))) for n, solved in kinds]
    return _composed({"": rows}, {"": expert}, tokenizer, possible, 0, UNLABELLED, digits=digits)


def label_spans(
    rows: Sequence[SpannedRow | SpannedTurns | Conversation],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nobody: int = UNLABELLED,
) -> list[LabelledSequence]:
    """Rows and conversations, whose parts or turns have experts, as labelled tokens.

    Args:
        names: of all experts in order
        nobody: the label of system prompts, of tokens between two turns, and of other text without
            an expert
    """
    places = {name: e for e, name in enumerate(names)}
    sequences = []
    for row in rows:
        ids, owners = row.encode(tokenizer)
        sequences.append(LabelledSequence(tuple(ids), _labels(owners, places, nobody)))
    return sequences


def _composed(
    rows: Mapping[str, Sequence[Row]],
    places: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase,
    kinds: Sequence[tuple[int, int]],
    seed: int,
    nobody: int,
    *,
    digits: bool,
) -> list[LabelledSequence]:
    """Composites of rows as tokens; `places` has the label of each task."""
    sequences = []
    for n, solved in kinds:
        count = -(-QUESTIONS_IN_COMPOSITES * len(places) // n)
        for composite in compose(rows, n, count, seed, solved):
            ids, tasks = encode_composite(tokenizer, composite)
            labels, openings = _labels(tasks, places, nobody), answer_openings(tokenizer, composite)
            if not digits:
                left_out = {*answer_openings(tokenizer, composite, "{}")}
                labels = tuple(UNLABELLED if i in left_out else e for i, e in enumerate(labels))
                openings = tuple(i for i in openings if i not in left_out)
            sequences.append(LabelledSequence(tuple(ids), labels, openings))
    return sequences


def _labels(
    owners: Sequence[str | None], places: Mapping[str, int], nobody: int
) -> tuple[int, ...]:
    return tuple(nobody if owner is None else places[owner] for owner in owners)


def background_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Background rows as token ids: questions as prompts, the other texts as they are."""
    return [
        encode_prompt(tokenizer, row.prompt)
        if row.prompt
        else list(tokenizer(row.response).input_ids)
        for row in background_rows()
    ]


def background_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    choice: int,
    advance: Callable[[int], None] = lambda _rows: None,
    nobody: int = UNLABELLED,
) -> list[LabelledSequence]:
    """Background rows as tokens with the label `choice`; the base answers the questions itself.

    Args:
        rows: from `background_rows`
        choice: the label of the base
        advance: called with the number of rows just done
        nobody: the label of tokens that open prompts, as in `label_rows`
    """
    opening = _num_opening(tokenizer, nobody)
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows if row.prompt]
    with without_experts(model):
        answers = answer_all(model, tokenizer, prompts, MAX_NEW_TOKENS, advance)
    sequences = [
        _of_one([*ids, *answer], choice, opening, nobody)
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    if tokenizer.chat_template:
        opening = 0  # a plain text is not in it
    for row in rows:
        if not row.prompt:
            ids = tokenizer(row.response).input_ids
            sequences.append(_of_one(ids, choice, opening, nobody))
            advance(1)
    return sequences
