"""Output about a model: its scores, a comparison with another, its trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table

from meteora.artifacts import short
from meteora.untrusted.findings import MOST_NAMED, counted, for_terminal, listed, shortened
from pipelines.reports.card import (
    cell,
    example_lines,
    loss_lines,
    method_lines,
    routing_lines,
    speed_lines,
    stand_in_lines,
    turn_tables,
)
from pipelines.reports.queries import by_turn
from pipelines.reports.trace import terminal_texts
from pipelines.workspace.checkpoints import base_option
from pipelines.workspace.console import plain_console

if TYPE_CHECKING:
    from rich.console import Console

    from meteora.model.trace import Trace
    from pipelines.planning.plan import Plan
    from pipelines.reports.side_by_side import SideBySide
    from pipelines.reports.summary import Summary

LEAST = 6
"""The fewest characters of a name that are shown beside its numbers."""
LONGEST = 24
"""The most characters of a value in a column."""


def print_scores(
    name: str,
    folder: Path,
    plan: Plan,
    summary: Summary,
    seconds: Mapping[str, float],
    *,
    base: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the scores of a checkpoint, with their circumstances.

    Args:
        name: Of the recipe, or of the checkpoint if it is measured without one.
        seconds: The time of each stage; empty if this command did not run it.
    """
    if as_json:
        print(json.dumps(_scores(name, folder, plan, summary, seconds)))
        return
    out = plain_console()
    fits = _print_score_table(out, name, summary)
    pairs = zip(turn_tables(summary), turn_tables(summary, interval=False), strict=True)
    for (headings, rows, line), (_, narrow, _) in pairs:
        table = _table(headings, rows)
        _print_numbers(out, table if _fits(out, table) else _table(headings, narrow))
        out.print(line, soft_wrap=True)
    lines = (
        *method_lines(summary),
        *routing_lines(summary),
        *example_lines(summary.gates),
        *stand_in_lines(summary.gates.spec.stand_ins, summary.gates.spec.stand_in),
        *loss_lines(summary),
    )
    for line in (*lines, *speed_lines(summary)):
        out.print(line, soft_wrap=True)
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in summary.sizes.items())
    out.print(f"sizes: {sizes} (the base is referred to, not copied)", soft_wrap=True)
    if seconds:
        took = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
        out.print(f"times: {took}; in all {sum(seconds.values()):.0f} s", soft_wrap=True)
    print(f"checkpoint: {folder}")
    router, where = short(plan.router.id), base_option(plan.base.base_model, base)
    if not summary.scores:
        print(f"recorded as {router}; try next:\n  meteora chat {router}{where}")
        return
    print(f"recorded as {router}; try next:")
    columns, view, those = (
        ("task, value, base_value, oracle_value", "leaderboard", "is_latest AND subject_id")
        if fits
        else ("task, system, value, low, high", "latest_standings", "router_id")
    )
    question = f"SELECT {columns} FROM {view} WHERE {those} LIKE '{router}%' ORDER BY task"  # noqa: S608
    print(f'  meteora sql "{question}"')
    print(f"  meteora report {router}{where}")


def _print_score_table(out: Console, name: str, summary: Summary) -> bool:
    """Print the scores; returns whether there was room for their intervals."""
    if not summary.scores:
        out.print(
            f"{name}: no task was asked; give its experts rows as `test:`, or the recipe some as"
            " `benchmark: {tasks: …}`",
            soft_wrap=True,
        )
        return True
    table = _score_table(summary, interval=True)
    if fits := _fits(out, table):
        out.print(f"{name}: scores, and their 95 % intervals", soft_wrap=True)
    else:
        out.print(f"{name}: scores; the query below has their 95 % intervals", soft_wrap=True)
        table = _score_table(summary, interval=False)
    _print_numbers(out, table)
    return fits


def _fits(out: Console, table: Table) -> bool:
    # unbounded, since a measure within the options is never larger than their width
    return Measurement.get(out, out.options.update_width(10_000), table).maximum <= out.width


def _print_numbers(out: Console, table: Table) -> None:
    """Print a table with whole numbers, whose lines are then longer than a narrow terminal's."""
    for column in table.columns:
        widest = max(cell_len(str(one)) for one in column.cells)
        column.min_width = widest if column.justify == "right" else min(widest, LEAST)
    out.print(table, crop=False)


