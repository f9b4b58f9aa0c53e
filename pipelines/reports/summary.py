"""The results of a run, read from the ledger: the same numbers for the terminal and the card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.artifacts import (
    WITH_GATES,
    ComparisonBuild,
    Difference,
    RouterBuild,
    RoutingBuild,
    Score,
    SpeedBuild,
)
from pipelines.evaluation.measurements import BASE, FUSED, ORACLE, Measurement
from pipelines.scoring.judges import judged_scores

if TYPE_CHECKING:
    from pipelines.planning.plan import Plan
    from store.ledger import Ledger


@dataclass(frozen=True)
class Summary:
    """All results of one checkpoint."""

    scores: Mapping[str, Mapping[str, Score]]
    """By task, then by system. A task's second metric has the key `task: metric`, and so on."""
    gates: RouterBuild
    routing: RoutingBuild | None
    """None if no expert has test rows."""
    sizes: Mapping[str, int]
    """Sizes of the stored files in bytes, by name."""
    own: frozenset[str] = frozenset()
    """Tasks that belong to an expert: means are over them."""
    matrix: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """By task, then by expert: each alone on every task, if the recipe asks for it."""
    comparisons: Mapping[str, ComparisonBuild] = field(default_factory=dict)
    """The fused model against each other system, by its name."""
    speed: SpeedBuild | None = None
    """None if the recipe does not ask for it."""

    @property
    def systems(self) -> list[str]:
        """Systems in the order of the table's columns: base, oracle, fused, then the others.

        Systems of conversations only are left out; they have a table of their own.
        """
        rows = [row for task, row in self.scores.items() if task not in self.conversations]
        return _in_order(system for row in rows or self.scores.values() for system in row)

    @property
    def conversations(self) -> dict[str, dict[str, Score]]:
        """The scores of conversations by task and system, each with its turns; systems in order."""
        return {
            task: {system: row[system] for system in _in_order(row)}
            for task, row in self.scores.items()
            if row[FUSED].turns
        }

    def mean(self, system: str) -> float | None:
        """The mean over the experts' own tasks; None if it was not measured on all of them."""
        values = [
            row[system].value
            for task, row in self.scores.items()
            if task in self.own and system in row
        ]
        return sum(values) / len(values) if values and len(values) == len(self.own) else None

    def mark(self, task: str, other: str) -> str:
        """The mark of the fused model's difference from another system; empty if not tested."""
        tested = self.comparisons[other].differences if other in self.comparisons else ()
        higher_is_better = self.scores[task][FUSED].higher_is_better
        marks = (one.mark(higher_is_better=higher_is_better) for one in tested if one.task == task)
        return next(marks, "")

    def losses(self) -> list[tuple[str, str, Difference]]:
        """Task, other system and difference wherever the fused model is worse beyond chance."""
        return [
            (one.task, other, one)
            for other, comparison in self.comparisons.items()
            for one in comparison.differences
            if self.mark(one.task, other) == "-"
        ]


def _in_order(systems: Iterable[str]) -> list[str]:
    there = dict.fromkeys(systems)
    first = [system for system in (BASE, ORACLE, FUSED) if system in there]
    return first + [system for system in there if system not in first]


def summarise(ledger: Ledger, plan: Plan, base_folder: Path | None) -> Summary | None:
    """The summary of a plan; None if a result that the plan asks for is not in the ledger.

    Args:
        base_folder: of the base, whose size is a part of the summary if it is here

    Raises:
        JudgedError: a recorded score was judged by another metric than the plan's.
    """
    gates = ledger.built_as(RouterBuild, plan.router.id)
    routing = ledger.built_as(RoutingBuild, plan.routing.id)
    if gates is None or (routing is None and plan.watches_routing):
        return None
    scores: dict[str, dict[str, Score]] = {}
    matrix: dict[str, dict[str, Score]] = {}
    recorded = judged_scores(ledger, (one.spec.id for one in plan.measurements), plan.judges)
    for measurement in plan.measurements:
        score = recorded.get(measurement.spec.id)
        if score is None:
            return None
        row = _row(measurement, plan)
        if measurement.system.startswith("expert:"):
            matrix.setdefault(row, {})[measurement.adapter] = score
        else:
            scores.setdefault(row, {})[measurement.system] = score
    comparisons = {}
    for spec in plan.comparisons:
        made = ledger.built_as(ComparisonBuild, spec.id)
        if made is None:
            return None
        comparisons[spec.other] = made
    speed = ledger.built_as(SpeedBuild, plan.speed.id) if plan.speed else None
    if plan.speed and speed is None:
        return None
    stored = {
        "experts": ledger.weights_of(plan.fused.id),
        "gates": gates.weights_sha256 if plan.router.router in WITH_GATES else None,
        "statistics": gates.statistics_sha256,
    }
    paths = {name: ledger.blobs.place_of(sha256) for name, sha256 in stored.items() if sha256}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    if base_folder is not None:
        sizes["base"] = sum(path.stat().st_size for path in base_folder.glob("*.safetensors"))
    return Summary(
        scores=scores,
        gates=gates,
        routing=routing,
        sizes=sizes,
        own=frozenset(task.name for task in plan.tasks.values() if task.expert),
        matrix=matrix,
        comparisons=comparisons,
        speed=speed,
    )


def _row(measurement: Measurement, plan: Plan) -> str:
    """The key in `Summary.scores`: the task, with the metric if that is not its first."""
    task, metric = measurement.spec.task, measurement.spec.metric
    return task if metric == plan.tasks[task].metrics[0] else f"{task}: {metric}"
