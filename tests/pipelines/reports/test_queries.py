"""The queries of a report are what their definitions say, on a ledger drawn at random."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest

from pipelines.reports.queries import load_queries
from store.query import memory
from tests.store.test_views import insert, migrated

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable

    import duckdb

    Rows = list[dict[str, Any]]
    Ask = Callable[[str], list[tuple[Any, ...]]]

MINE, OTHER = "router:0", "router:1"
EXPERTS = ("x", "y", "z")
"""The last has no rows of its own."""
MODULES = ("model.layers.10.q_proj", "model.layers.2.q_proj", "model.layers.2.k_proj", "lm_head")
SUBJECTS = {
    MINE: "", OTHER: "arrow", "base:0": "base", "merge:0": "ties",
    "adapter:0": "", "adapter:1": "", "adapter:2": "",
}  # fmt: skip
METRICS = {"right": True, "f1": True, "errors": False}
TASKS = (*EXPERTS, "other", "more", "most")
MIXED = {
    "composite-2": ("composite_right", "composite_attempted"),
    "composite-10": ("composite_right", "composite_attempted"),
    "conversation-3": ("conversation_right",),
    "conversation-10": ("conversation_right",),
}
UNASKED = {("merge:0", "x"), *((OTHER, task) for task in TASKS[1:])}
"""So that the longest list of systems is that of two tasks, and of one."""
ORDER = ("fused", "oracle", "base")
START = datetime(2026, 1, 1)  # noqa: DTZ001  (as DuckDB gives it)


def drawn_scores(dice: random.Random) -> Rows:
    """Most of what could be asked, in two ways; no adapter alone is made for several questions."""
    tasks = dict.fromkeys(TASKS, tuple(METRICS)) | MIXED
    asked = [
        (subject, task, metric, fewshot)
        for subject in SUBJECTS
        for task, metrics in tasks.items()
        if (subject, task) not in UNASKED
        if not (task in MIXED and subject.startswith("adapter"))
        for metric in metrics
        for fewshot in (0, 1)
        if dice.random() < 0.9
    ]
    dice.shuffle(asked)
    rows = []
    for number, (subject, task, metric, fewshot) in enumerate(asked):
        value = dice.randrange(5) / 4
        rows.append(
            {
                "id": f"score:{number}", "subject_id": subject, "base_id": "base:0", "task": task,
                "metric": metric, "num_fewshot": fewshot, "value": value, "low": value - 0.1,
                "high": value + 0.1, "num_samples": rows_of(task), "num_empty": number,
                "num_truncated": number, "higher_is_better": METRICS.get(metric, True),
                "outputs_sha256": f"{number}", "templated": True, "max_new_tokens": 8,
                "mean_prompt_tokens": 1.5, "max_prompt_tokens": 2,
                "recorded_at": START + timedelta(minutes=number),
            }
        )  # fmt: skip
    return rows


def rows_of(task: str) -> int:
    return 10 + (*TASKS, *MIXED).index(task)


def drawn_counts(dice: random.Random) -> Rows:
    return [
        {"router_id": router, "module": module, "truth": truth, "chosen": chosen,
         "num_tokens": dice.randrange(1, 9)}
        for router in (MINE, OTHER)
        for module in MODULES
        for truth in EXPERTS[:2]
        for chosen in (*EXPERTS, "(base)")
        if dice.random() < 0.7
    ]  # fmt: skip


def drawn_comparisons(dice: random.Random, scores: Rows) -> Rows:
    """Of families of tasks, large and small; some test what is not the latest."""
    rows = []
    for number in range(60):
        family = {"comparison_id": f"comparison:{number:02}", "subject_id": MINE,
                  "other": dice.choice(("base", "oracle", "arrow", "ties")),
                  "recorded_at": START + timedelta(minutes=dice.randrange(3))}  # fmt: skip
        ours = {
            row["task"]: row
            for row in dice.sample(scores, len(scores))
            if row["subject_id"] == MINE
        }
        for score in dice.sample([*ours.values()], dice.choice((1, 4, 4))):
            found = {"p_holm": dice.random(), "difference": dice.random()}
            about = {"task": score["task"], "metric": score["metric"], "score_id": score["id"]}
            rows += [family | about | found]
    return rows


def drawn_routes(dice: random.Random) -> dict[str, Rows]:
    """What was seen on two sets of rows; of the other router, too."""
    seen = [(router, sha256) for router in (MINE, OTHER) for sha256 in ("b", "a")]
    here = [{"router_id": router, "record_sha256": router + sha256} for router, sha256 in seen]
    return {
        "artifacts": [
            {"id": f"routing:{n}", "kind": "routing", "record_sha256": one["record_sha256"],
             "recorded_at": START + timedelta(minutes=n)}
            for n, one in enumerate(here)
        ],
        "parents": [
            {"child_id": f"routing:{n}", "parent_id": one["router_id"]}
            for n, one in enumerate(here)
        ],
        "routing_details": [
            {**one, "module": module, "entropy_bits": dice.random(), "weight": dice.random(),
             "agreement": dice.random()}
            for one in here
            for module in MODULES
        ],
        "routing_switches": [
            {**one, "expert": expert, "in_answer": in_answer, "delay_tokens": delay,
             "num_switches": dice.randrange(1, 9)}
            for one in here
            for expert in EXPERTS
            for in_answer in (False, True)
            for delay in (0, 3, None)
            if dice.random() < 0.6
        ],
        "abstentions": [{**one, "auroc": n / 9} for n, one in enumerate(here)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> Generator[duckdb.DuckDBPyConnection]:
    dice = random.Random(0)
    scores, routes = drawn_scores(dice), drawn_routes(dice)
    with memory() as connection:
        migrated(connection)
        for table, rows in {
            "base_models": [{"id": "base:0"}],
            "merges": [{"id": "merge:0", "fused_id": "fused:0", "method": "ties"}],
            "routers": [
                {
                    "id": router,
                    "fused_id": "fused:0",
                    "router": kind,
                    "method": method,
                    "stand_in": "norm",
                    "stand_ins": ["y"],
                }
                for router, kind, method in ((MINE, "gate", "calibrate"), (OTHER, "arrow", ""))
            ],
            "experts": [
                {"fused_id": "fused:0", "position": n, "name": name, "adapter_id": f"adapter:{n}"}
                for n, name in reversed([*enumerate(EXPERTS)])
            ],
            "ancestors": [
                {"descendant_id": router, "ancestor_id": f"adapter:{n}", "depth": 2}
                for router in (MINE, OTHER)
                for n, _ in enumerate(EXPERTS)
            ],
            "scores": scores,
            "comparisons": drawn_comparisons(dice, scores),
            "score_parts": [
                {"score_id": row["id"], "position": n, "name": name}
                for row in scores
                if row["task"] in MIXED
                for n, name in ((1, "x"), (0, "y"))
            ],
            "score_turns": [
                {"score_id": row["id"], "turn": turn}
                for row in scores
                if row["task"].startswith("conversation")
                for turn in (2, 1)
            ],
            "routing_counts": drawn_counts(dice),
            **routes,
            "parents": [*routes["parents"], {"child_id": "fused:0", "parent_id": "base:0"}],
        }.items():
            insert(connection, table, rows)
        yield connection


@pytest.fixture(scope="module")
def ask(drawn: duckdb.DuckDBPyConnection) -> Ask:
    queries = {name: sql for name, _, sql in load_queries()}
    return lambda name: drawn.execute(queries[name].replace("$router", f"'{MINE}'")).fetchall()


@pytest.fixture(scope="module")
def counts(drawn: duckdb.DuckDBPyConnection) -> Rows:
    return of_table(drawn, "routing_counts")


@pytest.fixture(scope="module")
def latest(drawn: duckdb.DuckDBPyConnection) -> Rows:
    return [row for row in of_table(drawn, "latest_standings") if row["system"] != "alone"]


def of_table(connection: duckdb.DuckDBPyConnection, table: str) -> Rows:
    found = connection.sql(f"FROM {table} WHERE router_id = '{MINE}'")
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def sums(rows: Rows, key: Callable[[dict[str, Any]], Hashable]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for row in rows:
        total[key(row)] += row["num_tokens"]
    return total


def right(rows: Rows) -> float:
    return sum(row["num_tokens"] for row in rows if row["truth"] == row["chosen"]) / sum(
        row["num_tokens"] for row in rows
    )


def layer_of(module: str) -> int | None:
    return int(module.split(".")[2]) if "." in module else None


def bits(shares: Iterable[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


def test_tokens_are_counted_over_all_modules(ask: Ask, counts: Rows) -> None:
    """But those of an expert's rows once: as many as the module that saw most of them."""
    assert ask("overall") == [
        (right(counts), sum(row["num_tokens"] for row in counts), len(MODULES))
    ]
    fed = sums(counts, lambda row: (row["truth"], row["module"]))
    accuracy = [
        (
            truth,
            right([row for row in counts if row["truth"] == truth]),
            max(number for (one, _), number in fed.items() if one == truth),
        )
        for truth in EXPERTS[:2]
    ]
    assert ask("accuracy") == sorted(accuracy, key=lambda row: -row[1])
    sent = sums(counts, lambda row: (row["truth"], row["chosen"]))
    own = sums(counts, lambda row: row["truth"])
    got = sums(counts, lambda row: row["chosen"])
    total = own.total()
    assert ask("confusion") == [
        (*pair, number, number / own[pair[0]]) for pair, number in sorted(sent.items())
    ]
    assert ask("load") == [
        (name, own[name] / total if name in own else None, got[name] / total)
        for name in sorted(got)
    ]
    shares = [[part[name] / total for name in got] for part in (own, got)]
    assert ask("entropy") == [(*map(pytest.approx, (*map(bits, shares), math.log2(len(got)))), 4)]


