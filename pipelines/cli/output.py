"""Answers of the ledger and findings of `verify`, printed to stdout. Scores: see `score_table`."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import typer
from rich.cells import cell_len
from rich.table import Column, Table

from meteora.artifacts import MeteoraError, short
from meteora.untrusted.findings import counted, for_terminal
from pipelines.workspace.console import plain_console

if TYPE_CHECKING:
    from pipelines.scoring.recompute import Recomputed
    from pipelines.scoring.served import RecordedAnswer, Server
    from store.check import Finding, Verification
    from store.query import Answer


Format = Literal["table", "json", "csv", "markdown"]
"""The forms of an answer."""
SHOWN = 100
"""The most artifacts to list for one damaged file."""
ID = re.compile(r"(^|_)(id|sha256)$")
"""Names of columns of long hexadecimal digits."""
NARROW = 20
"""The most characters of a column in a table that is too wide for a line."""
SMALLEST, LARGEST = 0.0005, 1e15
"""Between them a number has three decimal places; a p-value of 0.0001 is not 0.000."""
BORDERS = 3
"""The characters of border and padding for each cell of a table."""


def print_findings(
    found: Verification, bases: Sequence[Finding], again: Recomputed, *, as_json: bool = False
) -> int:
    """Print all damaged files and scores that do not recompute; returns the number of findings."""
    every = (*found.findings, *bases, *again.findings)
    if as_json:
        counts = {
            "num_records": found.num_records,
            "num_blobs": found.num_blobs,
            "num_scores": again.num_scores,
        }
        print(json.dumps(counts | {"findings": list(map(asdict, every))}, indent=1))
        return len(every)
    for finding in every:
        some = ", ".join(map(short, finding.touches[:SHOWN]))
        more = len(finding.touches) - SHOWN
        some += f" and {more:,} more" if more > 0 else ""
        touched = f"; it touches {some}" if some else ""
        print(for_terminal(f"{finding.what} {finding.name}: {finding.problem}{touched}"))
    print(
        f"{counted(found.num_records, 'record')} and {counted(found.num_blobs, 'blob')},"
        f" {counted(again.num_scores, 'score')} computed again: {counted(len(every), 'finding')}"
    )
    return len(every)


def print_served(
    server: Server, asked: Sequence[RecordedAnswer], found: Sequence[str], *, as_json: bool
) -> bool:
    """Print each answer of a server that is not the recorded one; returns whether none is."""
    differ = [(a, b) for a, b in zip(asked, found, strict=True) if a.output.strip() != b.strip()]
    if as_json:
        answers = [
            {"task": a.task, "prompt": a.prompt, "recorded": a.output, "served": b}
            for a, b in differ
        ]
        about = {"url": server.url, "model": server.model, "num_asked": len(asked)}
        print(json.dumps({**about, "differ": answers}))
        return not differ
    for recorded, served in differ:
        print(
            f"{for_terminal(recorded.task)}: {recorded.prompt[:60]!r} was answered"
            f" {recorded.output[:60]!r}, the server says {served[:60]!r}"
        )
    print(
        f"{len(asked) - len(differ)} of {counted(len(asked), 'answer')} of"
        f" {for_terminal(server.model)} at {server.url} are the recorded ones"
    )
    return not differ


def form_of(form: Format | None, *, as_json: bool) -> Format | None:
    """The form that `--format` or `--json` asks for, if one does; `BadParameter` if they differ."""
    if as_json and form not in {None, "json"}:
        raise typer.BadParameter(f"--json and --format {form} contradict; give one of them")
    return "json" if as_json else form


def print_answer(answer: Answer, form: Format) -> None:
    """Print the rows of a query."""
    if form == "json":
        if len(set(answer.columns)) < len(answer.columns):
            raise MeteoraError(
                "two columns have one name, which JSON cannot tell apart"
                f" ({', '.join(answer.columns)}); name them with AS"
            )
        print(json.dumps(_for_json(answer.dicts), indent=1, default=str, allow_nan=False))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(map(_for_csv, row) for row in answer.rows)
    elif form == "markdown":
        for row in (answer.columns, ["-"] * len(answer.columns), *answer.rows):
            print(f"| {' | '.join(_markdown(_cell(value)) for value in row)} |")
    else:
        _print_table(answer)


def _for_json(value: object) -> object:
    """A value in JSON's types: NaN and infinity become null, and decimals numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {str(key): _for_json(one) for key, one in value.items()}
    return [_for_json(one) for one in value] if isinstance(value, list | tuple) else value


def _for_csv(value: object) -> object:
    """A list, a struct or a map as JSON, which other programs read; Python's form is Python's."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(_for_json(value), default=str, allow_nan=False, ensure_ascii=False)
    return value


def _print_table(answer: Answer) -> None:
    """Print a table. If it is too wide for a line, cut columns and leave some out.

    Columns with one value in every row are left out first, then ids.
    """
    out = plain_console()
    cells = [[_cell(value) for value in row] for row in answer.rows]
    columns = list(zip(answer.columns, *cells, strict=True))
    widths = [max(map(cell_len, column)) + BORDERS for column in columns]
    count, room = len(widths), out.width - 1
    if sum(min(width, NARROW + BORDERS) for width in widths) <= room:
        table, shown = Table(*answer.columns), list(range(count))
    else:

        def says_little(i: int) -> tuple[bool, bool]:
            name, *values = columns[i]
            return len(values) > 1 and len(set(values)) == 1, bool(ID.search(name))

        readable = sorted(range(count), key=says_little)
        narrow = list(accumulate(min(widths[i], NARROW + BORDERS) for i in readable))
        fitting = max(1, bisect_right(narrow, room - len("…") - BORDERS))
        shown = sorted(readable[:fitting])
        heads = [*(answer.columns[i] for i in shown), "…"]
        table = Table(*(Column(head, no_wrap=True, max_width=NARROW) for head in heads))
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    out.print(table)
    if len(shown) < count:
        out.print(
            f"{count} columns, {len(shown)} shown; select those that you need, or ask for"
            " all with --format csv",
            soft_wrap=True,
        )


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _cell(value: object) -> str:
    if isinstance(value, float):
        plain = value == 0 or SMALLEST <= abs(value) < LARGEST
        return f"{value:.3f}" if plain else f"{value:.3g}"
    return "" if value is None else for_terminal(str(value))
