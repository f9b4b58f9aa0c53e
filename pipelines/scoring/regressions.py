"""Whether a new checkpoint is worse than the previous one of the same recipe."""

from collections.abc import Sequence
from dataclasses import dataclass

from meteora.artifacts import ArtifactId
from pipelines.scoring.intervals import difference
from store.ledger import Ledger


@dataclass(frozen=True)
class Change:
    """One score of a checkpoint, and the same score of the previous one."""

    task: str
    metric: str
    value: float
    previous: float
    worse: bool
    """Whether it is worse beyond chance; see `changes` in the ledger."""

    def describe(self) -> str:
        before = "Worse than the last checkpoint on " if self.worse else ""
        return f"{before}{self.task}: {self.metric} {self.value:.3f}, it was {self.previous:.3f}."


def since_last(ledger: Ledger, router_id: ArtifactId) -> list[Change]:
    """The scores that this router and the recipe's previous router both have, on the same rows."""
    answer = ledger.query(
        "SELECT task, metric, value, previous_value, worse FROM changes"  # noqa: S608  (a hash)
        f" WHERE subject_id = '{router_id}' ORDER BY task, metric"
    )
    return [Change(*row) for row in answer.rows]


def describe(changes: Sequence[Change]) -> list[str]:
    """The changes as sentences, the worse ones first; empty if there is no previous checkpoint."""
    if not changes:
        return []
    others = [one for one in changes if difference(one.value, one.previous) and not one.worse]
    lines = [one.describe() for one in (*(one for one in changes if one.worse), *others)]
    number = len({one.task for one in changes})
    where = "its task" if number == 1 else f"all {number} tasks"
    return lines or [f"The last checkpoint scored the same on {where}."]