def test_routing_is_right_by_layer_and_kind_and_wrong_where_it_is_most(
    ask: Ask, counts: Rows
) -> None:
    by_layer: dict[tuple[int | None, str | None], Rows] = defaultdict(list)
    by_module: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in counts:
        layer, kind = layer_of(row["module"]), row["module"].rpartition(".")[2]
        by_layer[layer, kind].append(row)
        by_layer[layer, None].append(row)
        by_module[row["truth"], row["module"]].append(row)
    found = ask("layers")
    assert {row[:2]: row[2] for row in found} == {key: right(r) for key, r in by_layer.items()}
    kinds = (2, "k_proj"), (2, "q_proj"), (2, None), (10, "q_proj"), (10, None)
    assert [row[:2] for row in found[:5]] == [*kinds]
    wrong = [
        (
            truth,
            layer_of(module),
            module.rpartition(".")[2],
            right(rows),
            sum(row["num_tokens"] for row in rows),
        )
        for (truth, module), rows in by_module.items()
    ]
    wrong.sort(key=lambda row: (row[3], math.inf if row[1] is None else row[1], row[0], row[2]))
    assert ask("failures") == wrong[:10]


def place(system: str) -> int:
    return ORDER.index(system) if system in ORDER else len(ORDER)


def test_means_are_over_the_tasks_that_most_systems_were_asked(ask: Ask, latest: Rows) -> None:
    """A task with several metrics counts once; prompts of several questions do not count."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in latest:
        if row["higher_is_better"] and row["metric"] in METRICS:
            values[row["task"]][row["system"]].append(row["value"])
    together = Counter(tuple(sorted(systems)) for systems in values.values())
    chosen = min(together, key=lambda systems: (-len(systems), -together[systems], systems))
    tasks = [task for task, systems in values.items() if tuple(sorted(systems)) == chosen]
    numbers = [rows_of(task) for task in tasks]
    assert len(tasks) == 2
    means = [
        (system, fmean(fmean(values[task][system]) for task in tasks), len(tasks),
         min(numbers), max(numbers))
        for system in chosen
    ]  # fmt: skip
    assert ask("means") == sorted(means, key=lambda row: (place(row[0]), -row[1], row[0]))


def test_a_difference_is_of_the_largest_family_then_the_last(
    drawn: duckdb.DuckDBPyConnection, ask: Ask, latest: Rows
) -> None:
    """And of the fused model's score in the way of asking that is shown."""
    asked = {row["score_id"] for row in latest if row["system"] == "fused"}
    sql = f"FROM comparisons WHERE subject_id = '{MINE}' ORDER BY comparison_id"
    found = drawn.sql(sql)
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    sizes = Counter(row["comparison_id"] for row in rows)
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["score_id"] in asked:
            best = chosen.setdefault((row["other"], row["task"]), row)
            chosen[row["other"], row["task"]] = max(
                best, row, key=lambda one: (sizes[one["comparison_id"]], one["recorded_at"])
            )
    order = sorted(chosen, key=lambda pair: (("oracle", "base", *pair).index(pair[0]), *pair))
    expected = [(*pair, chosen[pair]["metric"], chosen[pair]["difference"]) for pair in order]
    assert [row[:4] for row in ask("differences")] == expected
    assert len({pair[0] for pair in order}) == 4


