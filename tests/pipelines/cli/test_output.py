"""Answers of the ledger as tables that fit a terminal, and as Markdown."""

import csv
import json
import sys
from collections.abc import Callable
from datetime import date
from decimal import Decimal

import pytest
from rich.console import Console

from pipelines.cli import output
from pipelines.cli.output import print_answer
from pipelines.scoring.served import Server
from store.query import Answer

COLUMNS = tuple(f"column_{number}" for number in range(32))
WIDE = Answer(COLUMNS, [tuple(range(32)), ("x" * 200, *[0.25] * 31)])


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What an answer looks like in a terminal of some width."""

    def show(answer: Answer, width: int = 80) -> str:
        monkeypatch.setattr(
            output, "plain_console", lambda: Console(width=width, file=sys.stdout, markup=False)
        )
        print_answer(answer, "table")
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_wide_answer_shows_its_first_columns_on_one_line_each(
    printed: Callable[..., str], width: int
) -> None:
    shown = printed(WIDE, width)
    assert "column_0" in shown
    assert "column_31" not in shown
    assert "32 columns" in shown
    table = [line for line in shown.splitlines() if line.startswith(("│", "┃", "┏"))]
    assert max(map(len, table)) <= width
    assert sum(line.startswith("│") for line in table) == 2
    assert all("…" in line for line in table if line.startswith("┃"))


def test_ids_and_what_is_alike_in_all_rows_are_left_out_first(
    printed: Callable[..., str],
) -> None:
    columns = ("subject_id", "rows_sha256", "seed", "task", *(f"c{i}" for i in range(20)), "value")
    rows = [(f"{i}" * 64, f"{i}" * 64, 7, f"task {i}", *[5] * 20, i / 4) for i in range(2)]
    heading = printed(Answer(columns, rows)).splitlines()[1]
    shown = heading.replace("┃", " ").split()
    assert {"subject_id", "task", "value"} < set(shown)
    assert "c9" not in shown
    narrow = printed(Answer(columns, rows), 40).splitlines()[1].replace("┃", " ").split()
    assert narrow == ["task", "value", "…"]


def test_an_answer_that_fits_is_whole_and_long_text_takes_several_lines(
    printed: Callable[..., str],
) -> None:
    assert printed(Answer(("a", "b"), [(1, None)])).count("\n") == 5
    shown = printed(Answer(("title", "text"), [("short", "word " * 60)]))
    assert shown.count("word") == 60
    assert "columns" not in shown
    whole = printed(WIDE, 1000)
    assert "column_31" in whole
    assert "x" * 200 in whole
    assert printed(Answer((), []))


def test_markdown_has_one_line_a_row_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(Answer(("a", "b|c"), [("x\ny", 0.5), ("p|q\\", None)]), "markdown")
    assert capsys.readouterr().out.splitlines() == [
        "| a | b\\|c |",
        "| - | - |",
        "| x y | 0.500 |",
        "| p\\|q\\\\ |  |",
    ]


def test_no_cell_turns_the_text_after_it(printed: Callable[..., str]) -> None:
    shown = printed(Answer(("a",), [("\u202egpj.exe \u2066\x1b[2J",)]))
    assert "\ufffdgpj.exe \ufffd␛[2J" in shown


def test_a_small_number_is_not_shown_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = (0.0, 0.0005, -0.12345, 0.00049, -1e-7, 1234.5678, 1e300, float("nan"))
    print_answer(Answer(tuple("abcdefgh"), [numbers]), "markdown")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| 0.000 | 0.001 | -0.123 | 0.00049 | -1e-07 | 1234.568 | 1e+300 | nan |"
    )


def test_json_has_null_for_what_is_no_number_and_decimals_as_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = (float("nan"), Decimal("1.5"), [1, float("inf")], {"a": float("-inf")}, date(2026, 1, 2))
    print_answer(Answer(("x", "y", "z", "w", "d"), [row]), "json")
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"x": None, "y": 1.5, "z": [1, None], "w": {"a": None}, "d": "2026-01-02"}


def test_csv_has_lists_and_maps_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    row = (["é", None], {"a": Decimal("1.5")}, [date(2026, 1, 2)], None, 0.5, float("nan"))
    print_answer(Answer(tuple("abcdef"), [row]), "csv")
    assert list(csv.reader(capsys.readouterr().out.splitlines())) == [
        list("abcdef"),
        ['["é", null]', '{"a": 1.5}', '["2026-01-02"]', "", "0.5", "nan"],
    ]


def test_what_a_server_calls_its_model_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {"data": [{"id": "good\x1b[2Jmodel"}]}
    monkeypatch.setattr(Server, "_get", lambda *_: listed)
    assert output.print_served(Server("http://localhost"), [], [], as_json=False)
    assert "answers of good␛[2Jmodel at http://localhost/v1" in capsys.readouterr().out
