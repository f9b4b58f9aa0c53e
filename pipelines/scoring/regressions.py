"""What a new checkpoint scores beside the one that its recipe gave before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meteora.artifacts import ArtifactId
    from store.ledger import Ledger


@dataclass(frozen=True)
class Change:
    task: str
    metric: str
    value: float
    previous: float
    worse: bool
    """By more than 1.96 standard errors of the difference."""


def since_last(ledger: Ledger, router_id: ArtifactId) -> list[Change]:
    """Each score of a router that its recipe's last router has, too, on the same rows."""
    answer = ledger.query(
        "SELECT task, metric, value, previous_value, worse FROM changes"  # noqa: S608  (a hash)
        f" WHERE subject_id = '{router_id}' ORDER BY task, metric"
    )
    return [Change(*row) for row in answer.rows]


def told(changes: Sequence[Change]) -> list[str]:
    """The comparison in sentences; empty where there was nothing before."""
    if not changes:
        return []
    worse = [one for one in changes if one.worse]
    lines = [
        f"Worse than the last checkpoint on {one.task}: {one.metric} {one.value:.3f}, it"
        f" was {one.previous:.3f}."
        for one in worse
    ]
    moved = [one for one in changes if one.value != one.previous and not one.worse]
    lines += [
        f"{one.task}: {one.metric} {one.value:.3f}, it was {one.previous:.3f}" for one in moved
    ]
    return lines or [f"The last checkpoint scored the same on all {len(changes)} tasks."]
