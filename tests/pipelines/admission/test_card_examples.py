"""Examples from the data set that an adapter's card names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from datasets.exceptions import DatasetNotFoundError

from pipelines.admission.card_examples import (
    NoCardExamplesError,
    columns_of,
    read_card_examples,
)
from pipelines.data.row_sources import no_token
from pipelines.data.rows import ExamplesError, Row
from pipelines.hub.card import datasets_of
from tests.pipelines.conftest import letters, plan_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.workspace.context import RunContext


def turns(*said: tuple[str, str], role: str = "role", content: str = "content") -> list[Any]:
    return [{role: who, content: text} for who, text in said]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts a data set where `datasets` finds it by its name: in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)

    def put(name: str, rows: list[dict[str, Any]], split: str = "train") -> None:
        (tmp_path / name).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / f"{split}.jsonl").write_text(lines)

    return put


@pytest.mark.parametrize(
    ("item", "columns"),
    [
        ({"id": 1, "question": "a", "answer": "b"}, ("question", "answer")),
        ({"instruction": "a", "input": "", "output": "b"}, ("instruction,input", "output")),
        ({"instruction": "a", "output": "b"}, ("instruction", "output")),
        ({"input": "a", "output": "b", "prompt": "c", "completion": "d"}, ("prompt", "completion")),
        (
            {"messages": turns(("user", "a"), ("assistant", "b"))},
            ("messages.0.content", "messages.1.content"),
        ),
        (
            {"messages": turns(("system", "s"), ("user", "a"), ("assistant", "b"))},
            ("messages.1.content", "messages.2.content"),
        ),
        (
            {"conversations": turns(("human", "a"), ("gpt", "b"), role="from", content="value")},
            ("conversations.0.value", "conversations.1.value"),
        ),
        ({"text": "a"}, None),
        ({"question": "a", "answer": 3}, None),
        ({"messages": "a"}, None),
        ({"messages": ["a", "b"]}, None),
        ({"messages": turns(("user", "a"))}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_columns_are_taken_where_their_names_leave_no_doubt(
    item: dict[str, Any], columns: tuple[str, str] | None
) -> None:
    assert columns_of(item) == columns


def test_rows_are_those_of_the_first_data_set_that_can_be_read(
    hub: Callable[..., None], tmp_path: Path
) -> None:
    hub("somebody/pictures", [{"image": 1}])
    hub(
        "somebody/chats",
        [{"messages": turns(("user", f"q{i}"), ("assistant", "a"))} for i in range(9)],
    )
    names = ["somebody/pictures", "somebody/chats"]
    found = read_card_examples(names, tmp_path, 4, no_token)
    assert found.rows == [Row(f"q{i}", "a") for i in range(4)]
    assert found.source.startswith("hf:somebody/chats?config=default&split=train&prompt=messages.0")
    with pytest.raises(NoCardExamplesError, match="pictures has the columns image, which are none"):
        read_card_examples(names[:1], tmp_path, 4, no_token)
    with pytest.raises(NoCardExamplesError, match="its card names no data set"):
        read_card_examples([], tmp_path, 4, no_token)


def test_a_hub_that_cannot_be_reached_is_no_missing_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_args: object, **_asked: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.get_dataset_config_names", away)
    with pytest.raises(
        ExamplesError, match="the Hub cannot be reached for somebody/chats"
    ) as caught:
        read_card_examples(["somebody/chats"], tmp_path, 4, no_token)
    assert not isinstance(caught.value, NoCardExamplesError)


def test_a_data_set_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_args: object, **_asked: object) -> None:
        raise DatasetNotFoundError("it doesn't exist on the Hub or cannot be accessed")

    monkeypatch.setattr("datasets.get_dataset_config_names", none)
    with pytest.raises(NoCardExamplesError, match=r"a/b cannot be read \(it doesn't.*; c/d cannot"):
        read_card_examples(["a/b", "c/d"], tmp_path, 4, no_token)


def test_a_card_names_data_sets_of_the_hub(tmp_path: Path) -> None:
    for lines, names in (
        ("datasets: [a/b, c/d, a/b]", ("a/b", "c/d")),
        ("datasets: a/b", ("a/b",)),
        ("datasets:\n- imdb\n- ../etc/passwd\n- a/b/c\n- {a: b}", ()),
        ("license: mit", ()),
        (
            "datasets: [" + ", ".join(f"a/b{i}" for i in range(99)) + "]",
            tuple(f"a/b{i}" for i in range(4)),
        ),
    ):
        (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n")
        assert datasets_of(tmp_path) == names


def test_a_recipe_takes_the_examples_of_a_card(
    workplace: Callable[..., RunContext], hub: Callable[..., None], tmp_path: Path
) -> None:
    plain = workplace()
    (tmp_path / "adapter").mkdir()
    for file in (plain.folder / "attention").iterdir():
        if file.name != "README.md":
            (tmp_path / "adapter" / file.name).symlink_to(file.resolve())
    experts = [section.model_dump(exclude_none=True) for section in plain.recipe.experts]
    experts[1] |= {"adapter": f"path:{tmp_path / 'adapter'}", "examples": "auto"}

    asked = {"experts": experts}
    with pytest.raises(
        NoCardExamplesError, match="expert attention: no examples: its card names no"
    ):
        plan_of(workplace(**asked))
    (tmp_path / "adapter" / "README.md").write_text("---\ndatasets: [somebody/letters]\n---\n")
    rows = letters("attention", 0, 8)
    hub("somebody/letters", [{"question": r["prompt"], "answer": r["response"]} for r in rows])
    plan, _ = plan_of(workplace(**asked))
    assert [row.prompt for row in plan.examples["attention"]] == [row["prompt"] for row in rows]
    assert plan.card_examples["attention"].startswith("hf:somebody/letters?")
    labelled, _ = plan_of(plain)
    assert plan.router.examples_sha256 == labelled.router.examples_sha256
