"""Means, marks and the order of systems, from scores that are made up."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

from meteora.artifacts import (
    ArtifactId,
    BenchmarkSpec,
    ComparisonBuild,
    ComparisonSpec,
    Difference,
    Score,
    ScoreTurn,
)
from pipelines.reports.summary import Summary

SPEC = BenchmarkSpec(
    ArtifactId("router:1"), "t", "f" * 64, "exact_match", 0, 8, 0, ArtifactId("base:1")
)
SCORE = Score(SPEC, 0.5, 0.1, 0.4, 0.6, 30, "e" * 64, "lm-eval", 1.0)


def summary_of(values: Mapping[str, Mapping[str, float]], **more: Any) -> Summary:
    scores = {
        task: {system: replace(SCORE, value=value) for system, value in row.items()}
        for task, row in values.items()
    }
    return Summary(scores, Mock(), None, {}, **more)


def test_means_are_over_the_experts_own_tasks_and_only_where_all_were_measured() -> None:
    summary = summary_of(
        {
            "sums": {"fused": 0.5, "base": 0.1},
            "sums: rouge1": {"fused": 0.9, "base": 0.9},
            "dates": {"fused": 0.7},
            "composite-2": {"fused": 0.0, "base": 0.0, "one_expert": 0.3},
        },
        own=frozenset({"sums", "dates"}),
    )
    means = {system: summary.mean(system) for system in ("fused", "base", "one_expert")}
    assert means == {"fused": 0.6, "base": None, "one_expert": None}
    assert summary_of({"composite-2": {"fused": 0.5}}).mean("fused") is None


def test_a_loss_is_of_one_task_and_one_system_in_the_metrics_own_direction() -> None:
    def difference(task: str, value: float, p_holm: float = 0.01) -> Difference:
        ids = ArtifactId("score:1"), ArtifactId("score:2")
        return Difference(task, "m", *ids, value, -1, 1, 0.001, p_holm, "mcnemar", 30)

    told = {
        "base": (difference("sums", 0.3), difference("dates", -0.3), difference("errors", -0.3)),
        "oracle": (difference("sums", -0.3, 0.06), difference("errors", 0.3)),
    }
    comparisons = {
        other: ComparisonBuild(ComparisonSpec(SPEC.id, "fused", other, ()), found, 0.0, 0.0, 0.0)
        for other, found in told.items()
    }
    summary = summary_of(
        {task: {"fused": 0.5, "base": 0.5, "oracle": 0.5} for task in ("sums", "dates", "errors")},
        comparisons=comparisons,
    )
    row = summary.scores["errors"]
    fewer = {system: replace(score, higher_is_better=False) for system, score in row.items()}
    summary = replace(summary, scores={**summary.scores, "errors": fewer})
    marks = {
        system: [summary.mark(task, system) for task in summary.scores]
        for system in ("base", "oracle", "fused")
    }
    assert marks == {"base": ["+", "-", "+"], "oracle": ["", "", "-"], "fused": ["", "", ""]}
    assert summary.losses() == [
        ("dates", "base", told["base"][1]),
        ("errors", "oracle", told["oracle"][1]),
    ]


def test_systems_of_conversations_only_have_no_column_unless_there_is_no_other_task() -> None:
    summary = summary_of(
        {
            "sums": {"arrow": 0.1, "fused": 0.5, "base": 0.1},
            "talks": {"single": 0.1, "fused": 0.5, "oracle": 0.6},
        }
    )
    turns = (ScoreTurn(1, 0.9, 40.0, 40.0, 5.0, 0.25),)
    row = {system: replace(score, turns=turns) for system, score in summary.scores["talks"].items()}
    summary = replace(summary, scores={**summary.scores, "talks": row})
    assert summary.systems == ["base", "fused", "arrow"]
    assert [*summary.conversations["talks"]] == ["oracle", "fused", "single"]
    assert replace(summary, scores={"talks": row}).systems == ["oracle", "fused", "single"]
