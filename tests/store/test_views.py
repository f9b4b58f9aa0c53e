"""Views and ranks are what their definitions say, word by word, on a ledger drawn at random."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from math import sqrt
from typing import TYPE_CHECKING, Any

import pytest

from store.intake import rank
from store.query import memory
from store.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    import duckdb

    Drawn = tuple[duckdb.DuckDBPyConnection, list["Scored"]]

RECIPES = {"r0": "nightly", "r1": "nightly", "r2": "weekly"}
"""Of r3 the start is not recorded."""
STACKS = {
    "fused:0": ("base:0", {"x": "adapter:0", "y": "adapter:1"}),
    "fused:1": ("base:0", {"y": "adapter:2", "z": "adapter:0"}),
    "fused:2": ("base:1", {"x": "adapter:0", "z": "adapter:1"}),
}
MERGES = {f"merge:{stack}": stack for stack in STACKS}
BASES = ("base:0", "base:1")
HIGHER = {"right": True, "errors": False}
WAYS = ((0, 8, "auto", "a"), (1, 8, "auto", "a"), (0, 9, "auto", "a"), (0, 8, "chat", "a"))
OTHER_ROWS = (0, 8, "auto", "b")
BOARD = "task, metric, num_fewshot, max_new_tokens, template, rows_sha256"


@dataclass(frozen=True)
class Router:
    id: str
    fused_id: str
    router: str
    top_k: int
    temperature: float
    method: str


@dataclass(frozen=True)
class Scored:
    id: str
    subject_id: str
    base_id: str
    task: str
    metric: str
    num_fewshot: int
    max_new_tokens: int
    template: str
    rows_sha256: str
    seed: int
    value: float
    low: float
    high: float
    recorded_at: datetime
    run_id: str
    record_sha256: str

    @property
    def way(self) -> tuple[object, ...]:
        return self.num_fewshot, self.max_new_tokens, self.template, self.rows_sha256

    @property
    def board(self) -> tuple[object, ...]:
        return self.task, self.metric, *self.way

    @property
    def stderr(self) -> float:
        return (self.high - self.low) / 4

    @property
    def merit(self) -> float:
        return self.value if HIGHER[self.metric] else -self.value


ROUTERS = tuple(
    Router(f"router:{number}", *one)
    for number, one in enumerate(
        (stack, *kind)
        for stack in STACKS
        for kind in (
            ("gate", 1, 1.0, "calibrate"),
            ("gate", 1, 1.0, "joint"),
            ("gate", 2, 1.0, "calibrate"),
            ("arrow", 1, 1.0, ""),
            ("arrow", 1, 1.0, ""),  # of another seed
            ("arrow", 1, 2.0, ""),
            ("norm", 2, 1.0, ""),
            ("oracle", 1, 1.0, ""),
            ("oracle", 1, 1.0, ""),  # of an older release
            ("one_expert", 1, 1.0, ""),
        )
    )
)
MODELS = {one.id: one for one in ROUTERS if one.router not in ("oracle", "one_expert")}


def draw(seed: int) -> list[Scored]:
    """A third of all that could be asked, in an order of its own."""
    dice = random.Random(seed)
    subjects = [(one.id, STACKS[one.fused_id][0]) for one in ROUTERS]
    subjects += [(merge, STACKS[stack][0]) for merge, stack in MERGES.items()]
    subjects += [(f"adapter:{n}", base) for n in range(3) for base in BASES]
    subjects += [(base, base) for base in BASES]
    asked = [
        (*subject, task, metric, *way, again)
        for subject in subjects
        for task in ("x", "y", "mixed")
        if task == "mixed" or subject[0] not in {one.id for one in ROUTERS if one.id not in MODELS}
        for metric in HIGHER
        for way in (*WAYS, OTHER_ROWS)
        for again in (0, 1)
        if dice.random() < 0.33
    ]
    dice.shuffle(asked)
    found = []
    for number, one in enumerate(asked):
        value = dice.randrange(9) / 8
        ends = value - dice.random() / 4, value + dice.random() / 4
        at = datetime(2026, 1, 1) + timedelta(minutes=number)  # noqa: DTZ001  (as DuckDB gives it)
        run_id = f"r{dice.randrange(4)}"
        found.append(Scored(f"score:{number}", *one, value, *ends, at, run_id, f"{number:064x}"))
    return found


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[dict]) -> None:
    """Rows by the names of columns; what else is needed has no meaning here."""
    needed = connection.execute(
        "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = $1"
        " AND NOT is_nullable AND column_default IS NULL",
        [table],
    ).fetchall()
    empty = {"VARCHAR": "", "TIMESTAMP": "2026-01-01", "MAP(VARCHAR, VARCHAR)": {}}
    filler = {name: empty.get(kind, 1) for name, kind in needed}
    whole = [filler | row for row in rows]
    names, places = ", ".join(whole[0]), ", ".join("?" * len(whole[0]))
    connection.executemany(
        f"INSERT INTO {table} ({names}) VALUES ({places})",  # noqa: S608
        [list(row.values()) for row in whole],
    )


@pytest.fixture(scope="module")
def drawn() -> Generator[Drawn]:
    """A ledger that is ranked twice: where some boards came later, or grew, the others stay."""
    scores = draw(0)
    with memory() as connection:
        fill(connection, scores)
        yield connection, scores


def migrated(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("ATTACH ':memory:' AS ledger")
    connection.execute("USE ledger")
    migrate(connection)


def fill(connection: duckdb.DuckDBPyConnection, scores: list[Scored]) -> None:
    migrated(connection)
    insert(connection, "base_models", [{"id": base} for base in BASES])
    insert(connection, "routers", [asdict(one) for one in ROUTERS])
    insert(
        connection,
        "merges",
        [{"id": m, "fused_id": f, "method": "ties"} for m, f in MERGES.items()],
    )
    insert(
        connection,
        "experts",
        [
            {"fused_id": stack, "position": position, "name": name, "adapter_id": adapter}
            for stack, (_, experts) in STACKS.items()
            for position, (name, adapter) in enumerate(experts.items())
        ],
    )
    insert(
        connection,
        "parents",
        [{"child_id": s, "parent_id": base} for s, (base, _) in STACKS.items()],
    )
    insert(connection, "run_starts", [{"run_id": r, "recipe_name": n} for r, n in RECIPES.items()])
    for part in (scores[:-30], scores[-30:]):
        rows = [
            asdict(one) | {"higher_is_better": HIGHER[one.metric], "stderr": one.stderr}
            for one in part
        ]
        insert(connection, "scores", rows)
        keys = BOARD.split(", ")
        insert(connection, "unsettled", [{key: row[key] for key in keys} for row in rows])
        rank(connection)


def last(scores: Iterable[Scored]) -> Scored:
    return max(scores, key=lambda one: one.recorded_at)


def same(one: Scored, other: Scored) -> bool:
    """Asked in the same way on the same base."""
    return (one.board, one.base_id, one.seed) == (other.board, other.base_id, other.seed)


def beside(scores: list[Scored], mine: Scored) -> tuple[Any, ...]:
    """The base with its interval, the right adapter with its own, and the best adapter."""
    stack, alike = MODELS[mine.subject_id].fused_id, [one for one in scores if same(one, mine)]
    base = next((one for one in alike if one.subject_id == one.base_id), None)
    experts = STACKS[stack][1]
    alone = [
        (name, one)
        for name, adapter in experts.items()
        for one in alike
        if one.subject_id == adapter
    ]
    told = [one for one in alike if one.subject_id in oracles(stack)]
    best = max(alone, key=lambda pair: pair[1].merit, default=None)
    right = next((pair for pair in alone if pair[0] == mine.task), best)
    if told:
        right = "each span's own", last(told)
    return (
        *((base.value, base.low, base.high) if base else [None] * 3),
        *((right[0], right[1].value, right[1].low, right[1].high) if right else [None] * 4),
        *((best[0], best[1].value) if best else [None] * 2),
    )


def oracles(stack: str) -> set[str]:
    return {one.id for one in ROUTERS if one.fused_id == stack and one.router == "oracle"}


def test_a_place_is_one_more_than_those_who_do_better_on_the_board(
    drawn: Drawn,
) -> None:
    connection, scores = drawn
    ranked = [one for one in scores if one.subject_id in MODELS]
    expected = [
        (
            one.recorded_at,
            1 + sum(other.board == one.board and other.merit > one.merit for other in ranked),
            one.way
            == last(o for o in ranked if (o.subject_id, o.task) == (one.subject_id, one.task)).way,
            *beside(scores, one),
        )
        for one in ranked
    ]
    found = connection.execute(
        "SELECT recorded_at, place, is_latest, base_value, base_low, base_high, oracle_name,"
        " oracle_value, oracle_low, oracle_high, best_name, best_value"
        " FROM leaderboard ORDER BY recorded_at"
    ).fetchall()
    assert found == expected


def systems(router: Router) -> Iterable[tuple[str, str, str]]:
    """Subject, system and expert of all that stands beside a model."""
    base, experts = STACKS[router.fused_id]
    yield router.id, "fused", ""
    yield base, "base", ""
    for merge, stack in MERGES.items():
        if stack == router.fused_id:
            yield merge, "ties", ""
    for name, adapter in experts.items():
        yield adapter, "", name
    for other in ROUTERS:
        untrained = other.id != router.id and not other.method
        settings = other.fused_id, other.top_k, other.temperature
        if untrained and settings == (router.fused_id, router.top_k, router.temperature):
            yield other.id, other.router, ""


def test_beside_a_model_stands_all_that_was_asked_in_the_same_way(
    drawn: Drawn,
) -> None:
    """And of several ways the last one is the latest, with the last of two seeds."""
    connection, scores = drawn
    expected, latest = [], []
    for router in MODELS.values():
        for task in ("x", "y", "mixed"):
            ours = [one for one in scores if (one.subject_id, one.task) == (router.id, task)]
            kept: dict[tuple[str, ...], Scored] = {}
            for subject, system, expert in systems(router):
                called = system or ("oracle" if expert == task else "alone")
                for one in scores:
                    if one.subject_id == subject and any(same(one, mine) for mine in ours):
                        expected.append((router.id, called, expert, one.id))
                        place = one.metric, called, expert
                        if one.way == last(ours).way:
                            kept[place] = last((one, kept.get(place, one)))
            latest += [(router.id, *place[1:], one.id) for place, one in kept.items()]
    for view, rows in (("standings", expected), ("latest_standings", latest)):
        found = connection.execute(f"SELECT router_id, system, expert, score_id FROM {view}")  # noqa: S608
        assert sorted(found.fetchall()) == sorted(rows)
        order = connection.execute(f"SELECT router_id, task, metric, system, expert FROM {view}")  # noqa: S608
        keys = order.fetchall()
        assert keys == sorted(keys)


def test_a_change_is_from_the_last_score_of_the_same_recipe_s_routers_of_that_kind(
    drawn: Drawn,
) -> None:
    connection, scores = drawn
    before: dict[tuple[object, ...], Scored] = {}
    expected = []
    for now in scores:
        if now.subject_id in MODELS and now.run_id in RECIPES:
            line = RECIPES[now.run_id], MODELS[now.subject_id].router, now.board
            if was := before.get(line):
                fall, ends = was.value - now.value, (was.value - was.low, now.high - now.value)
                if not HIGHER[now.metric]:
                    fall, ends = -fall, (was.high - was.value, now.value - now.low)
                worse = fall > sqrt(ends[0] ** 2 + ends[1] ** 2)
                change = line[0], now.recorded_at, was.subject_id, was.value, now.value - was.value
                stderr = round(sqrt(now.stderr**2 + was.stderr**2), 9)
                expected.append((*change, stderr, worse))
            before[line] = now
    columns = (
        "recipe_name, recorded_at, previous_id, previous_value, change, round(change_stderr, 9)"
    )
    found = connection.execute(f"SELECT {columns}, worse FROM changes ORDER BY recorded_at")  # noqa: S608
    assert found.fetchall() == expected
    fallen = connection.execute(f"SELECT {columns} FROM regressions ORDER BY recorded_at")  # noqa: S608
    assert fallen.fetchall() == [row[:-1] for row in expected if row[-1]]
    assert fallen


def test_of_two_oracles_of_one_moment_the_same_counts_in_any_order() -> None:
    """Such as records of two homes, or of a clock that stands still."""
    kinds = {"router:0": "gate", "router:1": "oracle", "router:2": "oracle"}
    routers = [{"id": one, "fused_id": "fused:0", "router": kind} for one, kind in kinds.items()]
    scores = [{"id": one, "subject_id": one, "value": number} for number, one in enumerate(kinds)]
    found = []
    for rows in (scores, scores[::-1]):
        with memory() as connection:
            migrated(connection)
            insert(connection, "routers", routers)
            insert(connection, "scores", rows)
            insert(connection, "unsettled", [{"template": "auto"}])
            rank(connection)
            found += connection.execute("SELECT oracle_value FROM leaderboard").fetchall()
    assert found == [(1.0,), (1.0,)]


@pytest.fixture
def empty() -> Generator[duckdb.DuckDBPyConnection]:
    with memory() as connection:
        migrated(connection)
        yield connection


def test_of_several_records_the_latest_counts(empty: duckdb.DuckDBPyConnection) -> None:
    """Of verdicts, of where an adapter is from, and of a router's routes, whatever the hashes."""
    first, second, third = (
        {"recorded_at": f"2026-01-0{day}", "record_sha256": sha256}
        for day, sha256 in enumerate("cba", 1)
    )
    place = {"repo_id": "one/lora", "revision": "main"}
    verdicts = [
        {**place, **first, "verdict": "refuse", "adapter_id": None},
        {**place, **second, "verdict": "accept", "adapter_id": "adapter:0", "licence": "mit"},
        {**place, **first, "subfolder": "deep", "adapter_id": None},
        {**place, **first, "revision": "next", "adapter_id": None},
        {**first, "repo_id": "two/lora", "adapter_id": "adapter:0", "licence": "gpl"},
        {**place, **first, "repo_id": "three/lora", "adapter_id": None},
    ]
    insert(
        empty,
        "verdicts",
        [{"subfolder": "", "verdict": "", "licence": "", **row} for row in verdicts],
    )
    reasons = [
        {"position": n, "code": text, "message": text, "record_sha256": "b"}
        for n, text in ((1, "y"), (0, "z"))
    ]
    insert(empty, "verdict_reasons", reasons)
    experts = [{"fused_id": f"fused:{n}", "adapter_id": "adapter:0"} for n in (0, 0, 1)]
    insert(empty, "experts", experts)
    insert(empty, "adapter_weights", [{"id": f"adapter:{n}", "min_r": 4 + n} for n in (0, 1)])
    assert empty.execute(
        "SELECT repo_id, revision, subfolder, verdict, codes, messages, num_seen, num_fused,"
        " min_r, day(first_at) FROM adapters"
    ).fetchall() == [
        ("one/lora", "main", "", "accept", ["z", "y"], ["z", "y"], 2, 2, 4, 1),
        ("one/lora", "main", "deep", "", [], [], 1, 0, None, 1),
        ("one/lora", "next", "", "", [], [], 1, 0, None, 1),
        ("three/lora", "main", "", "", [], [], 1, 0, None, 1),
        ("two/lora", "", "", "", [], [], 1, 2, 4, 1),
    ]
    artifacts = [
        {"id": "adapter:0", "kind": "adapter", **first},
        {"id": "routing:0", "kind": "routing", **first},
        {"id": "routing:1", "kind": "routing", **second},
        {"id": "speed:0", "kind": "speed", **third},
    ]
    insert(empty, "artifacts", artifacts)
    made = [{"child_id": row["id"], "parent_id": "router:0"} for row in artifacts[1:]]
    insert(empty, "parents", made)
    insert(
        empty,
        "ancestors",
        [{"descendant_id": "adapter:0", "ancestor_id": "base:0", "depth": 1}],
    )
    origins = empty.execute(
        "SELECT depth, kind, source, revision, licence FROM lineage"
        " WHERE artifact_id = 'adapter:0' ORDER BY depth"
    )
    assert origins.fetchall() == [
        (0, "adapter", "one/lora", "main", "mit"),
        (1, None, None, None, None),  # not recorded here
    ]
    assert empty.execute("FROM latest_routing").fetchall() == [("router:0", "b")]


