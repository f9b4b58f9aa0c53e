from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from meteora.base.chat_template import encode_pair, render_prompt
from pipelines.data.composites import Span, compose, split_answers
from pipelines.data.rows import ExamplesError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = {
    task: [Row(f"{task} question {i}?", f"{task} answer {i}") for i in range(4)]
    for task in ("red", "green", "blue")
}
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_every_character_of_a_question_and_its_answer_belongs_to_its_task() -> None:
    for composite in compose(ROWS, 3, 8, seed=0):
        asked = composite.questions
        for spans, text, rows in (
            (composite.prompt_spans, composite.prompt, [q.row.prompt for q in asked]),
            (composite.response_spans, composite.response, [q.row.response for q in asked]),
        ):
            owned = [(span.task, text[span.start : span.end].strip()) for span in spans]
            numbered = [f"{number}. {row}" for number, row in enumerate(rows, 1)]
            assert owned == [*zip([q.task for q in asked], numbered, strict=True)]
            # nothing between the questions, or between the answers, is left without an owner
            assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
            assert spans[-1].end == len(text)


def test_a_seed_gives_the_same_composites_and_each_row_once_before_any_repeats() -> None:
    first = compose(ROWS, 3, 4, seed=1)
    assert first == compose(ROWS, 3, 4, seed=1)
    assert first != compose(ROWS, 3, 4, seed=2)
    assert all({q.task for q in composite.questions} == ROWS.keys() for composite in first)
    for task, rows in ROWS.items():
        asked = [q.row for composite in first for q in composite.questions if q.task == task]
        assert sorted(row.prompt for row in asked) == sorted(row.prompt for row in rows)
    assert len({tuple(q.task for q in composite.questions) for composite in first}) > 1


def test_solved_composites_stand_before_the_same_questions_and_share_no_row_with_them() -> None:
    alone, shown = compose(ROWS, 3, 8, seed=0), compose(ROWS, 3, 8, seed=0, num_solved=2)
    assert [one.questions for one in shown] == [one.questions for one in alone]
    assert [one.response for one in shown] == [one.response for one in alone]
    for composite in shown:
        first, second = composite.solved
        of_prompt = [q.row for one in (first, second, composite) for q in one.questions]
        assert len({row.prompt for row in of_prompt}) == 9
        pieces = [composite.prompt[span.start : span.end] for span in composite.prompt_spans]
        expected = [
            (asked.task, f"{number}. {text}")
            for one, answered in ((first, True), (second, True), (composite, False))
            for texts in (
                [q.row.prompt for q in one.questions],
                [q.row.response for q in one.questions] if answered else [],
            )
            for number, (asked, text) in enumerate(zip(one.questions, texts, strict=False), 1)
        ]
        owned = [(s.task, p.strip()) for s, p in zip(composite.prompt_spans, pieces, strict=True)]
        assert owned == expected
        assert composite.prompt.count("Questions:\n\n1. ") == 3
        assert composite.prompt.endswith("\n\nAnswers:")  # a template that strips changes nothing
        assert composite.to_dict()["solved"] == [first.to_dict(), second.to_dict()]
    assert "solved" not in alone[0].to_dict()  # the hash of what is asked is the one of before


def test_a_task_with_too_few_rows_to_show_some_is_refused() -> None:
    few = ROWS | {"few": ROWS["red"][:2]}
    assert compose(few, 4, 1, seed=0, num_solved=1)
    with pytest.raises(ExamplesError, match=r"task few: 2 different .* solved ones takes 3"):
        compose(few, 4, 1, seed=0, num_solved=2)


def test_a_prompt_that_comes_twice_among_the_rows_is_not_shown_where_it_is_asked() -> None:
    twice = {"one": [Row("the same?", "yes"), Row("the  same?\n", "Yes."), Row("other?", "no")]}
    for composite in compose(twice, 1, 6, seed=0, num_solved=1):
        assert composite.questions[0].row.key != composite.solved[0].questions[0].row.key
    with pytest.raises(ExamplesError, match="task one: 1 different prompts"):
        compose({"one": twice["one"][:2]}, 1, 1, seed=0, num_solved=1)


def test_more_questions_than_tasks_take_each_task_equally_often() -> None:
    (composite,) = compose(ROWS, 9, 1, seed=0)
    tasks = [question.task for question in composite.questions]
    assert {tasks.count(task) for task in ROWS} == {3}


def test_a_right_answer_is_read_back_whole() -> None:
    for composite in compose(ROWS | {"lines": [Row("list?", "a\nb, in 2022. c")]}, 4, 6, seed=0):
        expected = {i: q.row.response for i, q in enumerate(composite.questions, 1)}
        assert split_answers(composite.response, 4) == expected


@pytest.mark.parametrize(
    ("output", "answers"),
    [
        pytest.param("1. a\n2. b\n3. c", {1: "a", 2: "b", 3: "c"}, id="all"),
        pytest.param("1. born in 2022. Yes\n3. c", {1: "born in 2022. Yes", 3: "c"}, id="skipped"),
        pytest.param("1. won in 2. and 3. place", {1: "won in 2. and 3. place"}, id="in the line"),
        pytest.param("a\nb\nc", {}, id="no numbers"),
        pytest.param("1. a\n1. b\n2. c", {1: "a\n1. b", 2: "c"}, id="said twice"),
        pytest.param("2. b\n1. a", {2: "b\n1. a"}, id="out of order"),
        pytest.param("1.\n2. b", {2: "b"}, id="empty"),
        pytest.param("Sure!\n1) a\n 2) b\n4. d", {1: "a", 2: "b\n4. d"}, id="no such question"),
        pytest.param("1. 3.5\n2. 4", {1: "3.5", 2: "4"}, id="decimals"),
        pytest.param("1. a\n    2. b", {1: "a\n    2. b"}, id="indented as code is"),
        pytest.param("", {}, id="nothing"),
    ],
)
def test_answers_are_separated_by_numbers_that_begin_a_line(
    output: str, answers: dict[int, str]
) -> None:
    assert split_answers(output, 3) == answers


