"""Two checkpoints side by side: the differences in experts, router and scores. A is the older one.

Experts, options and sizes come from the checkpoints' own files, the rest from the ledger.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from meteora.artifacts import (
    ArtifactId,
    ComparisonBuild,
    ComparisonSpec,
    Difference,
    Score,
    ScorePair,
    short,
)
from meteora.checkpoint.manifest import TENSORS, ExpertEntry, Manifest, read_manifest
from pipelines.reports.queries import ROUTER_ID, QueryResult, ReportError, ask_queries
from pipelines.scoring.compare import compare, recorded_scores, scores_in_common
from store.ledger import Ledger

LABELS = ("A", "B")
COSTS = (
    ("sizes", "{}", "{:.1f} MB", 1e6),
    ("seconds", "time: {}", "{:.1f} s", 1),
    ("slowdown", "{}: time, × base", "{:.2f}", 1),
)
"""The costs: attribute of `Side`, name on the page, number format, and divisor."""
SHOWN = 16
"""The characters of a revision or a hash to show."""


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    label: str
    """`A` or `B`."""
    manifest: Manifest
    sizes: Mapping[str, int]
    """The bytes of its files of tensors, by name."""
    results: Mapping[str, QueryResult]
    """The results of a report's queries."""
    tasks: Sequence[str]
    """All tasks with scores of it."""

    @property
    def name(self) -> str:
        return short(self.manifest.router_id)

    @property
    def accuracy(self) -> float | None:
        """The share of tokens that reach their own expert, over all modules."""
        return self.results["overall"].rows[0]["accuracy"]

    @property
    def by_expert(self) -> dict[str, float]:
        """The share of tokens that reach their own expert, by expert."""
        return {row["expert"]: row["accuracy"] for row in self.results["accuracy"].rows}

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of the fit of its gates and of each stage of its run."""
        router = self.results["router"].rows
        fit = {"fit": router[0]["wall_seconds"]} if router else {}
        return fit | {row["stage"]: row["wall_seconds"] for row in self.results["stages"].rows}

    @property
    def slowdown(self) -> dict[str, float]:
        """Its time over the base's, in prefill and decode; empty if not measured."""
        return {row["phase"]: row["ratio"] for row in self.results["speed"].rows}


class ExpertChange(NamedTuple):
    """An expert of either side: its number on each, from 1, and its change."""

    name: str
    a: int | None
    b: int | None
    change: str
    """Empty if both have the same adapter."""


class ScoreRow(NamedTuple):
    """One task and metric with scores of both."""

    name: str
    """The task, with the metric if that is not its first, as in `Summary`."""

    a: Score
    b: Score
    difference: Difference
    """B minus A."""
    mark: str
    """`+` if B is better beyond chance, `-` if it is worse, else empty."""


