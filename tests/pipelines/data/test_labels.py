"""Examples as tokens with owners: one task a prompt, or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from meteora.fitting.sequences import UNLABELLED
from pipelines.data.labels import QUESTIONS_IN_COMPOSITES, Labeller
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = {
    name: [Row(f"{name} {i}?", f"{name[0] * 3}{i}") for i in range(6)] for name in ("red", "blue")
}


def test_a_plain_example_belongs_to_its_expert_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    for sequence in Labeller(tokenizer).rows(EXAMPLES["red"], 1):
        assert sequence.owners == {1}
        assert len(sequence.input_ids) == len(sequence.experts)


def test_each_token_of_a_composite_belongs_to_the_expert_of_its_question(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = Labeller(tokenizer, ["red", "blue"]).composites(EXAMPLES, [(2, 0), (4, 0)], seed=0)
    by_size = {n: -(-QUESTIONS_IN_COMPOSITES * 2 // n) for n in (2, 4)}
    assert len(made) == sum(by_size.values())
    for sequence in made:
        assert sequence.owners == {0, 1}
        text = {
            e: tokenizer.decode(
                [t for t, own in zip(sequence.input_ids, sequence.experts, strict=True) if own == e]
            )
            for e in (UNLABELLED, 0, 1)
        }
        assert "Answer each of the following" in text[UNLABELLED]
        assert "red" in text[0]
        assert "blue" not in text[0]
        assert "blue" in text[1]
        assert "red" not in text[1]
        opened = str(tokenizer.decode([sequence.input_ids[i] for i in sequence.answer_starts]))
        assert opened.split() == [f"{i}." for i in range(1, len(sequence.answer_starts) // 3 + 1)]


def test_the_digits_of_an_answers_number_may_belong_to_nobody(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    names, kinds = ["red", "blue"], [(12, 0)]
    whole, rest = (
        Labeller(tokenizer, names).composites(EXAMPLES, kinds, seed=0, digits=digits)
        for digits in (True, False)
    )
    for before, after in zip(whole, rest, strict=True):
        assert before.input_ids == after.input_ids
        changed = [
            i
            for i, (old, new) in enumerate(zip(before.experts, after.experts, strict=True))
            if old != new
        ]
        assert {after.experts[i] for i in changed} == {UNLABELLED}
        numbers = str(tokenizer.decode([before.input_ids[i] for i in changed]))
        assert "".join(numbers.split()) == "".join(map(str, range(1, 13)))
        assert {*after.answer_starts} == {*before.answer_starts} - {*changed}


def test_what_a_composite_shows_solved_belongs_to_its_experts_too(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain, shown = (
        Labeller(tokenizer, ["red", "blue"]).composites(EXAMPLES, [(2, solved)], seed=0)
        for solved in (0, 2)
    )
    assert len(plain) == len(shown) == QUESTIONS_IN_COMPOSITES
    for alone, sequence in zip(plain, shown, strict=True):
        numbers = [str(tokenizer.decode([sequence.input_ids[i]])) for i in sequence.answer_starts]
        # of the answers to write, not of those shown
        assert len(numbers) == len(alone.answer_starts)
        text = {
            e: str(
                tokenizer.decode(
                    [t for t, o in zip(sequence.input_ids, sequence.experts, strict=True) if o == e]
                )
            )
            for e in (UNLABELLED, 0, 1)
        }
        assert text[UNLABELLED].count("Questions:") == text[UNLABELLED].count("Answers:") == 3
        for e, (name, other) in enumerate((("red", "blue"), ("blue", "red"))):
            assert text[e].count(f"{name} ") == text[e].count(name[0] * 3) == 3
            assert other not in text[e]


def test_composites_of_which_none_can_be_made_name_the_key_and_the_experts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lists = {"red": [Row(f"list {i}?", "1. one\n2. two") for i in range(3)]}
    with pytest.raises(ExamplesError, match=r"^gates.composites: no example .*\(red\)"):
        Labeller(tokenizer, ["red"]).composites(lists, [(2, 0)], seed=0)
    assert Labeller(tokenizer, ["red"]).composites(lists, [], seed=0) == []


def test_lists_of_one_experts_rows_are_its_own_and_say_where_answers_begin(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = Labeller(tokenizer).lists(EXAMPLES["red"], 3, [(2, 0), (5, 0)])
    assert len(made) == -(-QUESTIONS_IN_COMPOSITES // 2) - (-QUESTIONS_IN_COMPOSITES // 5)
    for sequence in made:
        assert sequence.owners == {3}
        own = [t for t, e in zip(sequence.input_ids, sequence.experts, strict=True) if e == 3]
        assert "Answer each of the following" not in str(tokenizer.decode(own))
        opened = str(tokenizer.decode([sequence.input_ids[i] for i in sequence.answer_starts]))
        assert opened.split() in (["1.", "2."], ["1.", "2.", "3.", "4.", "5."])
    lists = [Row(f"list {i}?", "1. one\n2. two") for i in range(3)]
    assert not Labeller(tokenizer).lists(lists, 0, [(2, 0)])
    # six rows are enough for one solved list of three, and for none of five
    one, all_asked, none, plain = (
        Labeller(tokenizer).lists(EXAMPLES["red"], 3, [kind])
        for kind in ((3, 1), (3, 2), (5, 2), (5, 0))
    )
    assert (all_asked, none) == (one, plain)


def test_an_expert_whose_answers_read_as_lists_is_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lists = [Row(f"list {i}?", "1. one\n2. two") for i in range(3)]
    examples = {"list": lists, **EXAMPLES}
    made = Labeller(tokenizer, ["list", "red", "blue"]).composites(examples, [(2, 0)], seed=0)
    assert made
    assert all(sequence.owners == {1, 2} for sequence in made)
    assert not Labeller(tokenizer, ["list", "red"]).composites(examples, [], seed=0)
