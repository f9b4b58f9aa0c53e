"""The SQL queries of a report, and their results.

The queries are in `queries.sql`; each is about one routed model. A report shows the SQL beside each
result, so a reader who has the ledger can run it again.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from meteora.artifacts import ArtifactId, MeteoraError, short
from meteora.artifacts.scores import mark_of
from meteora.base.sources import PATH
from store.ledger import Ledger
from store.query import Answer, titled

ROUTER_ID = re.compile(r"router:[0-9a-f]{64}")


class ReportError(MeteoraError):
    """There is nothing to report."""


@dataclass(frozen=True)
class QueryResult:
    """A query, and the ledger's answer to it."""

    name: str
    title: str
    sql: str
    """The SQL, with the router's id."""
    answer: Answer

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Each row as a mapping from column to value."""
        return self.answer.dicts


@dataclass(frozen=True)
class Comparison:
    """The fused model against another system, over the tasks with scores of both."""

    other: str
    better: tuple[str, ...]
    """Tasks on which the fused model is better beyond chance."""
    worse: tuple[str, ...]
    """Tasks on which it is worse beyond chance."""
    num_tasks: int
    num_rows: int
    """Rows of all of these tasks; a composite or a conversation is one."""
    mean: float
    """Mean over the tasks of the difference, fused minus other, in the unit of each metric; where
    lower is better, other minus fused."""


def load_queries() -> list[tuple[str, str, str]]:
    """Name, title and SQL of each query of `queries.sql`."""
    text = resources.files("pipelines.reports").joinpath("queries.sql").read_text(encoding="utf-8")
    found = []
    for head, sql in titled(text):
        name, _, title = head.partition(": ")
        found.append((name, title, sql.removesuffix(";")))
    return found


def run_queries(ledger: Ledger, router_id: ArtifactId, called: str = "") -> dict[str, QueryResult]:
    """The result of every query, by its name.

    Args:
        called: the person's name for the checkpoint, for messages

    Raises:
        ReportError: the id is not a router's, or the ledger has no scores of this router.
    """
    if not ROUTER_ID.fullmatch(router_id):
        raise ReportError(
            f"{short(router_id)} is not a routed model; give the id of one, as `meteora run` prints"
        )
    ledger.ingest()
    results = ask_queries(ledger, router_id)
    if not results["scores"].rows:
        raise ReportError(
            f"the ledger in {ledger.home} holds no scores of {short(router_id)}; measure it with"
            f" `meteora benchmark {called or short(router_id)}`, with rows as --tasks"
            " NAME=jsonl:FILE where its recipe has no tests, or give the --home in which it was"
            " measured"
        )
    if not all(results[name].rows for name in ("base", "router", "lineage")):
        raise ReportError(
            f"the ledger in {ledger.home} lacks records of what {short(router_id)} was made of;"
            " `meteora verify` names what is damaged"
        )
    return results


def ask_queries(ledger: Ledger, router_id: ArtifactId) -> dict[str, QueryResult]:
    """The result of every query, by its name; without rows if nothing is recorded."""
    results = {}
    for name, title, sql in load_queries():
        literal = sql.replace("$router", f"'{router_id}'")
        results[name] = QueryResult(name, title, literal, ledger.query(literal))
    return results


def base_name(results: Mapping[str, QueryResult]) -> str:
    """The base's name without its owner, package or kind."""
    base = str(results["base"].rows[0]["base_model"])
    return re.sub(r"\.gguf$", "", base.rpartition("/")[2].removeprefix(PATH))


def compare_systems(differences: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The results of the paired tests, one for each other system: rows of `differences`."""
    found = []
    for other in dict.fromkeys(row["other"] for row in differences):
        rows = [row for row in differences if row["other"] == other]
        tasks: dict[str, list[str]] = {"+": [], "-": [], "": []}
        total = 0.0
        for row in rows:
            apart, higher = row["difference"], row["higher_is_better"]
            tasks[mark_of(apart, row["p_holm"], higher_is_better=higher)].append(row["task"])
            total += apart if higher else -apart
        found.append(
            Comparison(
                other,
                tuple(tasks["+"]),
                tuple(tasks["-"]),
                len(rows),
                sum(row["num_samples"] for row in rows),
                total / len(rows),
            )
        )
    return found


def by_turn(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the query `conversations` by task, and in each task a line for each system."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault(row["system"], []).append(row)
    return [
        {
            "task": task,
            "num_conversations": rows[0]["num_conversations"],
            "lines": [
                {
                    "system": system,
                    "values": [turn["value"] for turn in turns],
                    "computed_tokens": sum(turn["computed_tokens"] for turn in turns),
                    "seconds": sum(turn["seconds"] for turn in turns),
                }
                for system, turns in systems.items()
            ],
        }
        for task, systems in found.items()
        for rows in [next(iter(systems.values()))]
    ]