@dataclass(frozen=True)
class SideBySide:
    """Both sides, and the differences of their scores on the same rows."""

    a: Side
    b: Side
    rows: tuple[ScoreRow, ...]
    build: ComparisonBuild | None
    """Over the first metric of each task, with the mean; None without a task in common."""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.a, self.b

    @property
    def experts(self) -> list[ExpertChange]:
        """All experts of both, in A's order and then in B's."""
        a, b = ({e.name: e for e in side.manifest.experts} for side in self.sides)
        names = list(dict.fromkeys([*a, *b]))
        return [
            ExpertChange(name, _place(name, a), _place(name, b), _change(name, a, b))
            for name in names
        ]

    @property
    def options(self) -> list[tuple[str, Any, Any]]:
        """The differences in base, router and gates: name, A's value, B's value."""
        a, b = (_options(side.manifest) for side in self.sides)
        return [
            (name, a.get(name), b.get(name))
            for name in dict.fromkeys([*a, *b])
            if a.get(name) != b.get(name)
        ]

    @property
    def costs(self) -> list[tuple[str, list[str]]]:
        """Each size and time, as text, of A and of B."""
        found = []
        for which, text, form, unit in COSTS:
            of_sides = [getattr(side, which) for side in self.sides]
            found += [
                (
                    text.format(name),
                    [form.format(own[name] / unit) if name in own else "–" for own in of_sides],
                )
                for name in dict.fromkeys(name for own in of_sides for name in own)
            ]
        return found

    @property
    def unmeasured(self) -> dict[str, list[str]]:
        """The tasks that only the other side has scores on, by label."""
        common = {row.a.spec.task for row in self.rows}
        found = {
            side.label: [task for task in other.tasks if task not in common]
            for side, other in (self.sides, self.sides[::-1])
        }
        return {label: tasks for label, tasks in found.items() if tasks}

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Conversations turn by turn, in rows as the query `conversations` gives them."""
        return [
            {
                "task": score.spec.task,
                "system": label,
                "num_conversations": score.num_samples,
                **turn.to_dict(),
            }
            for row in self.rows
            if row.name == row.a.spec.task  # turns are alike in all metrics
            for label, score in zip(LABELS, (row.a, row.b), strict=True)
            for turn in score.turns
        ]

    def to_dict(self) -> dict[str, Any]:
        """All facts as JSON types, for programs."""
        return {
            **{side.label.lower(): _facts(side) for side in self.sides},
            "experts": [one._asdict() for one in self.experts],
            "options": [dict(zip(("name", "a", "b"), one, strict=True)) for one in self.options],
            "scores": [
                {
                    "task": row.a.spec.task,
                    "metric": row.a.spec.metric,
                    "num_samples": row.a.num_samples,
                    "a": _interval(row.a),
                    "b": _interval(row.b),
                    "difference": _interval(row.difference, row.difference.difference),
                    "p_value": row.difference.p_value,
                    "p_holm": row.difference.p_holm,
                    "test": row.difference.test,
                    "differs": row.mark,
                }
                for row in self.rows
            ],
            "mean_difference": _interval(self.build, self.build.mean_difference)
            if self.build
            else None,
            "unmeasured": self.unmeasured,
        }


def compare_checkpoints(ledger: Ledger, a: Path, b: Path) -> SideBySide:
    """Read both checkpoints, and test their scores against each other.

    Raises:
        CheckpointError: One of the folders is not a checkpoint.
        ReportError: Both are the same, or one does not say which router it has.
    """
    ledger.ingest()
    manifests = [read_manifest(folder) for folder in (a, b)]
    ids = [ArtifactId(manifest.router_id) for manifest in manifests]
    for folder, router_id in zip((a, b), ids, strict=True):
        if not ROUTER_ID.fullmatch(router_id):
            raise ReportError(
                f"{folder}: its meteora.json names no router, so nothing is recorded of it; build"
                " it again"
            )
    if ids[0] == ids[1]:
        raise ReportError(
            f"{a} and {b} are the same checkpoint, {short(ids[0])}; give two that differ"
        )
    sides = [
        Side(
            label,
            manifest,
            {name: (folder / name).stat().st_size for name in TENSORS if (folder / name).is_file()},
            ask_queries(ledger, router_id),
            list(dict.fromkeys(one.spec.task for one in recorded_scores(ledger, router_id))),
        )
        for label, manifest, folder, router_id in zip(LABELS, manifests, (a, b), ids, strict=True)
    ]
    base = manifests[1].base.spec
    by_task = scores_in_common(ledger, *ids, base.id)
    if not by_task:
        return SideBySide(*sides, (), None)
    named = {
        f"{task}: {pair[0].spec.metric}" if number else task: pair
        for task, pairs in by_task.items()
        for number, pair in enumerate(pairs)
    }
    tested = compare(ledger, _comparison(ids[1], named.values()))
    rows = (
        ScoreRow(
            name,
            *pair,
            difference,
            difference.mark(higher_is_better=pair[1].higher_is_better),
        )
        for (name, pair), difference in zip(named.items(), tested.differences, strict=True)
    )
    firsts = compare(ledger, _comparison(ids[1], [pairs[0] for pairs in by_task.values()]))
    return SideBySide(*sides, tuple(rows), firsts)


def _comparison(b: ArtifactId, pairs: Iterable[tuple[Score, Score]]) -> ComparisonSpec:
    """B against A, over pairs of scores of A and B."""
    chosen = tuple(ScorePair(other.spec.id, one.spec.id) for one, other in pairs)
    return ComparisonSpec(b, LABELS[1], LABELS[0], chosen)


def _place(name: str, experts: Mapping[str, ExpertEntry]) -> int | None:
    return [*experts].index(name) + 1 if name in experts else None


def _change(name: str, a: Mapping[str, ExpertEntry], b: Mapping[str, ExpertEntry]) -> str:
    """The change of an expert in a few words; empty if there is none."""
    if name in a and name in b:
        one, other = a[name], b[name]
        if one.adapter_id == other.adapter_id:
            return ""
        return f"another adapter: {_source(one)}, then {_source(other)}"
    label, (mine, others) = (LABELS[0], (a, b)) if name in a else (LABELS[1], (b, a))
    called = [e.name for e in others.values() if e.adapter_id == mine[name].adapter_id]
    elsewhere = f"; the other calls the same adapter {called[0]}" if called else ""
    return f"only in {label}{elsewhere}"


def _source(expert: ExpertEntry) -> str:
    return f"{expert.source}@{expert.revision.removeprefix('sha256:')[:SHOWN]} of rank {expert.r}"


def _options(manifest: Manifest) -> dict[str, Any]:
    """The values of a checkpoint's base, router and gates, by name."""
    base = {"base": manifest.base.repo_id, "base's revision": manifest.base.revision}
    gates = {f"gates: {name}": value for name, value in manifest.gates.items()}
    found = base | asdict(manifest.router) | gates | {"routed modules": len(manifest.modules)}
    return {name: value for name, value in found.items() if value not in (None, "")}


def _facts(side: Side) -> dict[str, Any]:
    return {
        "router_id": side.manifest.router_id,
        "experts": side.manifest.names,
        "routing_accuracy": side.accuracy,
        "num_bytes": dict(side.sizes),
        "seconds": side.seconds,
        "slowdown": side.slowdown,
    }


def _interval(found: Any, value: float | None = None) -> dict[str, float]:  # noqa: ANN401  (three nouns with an interval)
    return {"value": found.value if value is None else value, "low": found.low, "high": found.high}
