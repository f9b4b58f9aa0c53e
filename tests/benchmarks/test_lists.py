"""What an adapter learns from a list: its own answers, and nothing of the text around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.data.composites import Question, number_questions
from pipelines.data.rows import Row
from pipelines.stages.train_adapters import IGNORED
from tests.benchmarks.lists import list_lesson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


def learnt(tokenizer: PreTrainedTokenizerBase, *tasks: str) -> str:
    asked = [Question(task, Row(f"{task} asks", f"{task} says")) for task in tasks]
    ids, labels = list_lesson(tokenizer, number_questions(asked), "own")
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def test_behind_another_answer_only_its_own_is_learnt(tokenizer) -> None:
    found = learnt(tokenizer, "foreign", "own", "foreign")
    assert "own says" in found
    assert "foreign" not in found
    assert "asks" not in found


def test_the_first_question_begins_the_list_and_the_last_ends_it(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    assert learnt(tokenizer, "own", "foreign").lstrip().startswith("1")
    assert learnt(tokenizer, "foreign", "own").endswith(tokenizer.eos_token)
