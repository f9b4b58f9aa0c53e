"""Rows are what their records say, field by field, in whatever order the records came."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from meteora.artifacts import (
    AdapterModule,
    BaseSpec,
    BuiltBase,
    Fingerprint,
    Rate,
    RoutingBuild,
    RoutingDetail,
    RoutingSpec,
    RoutingSwitch,
    SpeedBuild,
    SpeedSpec,
)
from store.events import AdapterVerdict
from store.intake import add, offer_texts
from store.query import memory
from store.records import Record
from tests.store.test_views import migrated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from meteora.artifacts import Noun
    from tests.store.conftest import Shelf

    Row = Mapping[str, Any]

START = "2026-02-01T00:00:00"
SIZE = Fingerprint("LlamaForCausalLM", 32, 48, 2, 4, 4, 259, "f" * 64)
EVENTS = ("adapter", "failure")
"""Each record of these kinds counts; of routing the latest about a subject, else the earliest."""
TABLES = {
    "artifact base": "base_models", "artifact adapter": "adapter_weights",
    "artifact router": "routers", "artifact pool": "pools", "artifact merge": "merges",
    "score": "scores", "adapter": "verdicts", "run-started": "run_starts",
    "run-ended": "run_ends", "publication": "published", "failure": "failed",
}  # fmt: skip
"""A row for each record."""
LISTS = {
    "artifact pool": {"shares": "pool_shares"},
    "artifact comparison": {"differences": "comparisons"},
    "artifact speed": {"rates": "speeds"},
    "artifact routing": {"details": "routing_details", "switches": "routing_switches"},
    "score": {"parts": "score_parts", "turns": "score_turns"},
    "routing": {"counts": "routing_counts"},
    "adapter": {"reasons": "verdict_reasons"},
    "run-ended": {"stages": "run_stages"},
}
"""A row for each entry of a list in a record."""
NAMES = {"interval": "interval_method", "count": "num_switches", "other_id": "other_score_id"}
"""Fields whose columns have another name."""
LATER = ("migrations", "read_files", "rejected", "unsettled", "leaderboard_rows", "regression_rows")
"""Tables that no record has rows of its own in."""


def facts(shelf: Shelf) -> list[Record]:
    """Records with all fields that those of `fill` lack."""
    gates = shelf.router(shelf.fused(shelf.adapter(1), shelf.adapter(2)), seed=7)
    base = BaseSpec("tiny/base", "a" * 40)
    modules = tuple(AdapterModule(f"q{n}", 8, 8, n, 8.0, 1.0) for n in (4, 2, 3))
    speed, routing = SpeedSpec(gates.id, base.id, 8, 9, 1, 5), RoutingSpec(gates.id, "a" * 64)
    rates = (Rate("decode", 2.0, 1.0, 2.0, 1.0, 3.0),)
    details = (RoutingDetail("model.layers.0.q_proj", 0.5, 0.25, 0.75),)
    switches = (RoutingSwitch("x", True, 3, 5), RoutingSwitch("y", False, None, 1))
    made: list[tuple[Any, Noun | None]] = [
        (base, BuiltBase(base, "", SIZE, ())),
        (replace(shelf.adapter(1), modules=modules, stripped=("bias",)), None),
        (replace(gates, composites=(3, 2), stand_in="norm", stand_ins=("y", "x")), None),
        (routing, RoutingBuild(routing, 0.9, (), 2, 1.0, details, switches)),
        (speed, SpeedBuild(speed, rates, 1, 2, 3, 4, 5, "cpu", 1, "float32", 9.0)),
    ]
    bodies: list[tuple[str, str, dict[str, Any]]] = []
    for spec, built in made:
        body = {
            "id": spec.id,
            "kind": spec.kind,
            "spec": spec.to_dict(),
            "parents": list(spec.parents),
            "weights_sha256": "b" * 64,
            "built": built.to_dict() if built else None,
        }
        bodies.append(("artifact", spec.id, body))
    asked = replace(shelf.benchmark(gates.id, "sorting"), system_prompt="Be brief.")
    score = replace(
        shelf.score(asked, 0.5, "0" * 64), higher_is_better=False, templated=True, num_empty=1,
        num_truncated=2, mean_prompt_tokens=7.5, max_prompt_tokens=9, device="cpu",
    )  # fmt: skip
    bodies.append(("score", asked.id, {"id": asked.id, **score.to_dict()}))
    verdict = AdapterVerdict(
        "x", "o/n/deep@main", "o/n", "c" * 40, "warn", subfolder="deep", base_models=("b", "a"),
        downloads=7,
    )  # fmt: skip
    bodies.append(("adapter", "o/n/deep", verdict.to_dict()))
    return [Record(kind, subject, body, "r9", f"{START}Z") for kind, subject, body in bodies]


def told(sha256: str, record: Record) -> Iterator[tuple[str, Row]]:
    """All rows of a record, as (table, fields by name)."""
    body = record.body
    here = {"record_sha256": sha256, "recorded_at": moment(record), "run_id": record.run_id}
    yield "records", {**vars(record), **here, "sha256": sha256}
    if record.kind == "artifact":
        yield "artifacts", {**body, **here}
        yield from of_artifact(body, here)
    else:
        yield from listed(record.kind, body, {**here, **body.get("spec", {}), **body})


def of_artifact(body: Row, here: Row) -> Iterator[tuple[str, Row]]:
    built, spec, artifact_id = body["built"] or {}, body["spec"], body["id"]
    for position, parent in enumerate(body["parents"]):
        yield (
            "parents",
            {**here, "child_id": artifact_id, "parent_id": parent, "position": position},
        )
    for position, name in enumerate(spec.get("names", ())):
        expert = {"position": position, "name": name, "adapter_id": spec["adapter_ids"][position]}
        yield "experts", {**here, "fused_id": artifact_id, **expert}
    if told := built.get("abstention"):
        yield "abstentions", {**here, **spec, **told}
    whole = {**built.get("fingerprint", {}), **built, **spec, "id": artifact_id, **here}
    if body["kind"] == "adapter":
        ranks = [module["r"] for module in spec["modules"]]
        whole |= {"num_modules": len(ranks), "min_r": min(ranks), "max_r": max(ranks)}
        whole["num_stripped"] = len(spec["stripped"])
    yield from listed(f"artifact {body['kind']}", built, whole)


def listed(kind: str, told: Row, whole: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """The row of a whole record, and those of the lists in it."""
    if kind in TABLES:
        yield TABLES[kind], named(whole)
    owner = {f"{kind.removeprefix('artifact ')}_id": whole.get("id")}
    for where, table in LISTS.get(kind, {}).items():
        for position, entry in enumerate(told.get(where, ())):
            yield table, named({**whole, **owner, "position": position, **entry})


def named(fields: Row) -> Row:
    return {NAMES.get(name, name): value for name, value in fields.items()}


def moment(record: Record) -> datetime:
    return datetime.fromisoformat(record.at.removesuffix("Z"))


def kept(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records that count; see `EVENTS`."""
    order = sorted(records, key=lambda sha256: (moment(records[sha256]), sha256))
    chosen: dict[tuple[str, ...], str] = {}
    for sha256 in order:
        record = records[sha256]
        key = (record.kind, record.subject, *((sha256,) if record.kind in EVENTS else ()))
        if key not in chosen or record.kind == "routing":
            chosen[key] = sha256
    return {sha256: records[sha256] for sha256 in chosen.values()}