def test_routes_are_those_that_were_seen_last(drawn: duckdb.DuckDBPyConnection, ask: Ask) -> None:
    details, switches = (
        [row for row in of_table(drawn, f"routing_{what}") if row["record_sha256"] == f"{MINE}a"]
        for what in ("details", "switches")
    )
    by_layer: dict[int | None, Rows] = defaultdict(list)
    for row in details:
        by_layer[layer_of(row["module"])].append(row)
    assert ask("details") == [
        (layer, *(pytest.approx(fmean(row[name] for row in by_layer[layer]))
                  for name in ("entropy_bits", "weight", "agreement")))
        for layer in (2, 10, None)
    ]  # fmt: skip
    assert [row[0] for row in ask("abstention")] == [1 / 9]
    expected, sofar, total = [], [0, 0], [0, 0]
    for delay in (0, 3, None):
        now = [0, 0]
        for row in switches:
            total[row["in_answer"]] += row["num_switches"] * (delay is None)
            now[row["in_answer"]] += row["num_switches"] * (row["delay_tokens"] == delay)
        sofar = [before + more for before, more in zip(sofar, now, strict=True)]
        expected.append((delay, *now, *sofar))
    assert ask("switches") == [
        (*row[:3], *(number / of for number, of in zip(row[3:], total, strict=True)))
        for row in expected
    ]


