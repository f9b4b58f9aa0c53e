"""What a checkpoint is worth, on one page that needs no network: answers, and figures of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meteora.artifacts import COMMIT
from pipelines.reports import charts
from pipelines.reports.html import render
from pipelines.reports.queries import against, title
from pipelines.reports.trace import expert_styles
from pipelines.scoring.metrics import ATTEMPTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from pipelines.reports.queries import Asked

FIGURES = ("scores", "matrix", "confusion", "load", "layers", "details", "switches")
ALL = "all modules"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def report_page(asked: Mapping[str, Asked], traces: Sequence[Mapping[str, Any]] = ()) -> str:
    """One self-contained HTML page.

    Args:
        traces: each as `trace_figure` gives it, shown as examples
    """
    context = {
        "title": title(asked),
        "asked": asked,
        "figures": draw(asked),
        "against": against(asked["differences"].rows),
        "traces": traces,
        "num_experts": len(asked["experts"].rows),
        "expert_styles": expert_styles(max((len(t["experts"]) for t in traces), default=0)),
        "scripts": ["report.js", *(["trace.js"] if traces else [])],
        "hub_link": hub_link,
    }
    return render("report.html", context)


def hub_link(source: str | None, revision: str | None) -> str:
    """The page of a commit on the Hub; empty for what does not lie there."""
    if source and revision and HUB_ID.fullmatch(source) and COMMIT.fullmatch(revision):
        return f"https://huggingface.co/{source}/tree/{revision}"
    return ""


def draw(asked: Mapping[str, Asked]) -> dict[str, Any]:
    """The figures by the name of their question; None where there is no data for one."""
    drawn: dict[str, Any] = dict.fromkeys(FIGURES)
    drawn["scores"] = _forests(asked["scores"].rows)
    experts = [row["name"] for row in asked["experts"].rows]
    matrix = asked["matrix"].rows
    pairs = {(row["task"], row["expert"]) for row in matrix}
    if len(pairs) > len({row["task"] for row in matrix}):  # more than each on its own
        drawn["matrix"] = _matrices(matrix, experts)
    if confusion := asked["confusion"].rows:
        truths = {row["truth"] for row in confusion}
        chosen = {row["chosen"] for row in confusion}
        beside = sorted(chosen - set(experts))  # the base, where it is a choice
        drawn["confusion"] = charts.heat(
            [name for name in experts if name in truths],
            [*experts, *beside],
            {(row["truth"], row["chosen"]): row["share"] for row in confusion},
            "confusion",
            labels=("tokens of", "sent to, %"),
        )
        load = asked["load"].rows
        drawn["load"] = charts.dumbbells(
            [(row["expert"], row["own"] or 0.0, row["sent"] or 0.0) for row in load],
            "load",
            labels=("of its own rows", "sent to it"),
            xlabel="share of all tokens",
        )
    if layers := [row for row in asked["layers"].rows if row["layer"] is not None]:
        drawn["layers"] = charts.lines(
            _by_kind(layers), "layers", xlabel="layer", ylabel="routing accuracy", strong=ALL
        )
    if details := [row for row in asked["details"].rows if row["layer"] is not None]:
        drawn["details"] = charts.lines(
            {
                "agreement": [(row["layer"], row["agreement"]) for row in details],
                "weight": [(row["layer"], row["weight"]) for row in details],
            },
            "details",
            xlabel="layer",
            ylabel="share",
            strong="agreement",
        )
    if switches := [row for row in asked["switches"].rows if row["delay_tokens"] is not None]:
        drawn["switches"] = charts.lines(
            {
                name: [(row["delay_tokens"], row[f"{name}_share"]) for row in switches]
                for name in ("question", "answer")
                if switches[0][f"{name}_share"] is not None
            },
            "switches",
            xlabel="tokens after another task begins",
            ylabel="share that followed",
            strong="answer",
            step=True,
        )
    return drawn


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """A line for each kind of module; modules that share their input share one line."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in layers:
        kind = row["module_kind"] or ALL
        series.setdefault(kind, []).append((row["layer"], row["accuracy"]))
    kinds: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for kind, points in series.items():
        kinds.setdefault(tuple(points), []).append(kind.removesuffix("_proj"))
    return {", ".join(names): list(points) for points, names in kinds.items()}


def _forests(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One a metric: their units differ."""
    by_metric: dict[str, list[charts.Interval]] = {}
    for row in rows:
        if row["metric"] == ATTEMPTED:  # stands beside what was right, in a table
            continue
        by_metric.setdefault(row["metric"], []).append(
            charts.Interval(row["task"], row["system"], row["value"], row["low"], row["high"])
        )
    return [
        charts.forest(intervals, metric.replace("_", " "), f"forest-{number}")
        for number, (metric, intervals) in enumerate(by_metric.items())
    ]


def _matrices(rows: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> list[Markup]:
    by_metric: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if 0 <= row["value"] <= 1:
            by_metric.setdefault(row["metric"], {})[row["task"], row["expert"]] = row["value"]
    return [
        charts.heat(
            sorted({task for task, _ in values}, key=lambda task: _place(task, experts)),
            experts,
            values,
            f"matrix-{number}",
            labels=("task", f"adapter alone, {metric.replace('_', ' ')} × 100"),
        )
        for number, (metric, values) in enumerate(by_metric.items())
    ]


def _place(task: str, experts: Sequence[str]) -> tuple[int, str]:
    """Tasks in the order of their experts, the others after them."""
    return (experts.index(task) if task in experts else len(experts), task)
