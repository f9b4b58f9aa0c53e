"""Reports on one checkpoint and on two: a page that opens offline, with charts of the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from meteora.artifacts import NULL, SHARED
from meteora.untrusted.findings import counted
from pipelines.hub.client import page_of
from pipelines.reports import charts
from pipelines.reports.card import METHODS, stand_in_lines
from pipelines.reports.html import render
from pipelines.reports.lineage import lineage_graph
from pipelines.reports.queries import QueryResult, base_name, by_turn, compare_systems
from pipelines.reports.side_by_side import LABELS, SideBySide
from pipelines.reports.trace import expert_styles
from pipelines.scoring.metrics import ATTEMPTED
from pipelines.workspace.checkpoints import base_option

FIGURES = (
    "scores", "conversations", "matrix", "confusion", "load", "layers", "details", "switches",
    "lineage",
)  # fmt: skip
"""Queries that have a chart."""
COMPARED = ("scores", "overall", "accuracy", "router", "stages", "speed", "lineage")
"""Queries whose results a page on two checkpoints shows for each."""
LEAST_SHARE = 0.01
"""A share of an expert's tokens. An expert without test rows is in the charts only if it receives
this share of another expert's tokens or more; among hundreds of experts most do not."""
LEAST_SEEN = 0.0005
"""A smaller share of tokens gives a cell no colour; hundreds of experts have many such cells."""
BESIDE = {SHARED: "their mean", NULL: "the base"}
"""The choices of a router besides experts, in words."""
ALL_MODULES = "all modules"
"""The name of the line over all modules of a layer."""


def report_page(
    results: Mapping[str, QueryResult], traces: Sequence[Mapping[str, Any]] = ()
) -> str:
    """One self-contained HTML page, with the results of `trace_figure` as examples."""
    experts = results["experts"].rows
    num_experts = len(experts)
    choices = [counted(num_experts, "expert"), *(BESIDE[name] for name in beside(results))]
    context = {
        "title": f"{choices[0]} on {base_name(results)}",
        "base_option": base_option(str(results["base"].rows[0]["base_model"]), None),
        "results": results,
        "figures": draw_charts(results),
        "comparisons": compare_systems(results["differences"].rows),
        "conversations": by_turn(results["conversations"].rows),
        "traces": traces,
        "num_experts": num_experts,
        "counted": counted,
        "num_bystanders": len(bystanders(results)),
        "choices": " and ".join(choices),
        "expert_styles": expert_styles(max((len(t["experts"]) for t in traces), default=0)),
        "scripts": ["report.js", *(["trace.js"] if traces else [])],
        "page_of": page_of,
        "methods": METHODS,
        "stand_ins": [
            line
            for kind in ("arrow", "norm")
            for line in stand_in_lines([r["name"] for r in experts if r["gate_from"] == kind], kind)
        ],
    }
    return render("report.html", context)


def comparison_page(found: SideBySide) -> str:
    """One self-contained HTML page on two checkpoints."""
    conversations = by_turn(found.turns)
    both = found.a.by_expert.keys() & found.b.by_expert.keys()
    change = " minus ".join(reversed(LABELS))
    figures = {
        "scores": forests(
            [
                {"task": row.a.spec.task, "system": label, "metric": row.a.spec.metric,
                 "value": score.value, "low": score.low, "high": score.high}
                for row in found.rows
                for label, score in zip(LABELS, (row.a, row.b), strict=True)
            ],
            "scores",
        ),
        "differences": forests(
            [
                {"task": row.a.spec.task, "system": change, "metric": row.a.spec.metric,
                 "value": one.difference, "low": one.low, "high": one.high}
                for row in found.rows
                for one in [row.difference]
            ],
            "differences",
            signed=True,
        ),
        "conversations": turn_charts(conversations, strong=LABELS[1]),
        "routing": charts.dumbbell_plot(
            [
                (name, found.a.by_expert[name], found.b.by_expert[name])
                for name in found.b.manifest.names
                if name in both
            ],
            "routing",
            labels=LABELS,
            xlabel="share of its tokens that reach it",
        )
        if both
        else None,
    }  # fmt: skip
    context = {
        "title": f"{found.a.name} and {found.b.name}",
        "base_option": base_option(found.a.manifest.base.repo_id, None),
        "found": found,
        "figures": figures,
        "conversations": conversations,
        "queries": [name for name in COMPARED if any(s.results[name].rows for s in found.sides)],
        "expert_styles": (),
        "scripts": ["report.js"],
    }
    return render("comparison.html", context)


