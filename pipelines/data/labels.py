"""Turn examples into tokens, each labelled with the choice that a router should make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.fitting.sequences import UNLABELLED, LabelledSequence
from meteora.model.fused import without_experts
from meteora.model.generate import answer_all
from pipelines.data.background import MAX_NEW_TOKENS, background_rows
from pipelines.data.composites import compose, fits, mixable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.conversations import Conversation
    from pipelines.data.rows import Row
    from pipelines.data.spans import SpannedRow, SpannedTurns

QUESTIONS_IN_COMPOSITES = 24
"""Questions of each expert in composites of one length: enough to see it after other experts, and
to see the starts of its answers."""


@dataclass(frozen=True)
class Labeller:
    """Turns texts into tokens with labels; a label is the index of a choice of the router."""

    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str] = ()
    """Of all experts, in order."""
    nobody: int = UNLABELLED
    """The label of tokens that belong to no expert."""

    def examples(self, examples: Mapping[str, Sequence[Row]]) -> list[LabelledSequence]:
        """Every example with the label of its expert; the template's opening has `nobody`."""
        return [
            sequence
            for e, name in enumerate(self.names)
            for sequence in self.rows(examples.get(name, ()), e)
        ]

    def rows(self, rows: Sequence[Row], expert: int) -> list[LabelledSequence]:
        """Rows with the label of one expert; the template's opening has `nobody`."""
        opening = self._num_opening()
        encoded = (encode_pair(self.tokenizer, row.prompt, row.response) for row in rows)
        return [self._of_one(ids, expert, opening) for ids in encoded]

    def composites(
        self,
        examples: Mapping[str, Sequence[Row]],
        kinds: Sequence[tuple[int, int]],
        *,
        seed: int,
        digits: bool = True,
    ) -> list[LabelledSequence]:
        """Examples of several experts in one prompt; each token has the expert of its question.

        Args:
            examples: by expert; experts whose answers do not fit into composites are left out
            kinds: of prompts: (number of questions, number of solved prompts before them)
            digits: whether the digits of an answer's number are labelled, too; else the fit leaves
                them out

        Raises:
            ExamplesError: as `mixable` and `compose`.
        """
        fit = mixable({name: examples.get(name, ()) for name in self.names}) if kinds else {}
        return self._composed(fit, self._places, kinds, seed, self.nobody, digits=digits)

    def lists(
        self,
        rows: Sequence[Row],
        expert: int,
        kinds: Sequence[tuple[int, int]],
        *,
        digits: bool = True,
    ) -> list[LabelledSequence]:
        """Several rows of one expert in one prompt, to show how its answers begin in composites.

        Arguments are as for `composites`. With too few rows, fewer solved prompts are shown; the
        list is empty if no row fits into composites.
        """
        if not (num_prompts := len({row.key for row in rows if fits(row)})):
            return []
        possible = [(n, min(solved, max(0, num_prompts // n - 1))) for n, solved in kinds]
        return self._composed({"": rows}, {"": expert}, possible, 0, UNLABELLED, digits=digits)

    def spans(
        self, rows: Sequence[SpannedRow | SpannedTurns | Conversation]
    ) -> list[LabelledSequence]:
        """Rows and conversations whose parts or turns have experts.

        System prompts, tokens between two turns, and other text without an expert have `nobody`.
        """
        sequences = []
        for row in rows:
            ids, owners = row.encode(self.tokenizer)
            labels = _labels(owners, self._places, self.nobody)
            sequences.append(LabelledSequence(tuple(ids), labels))
        return sequences

    def background(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        choice: int,
        advance: Callable[[int], None] = lambda _rows: None,
    ) -> list[LabelledSequence]:
        """Background rows with the label of the base, `choice`; it answers the questions itself."""
        opening = self._num_opening()
        prompts = [encode_prompt(self.tokenizer, row.prompt) for row in rows if row.prompt]
        with without_experts(model):
            answers = answer_all(model, self.tokenizer, prompts, MAX_NEW_TOKENS, advance)
        sequences = [
            self._of_one([*ids, *answer], choice, opening)
            for ids, answer in zip(prompts, answers, strict=True)
        ]
        if self.tokenizer.chat_template:
            opening = 0  # a plain text is not in it
        for row in rows:
            if not row.prompt:
                ids = self.tokenizer(row.response).input_ids
                sequences.append(self._of_one(ids, choice, opening))
                advance(1)
        return sequences

    @property
    def _places(self) -> dict[str, int]:
        return {name: e for e, name in enumerate(self.names)}

    def _num_opening(self) -> int:
        """How many tokens open every prompt: those of the template.

        Without such an opening it is the first token, if `nobody` is a choice.
        """
        return max(len(Template.of(self.tokenizer).opening), int(self.nobody != UNLABELLED))

    def _of_one(self, ids: Sequence[int], label: int, opening: int) -> LabelledSequence:
        """Tokens with one label, but the first `opening` of them with `nobody`."""
        labels = [self.nobody] * opening + [label] * (len(ids) - opening)
        return LabelledSequence(tuple(ids), tuple(labels))

    def _composed(
        self,
        rows: Mapping[str, Sequence[Row]],
        places: Mapping[str, int],
        kinds: Sequence[tuple[int, int]],
        seed: int,
        nobody: int,
        *,
        digits: bool,
    ) -> list[LabelledSequence]:
        """Composites of rows; `places` has the label of each task."""
        tokenizer, sequences = self.tokenizer, []
        for n, solved in kinds:
            count = -(-QUESTIONS_IN_COMPOSITES * len(places) // n)
            for composite in compose(rows, n, count, seed, solved):
                ids, tasks = composite.encode(tokenizer)
                labels = _labels(tasks, places, nobody)
                answer_starts = composite.answer_starts(tokenizer)
                if not digits:
                    left_out = {*composite.answer_starts(tokenizer, "{}")}
                    labels = tuple(UNLABELLED if i in left_out else e for i, e in enumerate(labels))
                    answer_starts = tuple(i for i in answer_starts if i not in left_out)
                sequences.append(LabelledSequence(tuple(ids), labels, answer_starts))
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
