"""Tables for the terminal, from scores that are made up."""

import io

from rich.console import Console

from pipelines.cli.score_table import _print_numbers, _score_table, _table
from tests.pipelines.reports.test_summary import summary_of

VALUES = {"sums": {"fused": 0.5, "base": 0.1}, "dates": {"fused": 0.7}}


def shown(table: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120, markup=False).print(table)
    return [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]


def test_a_mean_says_over_how_many_tasks_it_is_if_there_are_others() -> None:
    own = frozenset(VALUES)
    whole = shown(_score_table(summary_of(VALUES, own=own), interval=False))
    assert whole[-1] == "mean 0.600"
    more = VALUES | {"composite-2": {"fused": 0.0}}
    part = shown(_score_table(summary_of(more, own=own), interval=False))
    assert part[-1] == "mean of 2 tasks 0.600"
    one = shown(_score_table(summary_of(more, own=frozenset({"sums"})), interval=False))
    assert one[-1] == "mean of 1 task 0.100 0.500"
    none = shown(_score_table(summary_of(more), interval=False))
    assert none[-1].startswith("composite-2")


def test_no_cell_can_control_the_terminal() -> None:
    _, _, line = shown(_table(("task",), [["\x1b[31mred\x07"]]))
    assert "red" in line
    assert line.isprintable()


def test_in_a_narrow_terminal_names_are_cut_and_numbers_are_not() -> None:
    summary = summary_of(VALUES | {"spelled_numbers": {"fused": 0.25}})
    out = io.StringIO()
    _print_numbers(Console(file=out, width=16), _score_table(summary, interval=False))
    shown = out.getvalue().split()
    assert {"0.50", "0.10", "0.70", "0.25", "spell…"} <= set(shown)
