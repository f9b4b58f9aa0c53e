"""What a run comes to, read from the ledger: the same numbers for the terminal and for the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.artifacts import RouterBuild, RoutingBuild, Score

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.plan import Plan
    from store.ledger import Ledger

SHORTFALL = 0.05
"""A task on which the fused model lies further than this below the oracle is named."""


@dataclass(frozen=True)
class Summary:
    scores: Mapping[str, Mapping[str, Score]]
    """By task, then by system."""
    gates: RouterBuild
    routing: RoutingBuild | None
    """None where no expert has test rows."""
    sizes: Mapping[str, int]
    """Bytes of what is stored, by name."""

    @property
    def systems(self) -> list[str]:
        """In the order in which they are compared: base, oracle, fused, then the others."""
        there = dict.fromkeys(system for row in self.scores.values() for system in row)
        first = [system for system in ("base", "oracle", "fused") if system in there]
        return first + [system for system in there if system not in first]

    def mean(self, system: str) -> float | None:
        """The mean over the tasks that every system was measured on."""
        values = [
            row[system].value for row in self.scores.values() if row.keys() >= set(self.systems)
        ]
        return sum(values) / len(values) if values else None

    def shortfalls(self) -> list[tuple[str, float, float]]:
        """Tasks where the fused model misses the oracle by more than `SHORTFALL`: both scores."""
        return [
            (task, row["fused"].value, row["oracle"].value)
            for task, row in self.scores.items()
            if "oracle" in row and row["oracle"].value - row["fused"].value > SHORTFALL
        ]


def summarise(ledger: Ledger, plan: Plan, base_folder: Path) -> Summary | None:
    """The summary of a plan; None while something that it asks for is not in the ledger."""
    gates = ledger.built(plan.router.id)
    routing = ledger.built(plan.routing.id)
    owns_tests = any(name in plan.tests for name in plan.fused.names)
    scores: dict[str, dict[str, Score]] = {}
    for measurement in plan.measurements:
        score = ledger.score_of(measurement.spec.id)
        if score is None:
            return None
        scores.setdefault(score.spec.task, {})[measurement.system] = score
    if gates is None or (routing is None and owns_tests):
        return None
    stored = {
        "experts": ledger.weights_of(plan.fused.id),
        "gates": gates["weights_sha256"] if plan.router.router == "gate" else None,
    }
    paths = {name: ledger.blobs.path_of(sha256) for name, sha256 in stored.items() if sha256}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    sizes["base"] = sum(path.stat().st_size for path in base_folder.glob("*.safetensors"))
    return Summary(
        scores=scores,
        gates=RouterBuild.from_dict(gates),
        routing=RoutingBuild.from_dict(routing) if routing else None,
        sizes=sizes,
    )