def draw_charts(results: Mapping[str, QueryResult]) -> dict[str, Any]:
    """The charts by the name of their query; None where there is no data."""
    drawn: dict[str, Any] = dict.fromkeys(FIGURES)
    drawn["scores"] = forests(results["scores"].rows, "forest")
    drawn["conversations"] = turn_charts(by_turn(results["conversations"].rows), strong="fused")
    experts = [row["name"] for row in results["experts"].rows]
    matrix = results["matrix"].rows
    pairs = {(row["task"], row["expert"]) for row in matrix}
    if len(pairs) > len({row["task"] for row in matrix}):  # not only each on its own task
        drawn["matrix"] = _matrices(matrix, experts)
    if confusion := results["confusion"].rows:
        left_out = bystanders(results)
        truths = {row["truth"] for row in confusion}
        drawn["confusion"] = charts.heat_map(
            [name for name in experts if name in truths],
            [name for name in [*experts, *beside(results)] if name not in left_out],
            {
                (row["truth"], row["chosen"]): row["share"]
                for row in confusion
                if row["share"] >= LEAST_SEEN or row["truth"] == row["chosen"]
            },
            "confusion",
            labels=("tokens of", "sent to, %"),
        )
        load = results["load"].rows
        drawn["load"] = charts.dumbbell_plot(
            [
                (row["expert"], row["own"] or 0.0, row["sent"] or 0.0)
                for row in load
                if row["expert"] not in left_out
            ],
            "load",
            labels=("of its own rows", "sent to it"),
            xlabel="share of all tokens",
        )
    if layers := [row for row in results["layers"].rows if row["layer"] is not None]:
        drawn["layers"] = charts.line_chart(
            _by_kind(layers),
            "layers",
            xlabel="layer",
            ylabel="routing accuracy",
            strong=ALL_MODULES,
        )
    if details := [row for row in results["details"].rows if row["layer"] is not None]:
        drawn["details"] = charts.line_chart(
            {
                "agreement": [(row["layer"], row["agreement"]) for row in details],
                "weight": [(row["layer"], row["weight"]) for row in details],
            },
            "details",
            xlabel="layer",
            ylabel="share",
            strong="agreement",
        )
    if switches := [row for row in results["switches"].rows if row["delay_tokens"] is not None]:
        drawn["switches"] = charts.line_chart(
            {
                name: [(row["delay_tokens"], row[f"{name}_share"]) for row in switches]
                for name in ("question", "answer")
                if switches[0][f"{name}_share"] is not None
            },
            "switches",
            xlabel="tokens after another task begins",
            ylabel="share that switched",
            strong="answer",
            step=True,
        )
    drawn["lineage"] = lineage_graph(results)
    return drawn


def beside(results: Mapping[str, QueryResult]) -> list[str]:
    """The choices besides experts that tokens are routed to: the mean of all, or the base."""
    chosen = {row["chosen"] for row in results["confusion"].rows}
    return [name for name in BESIDE if name in chosen]


def bystanders(results: Mapping[str, QueryResult]) -> set[str]:
    """The experts without rows of their own that hardly any token of the others reaches."""
    rows = results["confusion"].rows
    reached = {row["chosen"] for row in rows if row["share"] >= LEAST_SHARE}
    experts = {row["name"] for row in results["experts"].rows}
    return experts - reached - {row["truth"] for row in rows}


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """A line for each kind of module; kinds with equal numbers share one line.

    Its name is that of all modules, if these have them, too.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in layers:
        kind = row["module_kind"] or ALL_MODULES
        series.setdefault(kind, []).append((row["layer"], row["accuracy"]))
    kinds: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for kind, points in series.items():
        kinds.setdefault(tuple(points), []).append(kind.removesuffix("_proj"))
    return {
        ALL_MODULES if ALL_MODULES in names else ", ".join(names): list(points)
        for points, names in kinds.items()
    }


def turn_charts(conversations: Sequence[Mapping[str, Any]], strong: str) -> Markup:
    """A line for each system over the turns; a chart for each task of `by_turn`."""
    return Markup("\n").join(
        charts.line_chart(
            {line["system"]: list(enumerate(line["values"], 1)) for line in one["lines"]},
            f"conversations-{number}",
            xlabel=f"turn of {one['task']}",
            ylabel="mean score",
            strong=strong,
        )
        for number, one in enumerate(conversations)
    )


def forests(rows: Sequence[Mapping[str, Any]], name: str, *, signed: bool = False) -> Markup:
    """One chart for each metric, since their units differ; rows are as `forest_plot` takes them."""
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["metric"] != ATTEMPTED:  # shown in a table, beside the shares that are right
            by_metric.setdefault(row["metric"], []).append(row)
    return Markup("\n").join(
        charts.forest_plot(scores, metric.replace("_", " "), f"{name}-{number}", signed=signed)
        for number, (metric, scores) in enumerate(by_metric.items())
    )


def _matrices(rows: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Markup:
    """One heat map of task and expert for each metric."""
    by_metric: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if 0 <= row["value"] <= 1:
            by_metric.setdefault(row["metric"], {})[row["task"], row["expert"]] = row["value"]
    return Markup("\n").join(
        charts.heat_map(
            sorted({task for task, _ in values}, key=lambda task: _place(task, experts)),
            experts,
            values,
            f"matrix-{number}",
            labels=("task", f"adapter alone, {metric.replace('_', ' ')} × 100"),
        )
        for number, (metric, values) in enumerate(by_metric.items())
    )


def _place(task: str, experts: Sequence[str]) -> tuple[int, str]:
    """Sorts tasks in the order of their experts, and other tasks after them."""
    return (experts.index(task) if task in experts else len(experts), task)
