"""What the command line prints: data, on stdout."""

from __future__ import annotations

import csv
import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from meteora.artifacts import MeteoraError, short
from pipelines import trace_view
from pipelines.card import cell, how_measured, loss_lines, routing_lines, speed_lines
from pipelines.summary import summarise

if TYPE_CHECKING:
    from meteora.trace import Trace
    from pipelines.plan import Plan
    from pipelines.rejudge import Rejudged
    from pipelines.workplace import Workplace
    from store.check import Verification
    from store.query import Answer


SHOWN = 100
"""How many of the artifacts that one damaged file touches are listed."""


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


def plain_console() -> Console:
    """Names and values are text: markup in them takes no effect. A pipe takes wider lines."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def summary(work: Workplace, planned: Plan, seconds: dict[str, float]) -> None:
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    if summary is None:
        raise MeteoraError("the ledger lost a result while it was read; run again")
    out = plain_console()
    out.print(f"{work.name}: scores, and their 95 % intervals")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("task", "n", *summary.systems):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, row in summary.scores.items():
        cells = [cell(summary, task, system) for system in summary.systems]
        table.add_row(task, str(row["fused"].num_samples), *cells)
    means = [summary.mean(system) for system in summary.systems]
    table.add_section()
    table.add_row("mean", "", *("" if mean is None else f"{mean:.3f}" for mean in means))
    out.print(table)
    told = (*how_measured(summary), *routing_lines(summary), *loss_lines(summary))
    for line in (*told, *speed_lines(summary)):
        out.print(line, soft_wrap=True)
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in summary.sizes.items())
    out.print(f"sizes: {sizes} (the base is referred to, not copied)", soft_wrap=True)
    if seconds:
        took = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
        out.print(f"times: {took}; in all {sum(seconds.values()):.0f} s", soft_wrap=True)
    out.print(f"checkpoint: {work.checkpoint_folder(planned.router.id)}", soft_wrap=True)
    out.print(f"recorded as {short(planned.router.id)}; try next:")
    question = (
        "SELECT task, value, base_value, oracle_value FROM leaderboard WHERE router = 'gate'"
        " ORDER BY task"
    )
    out.print(f'  meteora sql "{question}"', soft_wrap=True)


def trace(found: Trace) -> None:
    """Prompt and answer in the colours of the experts that took them, and a legend."""
    out = plain_console()
    for text in trace_view.terminal(found):
        out.print(text, soft_wrap=True, end="\n\n")


def findings(found: Verification, again: Rejudged) -> int:
    """Everything that is not as it was written; returns how much that is."""
    every = (*found.findings, *again.findings)
    for finding in every:
        some = ", ".join(map(short, finding.touches[:SHOWN]))
        more = len(finding.touches) - SHOWN
        some += f" and {more:,} more" if more > 0 else ""
        touched = f"; it touches {some}" if some else ""
        print(f"{finding.what} {finding.name}: {finding.problem}{touched}")
    print(
        f"{found.num_records} records and {found.num_blobs} blobs, {again.num_scores} scores"
        f" computed again: {len(every)} findings"
    )
    return len(every)


def answer(answer: Answer, form: Format) -> None:
    if form is Format.json:
        if len(set(answer.columns)) < len(answer.columns):
            raise MeteoraError(
                "two columns have one name, which JSON cannot tell apart"
                f" ({', '.join(answer.columns)}); name them with AS"
            )
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print(json.dumps(rows, indent=1, default=str))
    elif form is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
    else:
        table = Table(*answer.columns)
        for row in answer.rows:
            table.add_row(*(_cell(value) for value in row))
        plain_console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)