def mixed_place(row: dict[str, Any]) -> tuple[int, int, str, int, str]:
    """Plain tasks, then composites, then conversations; the shorter before the longer."""
    what, _, number = row["task"].partition("-")
    first = ("", "composite", "conversation").index(what if number else "")
    return first, int(number or 0), row["task"], place(row["system"]), row["system"]


def test_scores_stand_in_one_order(
    drawn: duckdb.DuckDBPyConnection, ask: Ask, latest: Rows
) -> None:
    """By task, system and metric: also where a mixed prompt has another table."""
    rows = sorted(latest, key=lambda row: (*mixed_place(row), row["metric"]))
    names = "task", "system", "metric", "value", "low", "high", "num_samples", "num_empty"
    assert [row[:8] for row in ask("scores")] == [tuple(map(row.get, names)) for row in rows]
    mixed: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["task"] in MIXED:
            mixed[row["task"], row["system"]][row["metric"]] = row
    assert ask("composites") == [
        (
            *pair,
            *(found[name]["value"] if name in found else None for name in MIXED[pair[0]]),
            rows_of(pair[0]), 1.5, 2, max(row["num_truncated"] for row in found.values()),
        )
        for pair, found in mixed.items()
        if pair[0].startswith("composite")
    ]  # fmt: skip
    assert [row[:3] for row in ask("conversations")] == [
        (*pair, turn) for pair in mixed if pair[0].startswith("conv") for turn in (1, 2)
    ]
    fused = [row for row in rows if row["system"] == "fused"]
    assert [row[:2] for row in ask("parts")] == [
        (row["task"], name)
        for row in sorted(fused, key=lambda row: mixed_place(row)[1])
        if row["task"] in MIXED and row["metric"] != "composite_attempted"
        for name in ("y", "x")
    ]
    outputs = {row["task"]: row for row in sorted(fused, key=lambda row: row["recorded_at"])}
    tasks = sorted(
        outputs, key=lambda task: (-mixed_place(outputs[task])[0], mixed_place(outputs[task]))
    )
    assert [(f"score:{row[1]}", row[0], *row[-2:]) for row in ask("outputs")] == [
        (outputs[task]["score_id"], task, task in MIXED, task.startswith("conversation"))
        for task in tasks
    ]
    matrix = [row for row in of_table(drawn, "latest_standings") if row["expert"]]
    assert ask("matrix") == sorted(
        (tuple(map(row.get, ("task", "expert", "metric", *names[3:7]))) for row in matrix),
        key=lambda row: (row[0], row[2], row[1]),
    )