def ancestors(parents: Iterable[Row]) -> Iterator[Row]:
    """Each artifact with all that it is made from, by the shortest way."""
    above: dict[str, list[str]] = defaultdict(list)
    for row in parents:
        above[row["child_id"]].append(row["parent_id"])
    for child in list(above):
        seen, near, depth = set[str](), {child}, 0
        while near := {parent for one in near for parent in above.get(one, ())} - seen:
            seen, depth = seen | near, depth + 1
            for one in near:
                yield {"descendant_id": child, "ancestor_id": one, "depth": depth}


def plain(row: Iterable[object]) -> tuple[str, ...]:
    """A row that can be sorted; 1 is 1.0, as the table says."""
    return tuple(repr(value + 0.0 if isinstance(value, int) else value) for value in row)


def doubled(records: Iterable[Record], chance: random.Random) -> dict[str, Record]:
    """Each with a twin of another run, a second before or after it or in the same moment."""
    found = {}
    for record in records:
        at = moment(record) + timedelta(seconds=chance.choice((-1, 0, 1)))
        for one in (record, replace(record, run_id="twin", at=f"{at.isoformat()}Z")):
            data = one.to_bytes()
            found[hashlib.sha256(data).hexdigest()] = Record.from_bytes(data)
    return found


def test_each_field_has_its_row_whatever_came_first(asked: Shelf) -> None:
    """And no column is empty in all rows."""
    chance = random.Random(0)
    whole, _ = asked.ledger.records.read_all(asked.ledger.records.loose())
    records = doubled((*map(Record.from_bytes, whole.values()), *facts(asked)), chance)
    expected: dict[str, list[Row]] = defaultdict(list)
    for sha256, record in kept(records).items():
        for table, row in told(sha256, record):
            expected[table].append(row)
    expected["records"] = [next(told(*one))[1] for one in records.items()]
    expected["ancestors"] = [*ancestors(expected["parents"])]
    names = chance.sample([*records], len(records))
    with memory() as connection:
        migrated(connection)
        for start in range(0, len(names), 20):
            part = names[start : start + 20]
            offer_texts(connection, {name: records[name].to_bytes() for name in part})
            add(connection)
        tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE NOT temporary")
        assert {name for (name,) in tables.fetchall()} - expected.keys() == {*LATER}
        for table, rows in expected.items():
            found = connection.table(table)
            due = [tuple(row.get(column) for column in found.columns) for row in rows]
            assert sorted(map(plain, found.fetchall())) == sorted(map(plain, due)), table
            assert all(set(column) - {"None"} for column in zip(*map(plain, due), strict=True)), (
                table
            )