@given(st.text(alphabet="123. )\nab", max_size=60))
def test_whatever_is_answered_no_answer_is_counted_twice(output: str) -> None:
    answers = split_answers(output, 3)
    assert list(answers) == sorted(answers)
    assert all(answer and answer in output for answer in answers.values())
    assert sum(map(len, answers.values())) <= len(output)


def test_a_task_whose_answers_would_read_as_several_is_refused() -> None:
    with pytest.raises(ExamplesError, match="task steps: none of its answers"):
        compose(ROWS | {"steps": [Row("how?", "first\n2. then")]}, 3, 1, seed=0)
    with pytest.raises(ExamplesError, match="there are no tasks"):
        compose({}, 3, 1, seed=0)


@pytest.mark.parametrize("template", ["", CHAT], ids=["plain", "chat"])
def test_tokens_belong_to_the_task_of_their_characters(
    tokenizer: PreTrainedTokenizerBase, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template or None)
    for composite in [*compose(ROWS, 3, 2, seed=0), *compose(ROWS, 3, 2, seed=0, num_solved=1)]:
        ids, owners = composite.encode(tokenizer)
        assert ids == encode_pair(tokenizer, composite.prompt, composite.response)
        assert len(ids) == len(owners)
        for task in ROWS:
            own = [i for i, owner in zip(ids, owners, strict=True) if owner == task]
            text = "".join(
                whole[span.start : span.end]
                for whole, spans in (
                    (composite.prompt, composite.prompt_spans),
                    (composite.response, composite.response_spans),
                )
                for span in spans
                if span.task == task
            )
            assert tokenizer.decode(own, skip_special_tokens=True) == text
        unowned = [i for i, owner in zip(ids, owners, strict=True) if owner is None]
        assert "Answer each of the following" in tokenizer.decode(unowned)
        assert owners[-1] == composite.questions[-1].task  # the end of the answer
        answer_starts = composite.answer_starts(tokenizer)
        assert tokenizer.decode([ids[place] for place in answer_starts]) == "1. 2. 3. "
        tasks = [question.task for question in composite.questions]
        assert [*dict.fromkeys(owners[place] for place in answer_starts)] == tasks


def test_tokens_of_several_characters_have_one_owner_each() -> None:
    """With a tokenizer that merges: white space and numbers join what follows or precedes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=inner.pre_tokenizer.alphabet()
    )
    inner.train_from_iterator([Path(__file__).read_text()], trainer)
    merged = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")  # noqa: S106
    (composite,) = compose(ROWS, 3, 1, seed=0)
    ids, owners = composite.encode(merged)
    assert len(ids) < len(composite.prompt + composite.response)
    answer_starts = [ids[place] for place in composite.answer_starts(merged)]
    assert str(merged.decode(answer_starts)).replace("Ġ", "").replace(" ", "") == "1.2.3."
    changes = [o for o, before in zip(owners, [None, *owners], strict=False) if o != before]
    tasks = [question.task for question in composite.questions]
    assert changes == tasks + tasks


def test_tasks_with_the_same_few_questions_cannot_show_some() -> None:
    rows = {task: [Row("p", f"{task} 1"), Row("q", f"{task} 2")] for task in ("a", "b")}
    with pytest.raises(ExamplesError, match="some as another task's"):
        compose(rows, 2, 8, seed=1, num_solved=1)


def test_a_space_that_a_tokenizer_cuts_off_belongs_to_its_task(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As those of Pythia and OPT do: a token of spaces then has no characters."""
    cuts = copy.deepcopy(tokenizer)
    cuts.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for composite in compose(ROWS, 3, 2, seed=0):
        assert composite.encode(cuts) == composite.encode(tokenizer)
        assert composite.answer_starts(cuts) == composite.answer_starts(tokenizer)


def test_a_prompt_that_the_template_changes_has_no_places_of_its_questions(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shouting = CHAT.replace("message.content", "message.content | upper")
    monkeypatch.setattr(tokenizer, "chat_template", shouting)
    (composite,) = compose(ROWS, 3, 1, seed=0)
    with pytest.raises(ExamplesError, match="template changes what a prompt says"):
        composite.encode(tokenizer)
    with pytest.raises(ExamplesError, match="template changes what a prompt says"):
        composite.prompt_owners(tokenizer, render_prompt(tokenizer, composite.prompt))


def test_words_of_the_template_are_not_taken_for_the_prompt(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (composite,) = compose(ROWS, 3, 1, seed=0)
    (first,) = compose(ROWS, 3, 1, seed=1)
    short = replace(first, prompt="a", prompt_spans=(Span("red", 0, 1),))
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("<{{", "<say {{"))
    for one in (composite, short):
        _ids, owners = one.encode(tokenizer)
        asked = one.prompt_owners(tokenizer, render_prompt(tokenizer, one.prompt))
        assert asked == owners[: len(asked)]
    assert owners.index("red") == len("<say user>")


def test_a_tokenizer_in_python_gives_no_places(python_tokenizer: PreTrainedTokenizerBase) -> None:
    (composite,) = compose(ROWS, 3, 1, seed=0)
    for ask in (composite.encode, composite.answer_starts):
        with pytest.raises(ExamplesError, match="gives no places of its tokens"):
            ask(python_tokenizer)
