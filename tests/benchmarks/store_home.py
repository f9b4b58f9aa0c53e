"""A home of millions of scores, as years of nightly runs would leave it, packed into segments.

Each record is the text that `Record` writes of a noun whose names are marks, and SQL puts names and
numbers for the marks: so ten million take minutes, and each is what a `Ledger` would have written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from meteora.artifacts import (
    ArtifactId,
    FusedSpec,
    RouterBuild,
    RouterSpec,
    RoutingScore,
    file_sha256,
)
from store.events import AdapterVerdict, Failure, RunStarted
from store.files import partial_file, settle
from store.query import memory, quoted
from store.records import Record
from store.segments import ROW_GROUP_RECORDS, SEGMENT_RECORDS, SUFFIX
from tests.store.conftest import BASE, adapter, benchmark, score

NUM_EXPERTS = 16
ROUTERS_A_STACK = 15
ROUTERS_A_RUN = 30
TASKS_AN_ADAPTER = 16
NUM_TASKS = 128
NUM_RECIPES = 100
MACROS = """
CREATE MACRO named(what, n) AS what || ':' || sha256(what || n);
CREATE MACRO moment(n) AS
    strftime(TIMESTAMP '2020-01-01' + to_seconds(n), '%Y-%m-%dT%H:%M:%S.%fZ');