def test_two_adapters_of_one_repository_have_their_subfolders_in_their_sources(
    empty: duckdb.DuckDBPyConnection,
) -> None:
    subfolders = ("", "dates", "sums")
    ids = [f"adapter:{n}" for n in range(len(subfolders))]
    insert(empty, "artifacts", [{"id": one, "kind": "adapter"} for one in ids])
    place = {"repo_id": "one/lora", "revision": "main", "verdict": "accept", "licence": ""}
    verdicts = [
        {**place, "subfolder": subfolder, "adapter_id": one}
        for one, subfolder in zip(ids, subfolders, strict=True)
    ]
    insert(empty, "verdicts", verdicts)
    found = empty.execute("SELECT source FROM lineage ORDER BY relative_id").fetchall()
    assert found == [("one/lora",), ("one/lora/dates",), ("one/lora/sums",)]


def test_runs_stand_by_their_starts_or_ends_and_stages_in_their_order(
    empty: duckdb.DuckDBPyConnection,
) -> None:
    insert(empty, "run_starts", [{"run_id": "r1", "recorded_at": "2026-01-01"}])
    insert(empty, "run_starts", [{"run_id": "r3", "recorded_at": "2026-01-03"}])
    ends = [
        {"run_id": "r2", "recorded_at": "2026-01-02"},
        {"run_id": "r1", "recorded_at": "2026-01-04"},
    ]
    insert(empty, "run_ends", ends)
    stages = [{"run_id": "r1", "position": n, "stage": s} for n, s in ((1, "fit"), (0, "stack"))]
    insert(empty, "run_stages", stages)
    found = empty.execute("SELECT run_id, map_keys(stage_seconds) FROM runs").fetchall()
    assert found == [("r3", None), ("r2", None), ("r1", ["stack", "fit"])]