def test_what_it_is_made_of_is_told_of_its_own_run(
    drawn: duckdb.DuckDBPyConnection, ask: Ask
) -> None:
    """Of two verdicts on an adapter the later; of two timings the later; all experts by place."""
    here = {"run_id": "r1", "repo_id": "o/n", "licence": "", "author": ""}
    verdicts = [
        ("a", "refuse", 0, "r1", "y"), ("a", "accept", 1, "r1", "z"), ("b", "accept", 0, "r2", "x"),
        ("c", "warn", 0, "r1", "w"), ("d", "refuse", 0, "r1", "v"),
    ]  # fmt: skip
    rows: dict[str, Rows] = {
        "artifacts": [{"id": MINE, "run_id": "r1"}, {"id": OTHER, "run_id": "r2"}],
        "verdicts": [
            {**here, "name": name, "verdict": verdict, "run_id": run_id, "record_sha256": sha256,
             "recorded_at": START + timedelta(minutes=minute), "subfolder": "deep" * (name == "d")}
            for name, verdict, minute, run_id, sha256 in verdicts
        ],
        "verdict_reasons": [
            {"record_sha256": "w", "position": n, "message": text}
            for n, text in ((1, "B"), (0, "A"))
        ],
        "run_stages": [
            {"run_id": run_id, "position": n, "stage": stage}
            for run_id, n, stage in (("r1", 1, "fit"), ("r1", 0, "stack"), ("r2", 2, "pool"))
        ],
        "speeds": [
            {"id": one, "subject_id": MINE, "phase": phase, "device": one,
             "recorded_at": START + timedelta(minutes=minute)}
            for one, minute in (("speed:1", 1), ("speed:0", 2), ("speed:2", 0))
            for phase in ("decode", "prefill")
        ],
    }  # fmt: skip
    for table, told in rows.items():
        insert(drawn, table, told)
    assert [(row[0], row[1], row[2], row[-1]) for row in ask("adapters")] == [
        ("d", "refuse", "o/n/deep", None), ("c", "warn", "o/n", "A; B"),
        ("a", "accept", "o/n", None),
    ]  # fmt: skip
    assert [row[0] for row in ask("stages")] == ["stack", "fit"]
    assert [(row[0], row[14]) for row in ask("speed")] == [
        ("prefill", "speed:0"), ("decode", "speed:0")
    ]  # fmt: skip
    assert [(*row[:2], row[-1]) for row in ask("experts")] == [
        (1, "x", "examples"), (2, "y", "norm"), (3, "z", "examples")
    ]  # fmt: skip