"""


@dataclass(frozen=True)
class Size:
    """How many of what."""

    num_artifacts: int
    num_scores: int

    @property
    def num_adapters(self) -> int:
        return self.num_artifacts // 25

    @property
    def num_stacks(self) -> int:
        return (self.num_artifacts - self.num_adapters) // (ROUTERS_A_STACK + 1)

    @property
    def num_routers(self) -> int:
        return self.num_artifacts - 1 - self.num_adapters - self.num_stacks

    @property
    def num_runs(self) -> int:
        return self.num_routers // ROUTERS_A_RUN + 1

    @property
    def scores_a_router(self) -> int:
        """What is left when the base and the adapters have theirs."""
        rest = self.num_scores - NUM_TASKS - TASKS_AN_ADAPTER * self.num_adapters
        return min(rest // self.num_routers, NUM_TASKS)

    @property
    def is_enough(self) -> bool:
        """Whether there is one of each kind."""
        return self.num_adapters > 0 and self.scores_a_router > 0


@dataclass(frozen=True)
class Kind:
    """Records of one kind: a text with marks, and what SQL puts for each, by the number `n`."""

    count: int
    record: Record
    marks: dict[str, str]
    """Besides `@id@`, `@run@` and `@at@`, which every kind has."""
    subject: str = "''"
    at: str = "n"
    run: str = "'run-0'"

    def sql(self, start: int, end: int) -> str:
        text = "'" + self.record.to_bytes().decode().replace("'", "''") + "'"
        marks = {"@at@": f"moment({self.at})", "@run@": self.run, **self.marks}
        for mark, value in {**marks, "@id@": self.subject}.items():
            text = f"replace({text}, '{mark}', ({value})::VARCHAR)"
        return f"SELECT {text} AS text FROM range({start}, {end}) AS numbers(n)"  # noqa: S608


def make_home(home: Path, size: Size) -> int:
    """Write the records of a large home; return how many there are."""
    kinds = _kinds(size)
    with memory() as connection:
        connection.execute(MACROS)
        for kind in kinds:
            for start in range(0, kind.count, SEGMENT_RECORDS):
                end = min(start + SEGMENT_RECORDS, kind.count)
                _write(connection, home / "records" / "packed", kind.sql(start, end))
    return sum(kind.count for kind in kinds)


def _write(connection: duckdb.DuckDBPyConnection, root: Path, sql: str) -> None:
    with partial_file(root) as partial:
        connection.execute(
            "COPY (SELECT sha256(text) AS sha256, text->>'kind' AS kind,"  # noqa: S608
            f" text->>'subject' AS subject, text FROM ({sql}) ORDER BY sha256)"
            f" TO {quoted(partial)}"
            f" (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP_RECORDS})"
        )
        settle(partial, root / (file_sha256(partial) + SUFFIX), root=root)


def _kinds(size: Size) -> list[Kind]:
    of_run = f"'run-' || (n // {ROUTERS_A_RUN})"
    adapter_id, stack_id, router_id = (
        "named('adapter', n)",
        "named('fused', n)",
        "named('router', n)",
    )
    stack, marks = _stack(size)
    router = RouterSpec(ArtifactId("@stack@"), "gate", 1, 1.0, "calibrate", "e" * 64, 777777)
    verdict = AdapterVerdict(
        "task-@n@", "some/lora-@n@@main", "some/lora-@n@", "c" * 40, "accept", (), "mit", "someone",
        "", ArtifactId("@id@"),
    )  # fmt: skip
    started = RunStarted("run-0", "recipe-@n@", "9" * 64, {"torch": "2.13.0"}, "cpu").to_dict()
    ended = {
        "run_id": "@run@", "outcome": "ok", "reason": "", "wall_seconds": 2999.0,
        "stages": [{"stage": "gates", "wall_seconds": 2900.0}],
    }  # fmt: skip
    counts = [
        RoutingScore(ArtifactId("@router@"), f"model.layers.{layer}.q_proj", "a", chosen, 90)
        for layer in range(30)
        for chosen in "ab"
    ]
    routed = {"counts": [count.to_dict() for count in counts]}
    publication = {"artifact_id": "@router@", "repo_id": "some/model-@n@", "revision": "c" * 40}
    failure = Failure("check", "some/lora-@n@", "AdapterError", "it uses DoRA").to_dict()
    run = {"subject": "'run-' || n", "run": "'run-' || n"}
    return [
        Kind(1, _artifact(BASE, BASE.id), {}, f"'{BASE.id}'"),
        Kind(
            size.num_adapters, _artifact(adapter(1), "@id@"),
            {f"{1:064x}": "sha256('weights' || n)"}, adapter_id,
        ),
        Kind(size.num_adapters, _record("adapter", verdict.to_dict()), {"@n@": "n"}, adapter_id),
        Kind(size.num_stacks, _artifact(stack, "@id@"), marks, stack_id),
        Kind(
            size.num_routers,
            _artifact(router, "@id@", RouterBuild(router, "", 5012, 0.93, 12.5, "cpu")),
            {"@stack@": f"named('fused', n % {size.num_stacks})", "777777": "n"},
            router_id, "n * 100", of_run,
        ),
        Kind(
            size.num_runs, _record("run-started", started | {"run_id": "@run@"}),
            {"@n@": f"n % {NUM_RECIPES}"}, at="n * 3000", **run,
        ),
        Kind(size.num_runs, _record("run-ended", ended), {}, at="n * 3000 + 2999", **run),
        Kind(
            size.num_runs, _record("routing", routed),
            {"@router@": f"named('router', n * {ROUTERS_A_RUN})"},
            f"named('router', n * {ROUTERS_A_RUN})", "n * 3000 + 90", "'run-' || n",
        ),
        Kind(
            size.num_runs, _record("publication", publication),
            {"@router@": f"named('router', n * {ROUTERS_A_RUN})", "@n@": "n"},
            "'publication ' || n", "n * 3000 + 91", "'run-' || n",
        ),
        Kind(
            size.num_runs, _record("failure", failure),
            {"@n@": "n"}, "'some/lora-' || n", "n * 3000 + 92", "'run-' || n",
        ),
        _scores(NUM_TASKS, "base", f"'{BASE.id}'", "n"),
        _scores(
            size.num_adapters * TASKS_AN_ADAPTER, "adapter",
            f"named('adapter', n % {size.num_adapters})",
            f"(n + n // {size.num_adapters}) % {NUM_TASKS}",
        ),
        _scores(
            size.num_routers * size.scores_a_router, "router",
            f"named('router', n // {size.scores_a_router})",
            f"(n % {size.scores_a_router} + n // {size.scores_a_router}) % {NUM_TASKS}",
            f"n // {size.scores_a_router} * 100 + 50",
            f"'run-' || (n // {size.scores_a_router * ROUTERS_A_RUN})",
        ),
    ]  # fmt: skip


def _record(kind: str, body: dict[str, Any], blobs: tuple[str, ...] = ()) -> Record:
    return Record(kind, "@id@", body, "@run@", "@at@", blobs)


def _artifact(spec: Any, artifact_id: str, built: Any = None) -> Record:
    body = {
        "id": artifact_id, "kind": spec.kind, "spec": spec.to_dict(), "parents": list(spec.parents),
        "weights_sha256": "", "built": built.to_dict() if built else None,
    }  # fmt: skip
    return _record("artifact", body)


def _stack(size: Size) -> tuple[FusedSpec, dict[str, str]]:
    places = range(NUM_EXPERTS)
    names = tuple(f"task-@n{place}@" for place in places)
    stack = FusedSpec(BASE.id, names, tuple(ArtifactId(f"@a{place}@") for place in places))
    marks = {}
    for place in places:
        number = f"((n * {NUM_EXPERTS} + {place}) % {size.num_adapters})"
        marks |= {
            f"@n{place}@": f"{number} % {NUM_TASKS}",
            f"@a{place}@": f"named('adapter', {number})",
        }
    return stack, marks


def _scores(
    count: int, whose: str, subject: str, task: str, at: str = "n", run: str = "'run-0'"
) -> Kind:
    spec = benchmark(ArtifactId("@subject@"), "task-@task@")
    body = {"id": "@id@", **score(spec, 0.515625, "@outputs@").to_dict()}
    marks = {
        "@subject@": subject,
        "@task@": task,
        "@outputs@": f"sha256('{whose}' || n)",
        "0.515625": "0.5 + (hash(n) % 150000) / 2500000",
    }
    record = _record("score", body, ("@outputs@",))
    return Kind(count, record, marks, f"named('benchmark', '{whose}' || n)", at, run)