def test_what_went_wrong_or_was_published_stands_latest_first_whatever_else_is_recorded(
    empty: duckdb.DuckDBPyConnection,
) -> None:
    first, second, third = ({"recorded_at": f"2026-01-0{day}"} for day in (1, 2, 3))
    insert(empty, "run_starts", [{"run_id": "r3", "recipe_name": "nightly"}])
    insert(empty, "failed", [{**first, "run_id": "r1"}, {**third, "run_id": "r3"}])
    insert(empty, "run_ends", [{**second, "run_id": "r2", "outcome": "failed"}])
    found = empty.execute("SELECT run_id, recipe_name FROM failures").fetchall()
    assert found == [("r3", "nightly"), ("r2", None), ("r1", None)]
    insert(empty, "artifacts", [{"id": "router:1", "kind": "router"}])
    times = enumerate((first, third, second))
    insert(empty, "published", [{**at, "artifact_id": f"router:{n}"} for n, at in times])
    found = empty.execute("SELECT artifact_id, kind FROM publications").fetchall()
    assert found == [("router:1", "router"), ("router:2", None), ("router:0", None)]


def test_routing_has_experts_that_are_never_chosen_or_have_no_tokens(
    empty: duckdb.DuckDBPyConnection,
) -> None:
    names = "router_id", "module", "truth", "chosen", "num_tokens"
    counts = [
        ("router:1", "model.layers.3.q_proj", "x", "x", 9),
        ("router:0", "model.layers.3.q_proj", "x", "z", 1),
        ("router:0", "model.layers.3.q_proj", "z", "z", 4),
        ("router:0", "model.layers.3.q_proj", "x", "y", 3),
        ("router:0", "head", "x", "x", 0),
    ]
    insert(empty, "routing_counts", [dict(zip(names, row, strict=True)) for row in counts])
    found = empty.execute(
        "SELECT router_id, layer, expert, num_tokens, accuracy, load FROM routing"
    )
    assert found.fetchall() == [
        ("router:0", 3, "x", 4, 0.0, 0.0),
        ("router:0", 3, "y", 0, None, 0.375),
        ("router:0", 3, "z", 4, 1.0, 0.625),
        ("router:0", None, "x", 0, None, None),
        ("router:1", 3, "x", 9, 1.0, 1.0),
    ]


def test_the_dictionary_is_of_this_ledger_alone(empty: duckdb.DuckDBPyConnection) -> None:
    """Also for somebody who has attached another database."""
    empty.execute("ATTACH ':memory:' AS other; CREATE TABLE other.mine (column_of_mine INTEGER)")
    assert not empty.execute("FROM dictionary WHERE meaning IS NULL").fetchall()
    assert empty.execute("FROM dictionary WHERE name = 'scores'").fetchall()
