from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipelines.examples import ExamplesError, Row, read_rows, refuse_overlap, rows_sha256

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '{"prompt": "p", "response": "r"}\n'


def test_rows_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "p{i}", "response": "r{i}", "more": 1}}\n\n' for i in range(5))
    )
    assert read_rows("jsonl:rows.jsonl", tmp_path, 3) == [Row(f"p{i}", f"r{i}") for i in range(3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(GOOD + "{}\n", "line 2: not a row", id="no keys"),
        pytest.param(GOOD + "{", "line 2: not a row", id="cut"),
        pytest.param('{"prompt": 1, "response": "r"}', "must be text", id="a number"),
        pytest.param('{"prompt": " ", "response": "r"}', "not empty", id="no prompt"),
        pytest.param("\n\n", "no rows in it", id="empty"),
        pytest.param("[" * 100_000, "line 1: not a row", id="deep"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ExamplesError, match=said):
        read_rows("jsonl:rows.jsonl", tmp_path, 10)


def test_a_missing_file_and_an_unknown_source_are_said(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="No such file"):
        read_rows("jsonl:none.jsonl", tmp_path, 1)
    with pytest.raises(ExamplesError, match="rows come from"):
        read_rows("csv:none.csv", tmp_path, 1)


def test_a_test_row_that_gates_were_fitted_to_is_refused() -> None:
    fitted = {"a": [Row("same  prompt", "x")]}
    with pytest.raises(ExamplesError, match="'same prompt' is also an example of expert a"):
        refuse_overlap(fitted, {"b": [Row("other", "y"), Row("same prompt", "z")]})
    refuse_overlap(fitted, {"b": [Row("other", "y")]})


def test_the_hash_of_rows_depends_on_their_order_and_every_letter() -> None:
    one, two = Row("a", "b"), Row("b", "a")
    hashes = {rows_sha256(rows) for rows in ([one, two], [two, one], [one], [one, one])}
    assert len(hashes) == 4
