"""The questions that a report answers, put to the ledger; and what their answers come to.

The questions are SQL in `queries.sql`, about one routed model. A report shows each of them beside
what it gave, so whoever has the ledger can ask again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from meteora.artifacts import MeteoraError, short

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meteora.artifacts import ArtifactId
    from store.ledger import Ledger
    from store.query import Answer

ROUTER_ID = re.compile(r"router:[0-9a-f]{64}")
SIGNIFICANT = 0.05
"""A difference whose corrected p lies below this is one beyond chance."""


class ReportError(MeteoraError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class Asked:
    """A question, as anyone can put it to the ledger, and the ledger's answer."""

    name: str
    title: str
    sql: str
    answer: Answer

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip(self.answer.columns, row, strict=True)) for row in self.answer.rows]


@dataclass(frozen=True)
class Against:
    """How the fused model stands against one other system, over the tasks that both were asked."""

    other: str
    better: tuple[str, ...]
    """Tasks on which it is better beyond chance."""
    worse: tuple[str, ...]
    num_tasks: int
    mean: float
    """Mean difference over the tasks, where they share a metric."""


def questions() -> list[tuple[str, str, str]]:
    """Name, title and SQL of each question of `queries.sql`."""
    text = resources.files("pipelines.reports").joinpath("queries.sql").read_text(encoding="utf-8")
    found = []
    for block in text.split("\n\n-- ")[1:]:
        head, _, sql = block.strip().partition("\n")
        name, _, title = head.partition(": ")
        found.append((name, title, sql.removesuffix(";")))
    return found


def ask(ledger: Ledger, router_id: ArtifactId) -> dict[str, Asked]:
    """Every question's answer, by its name.

    Raises:
        ReportError: the ledger knows no scores of this router.
    """
    if not ROUTER_ID.fullmatch(router_id):
        raise ReportError(
            f"{short(router_id)} is not a routed model; give the id of one, as `meteora run` prints"
        )
    ledger.ingest()
    asked = {}
    for name, title, sql in questions():
        literal = sql.replace("$router", f"'{router_id}'")
        asked[name] = Asked(name, title, literal, ledger.query(literal))
    if not asked["scores"].rows:
        raise ReportError(
            f"the ledger under {ledger.home} holds no scores of {short(router_id)}; give the --home"
            " that it was measured in, or run its recipe here"
        )
    return asked


def title(asked: Mapping[str, Asked]) -> str:
    base = str(asked["base"].rows[0]["base_model"])
    name = re.sub(r"\.gguf$", "", base.rpartition("/")[2].removeprefix("path:"))
    return f"{len(asked['experts'].rows)} experts on {name}"


def against(differences: Sequence[Mapping[str, Any]]) -> list[Against]:
    """What the paired tests come to, by the other system."""
    found = []
    for other in dict.fromkeys(row["other"] for row in differences):
        rows = [row for row in differences if row["other"] == other]
        beyond = [row for row in rows if row["p_holm"] < SIGNIFICANT and row["difference"]]
        better = [
            r for r in beyond if (r["difference"] > 0) is (r["higher_is_better"] is not False)
        ]
        found.append(
            Against(
                other,
                tuple(row["task"] for row in better),
                tuple(row["task"] for row in beyond if row not in better),
                len(rows),
                sum(row["difference"] for row in rows) / len(rows),
            )
        )
    return found