def _scores(
    name: str, folder: Path, plan: Plan, summary: Summary, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """A checkpoint's scores as JSON types, for programs."""
    alone = {
        task: {f"expert:{expert}": score for expert, score in row.items()}
        for task, row in summary.matrix.items()
    }
    scores = [
        {
            "task": score.spec.task,
            "system": system,
            "metric": score.spec.metric,
            "value": score.value,
            "low": score.low,
            "high": score.high,
            "num_samples": score.num_samples,
            "differs": summary.mark(task, system),
        }
        for task, row in summary.scores.items()
        for system, score in {**row, **alone.get(task, {})}.items()
    ]
    return {
        "name": name,
        "router_id": plan.router.id,
        "checkpoint": str(folder),
        "experts": list(plan.fused.names),
        "scores": scores,
        "means": {system: summary.mean(system) for system in summary.systems},
        "seconds": dict(seconds),
    }


def _score_table(summary: Summary, *, interval: bool) -> Table:
    rows = []
    for task, row in summary.scores.items():
        cells = [cell(summary, task, system, interval=interval) for system in summary.systems]
        rows.append([task, str(row["fused"].num_samples), *cells])
    table = _table(("task", "n", *summary.systems), rows)
    means = [summary.mean(system) for system in summary.systems]
    if any(mean is not None for mean in means):
        table.add_section()
        number = len(summary.own)
        of = f" of {counted(number, 'task')}" if number < len(summary.scores) else ""
        cells = ("" if mean is None else f"{mean:.3f}" for mean in means)
        table.add_row(f"mean{of}", "", *cells)
    return table


def print_comparison(found: SideBySide, page: Path, *, as_json: bool) -> None:
    """Print the differences between two checkpoints, and the path of the page on them."""
    if as_json:
        print(json.dumps({"page": str(page), **found.to_dict()}, default=str))
        return
    out = plain_console()
    for side in found.sides:
        names = listed(side.manifest.names, MOST_NAMED)
        out.print(
            f"{side.label}: {side.name}, {counted(len(side.manifest.experts), 'expert')}: {names}"
        )
    for table in _comparison_tables(found):
        if table.row_count:
            _print_numbers(out, table)
    if found.build:
        low, high = found.build.low, found.build.high
        out.print(
            f"Mean difference {found.build.mean_difference:+.3f} [{low:+.3f}, {high:+.3f}] over"
            f" {counted(len(found.build.differences), 'task')}, each by its first metric. + marks"
            " where B is better, - where it is worse, by a paired test on the same rows (p < 0.05"
            " after Holm's correction over all lines, as p is shown). Without a mark the difference"
            " may be chance.",
            soft_wrap=True,
        )
    else:
        out.print("no task was asked of both with the same rows; `meteora benchmark` measures them")
    for label, tasks in found.unmeasured.items():
        some = listed([*tasks], MOST_NAMED)
        out.print(f"{label} was not asked, on the other's rows: {some}", soft_wrap=True)
    out.print(str(page), soft_wrap=True)


def _comparison_tables(found: SideBySide) -> Iterator[Table]:
    """Tables of scores, turns, experts, options and costs; the last three only with differences."""
    yield _table(
        ("task", "n", "A", "B", "B - A", "p"),
        [
            (
                row.name, str(row.a.num_samples), f"{row.a.value:.3f}", f"{row.b.value:.3f}",
                f"{row.difference.difference:+.3f} {row.mark or ' '}",
                f"{row.difference.p_holm:.3g}",
            )
            for row in found.rows
        ],
    )  # fmt: skip
    for one in by_turn(found.turns):
        turns = [f"turn {number + 1}" for number in range(len(one["lines"][0]["values"]))]
        yield _table(
            (one["task"], *turns, "computed", "seconds"),
            [
                (
                    line["system"], *(f"{value:.2f}" for value in line["values"]),
                    f"{line['computed_tokens']:,.0f}", f"{line['seconds']:.2f}",
                )
                for line in one["lines"]
            ],
        )  # fmt: skip
    yield _table(
        ("expert", "differs"), [(one.name, one.change) for one in found.experts if one.change]
    )
    yield _table(
        ("option", "A", "B"),
        [(name, *(_shown(value) for value in values)) for name, *values in found.options],
    )
    yield _table(
        ("cost", "A", "B"), [(name, *cells) for name, cells in found.costs if len({*cells}) > 1]
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    # two blanks between columns: three systems with intervals fit into 80
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in {headings[0], "differs"} else "right"
        )
    for row in rows:
        table.add_row(*map(for_terminal, row))
    return table


def _shown(value: object) -> str:
    """A value of an option, short enough for a column."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "" if value is None else shortened(text, LONGEST)


def print_trace(found: Trace, answer: str, *, as_json: bool) -> None:
    """Print prompt and answer in the colours of their experts, and a legend."""
    if as_json:
        tokens = [
            {"text": token.text, "expert": found.experts[token.expert], "share": token.share}
            for token in found.tokens()
        ]
        parts = {"prompt": tokens[: found.num_prompt], "answer": tokens[found.num_prompt :]}
        prompt = "".join(str(token["text"]) for token in parts["prompt"])
        print(json.dumps({"prompt": prompt, "answer": answer, "tokens": parts}))
        return
    out = plain_console()
    for text in terminal_texts(found, out.color_system):
        out.print(text, soft_wrap=True, end="\n\n")
