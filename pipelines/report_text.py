"""A report as Markdown: for a Prefect artifact, or wherever a page cannot go."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meteora.artifacts import short
from pipelines.card import stand_in_lines
from pipelines.questions import against, ask, title

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meteora.artifacts import ArtifactId
    from pipelines.questions import Asked
    from store.ledger import Ledger

SHOWN = (
    "means", "differences", "composites", "parts", "accuracy", "failures", "speed", "stages",
    "adapters", "lineage",
)  # fmt: skip
"""The answers that stand in the text, in this order; scores stand above them, task by task."""
STAND_INS = ("arrow", "norm")
"""By which experts without examples are told."""
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~&])")


def report_markdown(ledger: Ledger, router_id: ArtifactId) -> str:
    """What the page of a report says, in tables.

    Raises:
        ReportError: the ledger knows no scores of this router.
    """
    asked = ask(ledger, router_id)
    lines = [
        f"# {escaped(title(asked))}",
        "",
        *(f"- {line}" for line in verdict(asked)),
        "",
        "## Scores and their 95 % intervals",
        "",
        *scores_table(asked["scores"].rows),
    ]
    for name in SHOWN:
        answer = asked[name].answer
        if answer.rows:
            cells = [[escaped(_cell(value)) for value in row] for row in answer.rows]
            lines += ["", f"## {asked[name].title}", "", *_table(answer.columns, cells)]
    lines += ["", f"Router `{short(router_id)}`; ask again with `meteora sql`."]
    return "\n".join(lines) + "\n"


def verdict(asked: Mapping[str, Asked]) -> list[str]:
    """What the numbers come to, a sentence each."""
    means = ", ".join(f"{row['system']} {row['mean']:.3f}" for row in asked["means"].rows)
    lines = (
        [f"Means over the tasks that every system was asked: {escaped(means)}."] if means else []
    )
    differences = asked["differences"].rows
    losses = [one for one in against(differences) if one.worse]
    lines += [
        f"Loses to {escaped(one.other)}, beyond chance, on {len(one.worse)} of {one.num_tasks}"
        f" tasks: {escaped(', '.join(one.worse))}."
        for one in losses
    ]
    if differences and not losses:
        lines.append("On no task is it worse than another system beyond chance.")
    told_by = {row["name"]: row["told_by"] for row in asked["experts"].rows}
    without = {escaped(name): how for name, how in told_by.items() if how in STAND_INS}
    lines += stand_in_lines([*without], next(iter(without.values()), ""))
    accuracy = asked["overall"].rows[0]["accuracy"]
    if accuracy is not None:
        lines.append(f"Of all tokens, {accuracy:.1%} were sent to their own expert.")
    return lines


def scores_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a task and metric, a column a system."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    cells = {(row["task"], row["metric"], row["system"]): row for row in rows}
    body = []
    for task, metric in tasks:
        there = [cells.get((task, metric, system)) for system in systems]
        n = next(row["num_samples"] for row in there if row)
        shown = [f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in there]
        body.append((escaped(task), escaped(metric), str(n), *shown))
    return _table(("task", "metric", "n", *systems), body)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already."""
    return [
        f"| {' | '.join(map(escaped, columns))} |",
        f"|{'-|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


def escaped(text: str) -> str:
    """Text from strangers: no markup of theirs takes effect, and no line ends."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))
