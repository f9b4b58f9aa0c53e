"""Questions have their answers, and can do nothing else than be answered."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from meteora.artifacts import (
    ROUTER_KINDS,
    ArtifactId,
    ComparisonBuild,
    ComparisonSpec,
    Control,
    Difference,
    PoolSpec,
    RoutingScore,
    ScorePair,
    Spec,
)
from store.errors import QueryError, StoreError
from store.events import AdapterVerdict, RunStarted
from store.index import Index
from store.ledger import Ledger
from store.query import Limits, examples
from store.records import Record
from tests.store.conftest import ROOT, Shelf

COMMIT = "c0ffee" + "0" * 34
Q_PROJ = "model.layers.{}.self_attn.q_proj"


def test_a_home_without_an_index_that_can_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Index) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Index, "_publish", full)
    with pytest.raises(StoreError, match=r"no index under .* \(.*No space left on device\)"):
        Ledger(tmp_path).query("SHOW TABLES")


def test_every_example_has_its_answer(asked: Shelf) -> None:
    experts = asked.adapter(1), asked.adapter(2)
    stack = asked.fused(*experts)
    models = [brief(asked.router(stack, seed=night).id) for night in (1, 2)]
    weights = asked.ledger.weights_of
    answers = {
        "Which routed model is best on each task": [
            ("parentheses", "exact_match", 100, models[0], 0.75, 0.71, 0.79, 0.1, 0.8),
            ("parentheses", "exact_match", 100, models[1], 0.75, 0.71, 0.79, 0.1, 0.8),
            ("sorting", "exact_match", 100, models[0], 0.88, 0.84, 0.92, 0.05, 0.9),
        ],
        "How do my models compare": [
            (models[0], "gate", 2, 0.815, 0.075, 0.85),
            (models[1], "gate", 2, 0.725, 0.075, 0.85),
        ],
        "On which tasks is a routed model significantly worse": [
            ("sorting", models[1], -0.2, -0.25, -0.15, 0.001)
        ],
        "Where does a routed model differ": [
            (models[1], "oracle", "sorting", -0.2, 0.001),
        ],
        "What does routing cost": sorted(
            (model, phase, rate, ratio, 100.0, "cpu")
            for model in models
            for phase, rate, ratio in (("decode", 33.0, 1.21), ("prefill", 1800.0, 1.11))
        ),
        "How does a model do at each turn": [
            (models[1], "sorting", "fused", 1, 0.9, 40.0, 0.25),
            (models[1], "sorting", "fused", 2, 0.5, 35.0, 0.5),
        ],
        "Which expert got the prompts of a pool": [
            (brief(PoolSpec(stack.id, "7" * 64, 64).id), "expert-0", 30, 2, 1.5, 0.7),
            (brief(PoolSpec(stack.id, "7" * 64, 64).id), "", 12, 3, 0.1, 0.2),
        ],
        "What is the latest model made from": [
            (1, "fused", None, None, None, weights(stack.id)),
            (2, "adapter", "someone/lora-0", COMMIT, "mit", weights(experts[0].id)),
            (2, "adapter", "someone/lora-1", COMMIT, "apache-2.0", weights(experts[1].id)),
            (2, "base", "tiny/base", COMMIT, None, weights(asked.base.id)),
        ],
        "Which models contain an adapter": sorted(
            (f"expert-{number}", licence, kind, used)
            for number, licence in enumerate(("mit", "apache-2.0"))
            for kind, used in (
                ("fused", brief(stack.id)),
                ("router", models[0]),
                ("router", models[1]),
            )
        ),
        "Which adapters were refused": [
            (asked.hostile, "evil/lora", ["E_DORA"], ["it uses DoRA, which cannot be stacked"])
        ],
        "Under which licences": [("apache-2.0", 1), ("mit", 1)],
        "Where does routing go wrong most": [
            (model, f"expert-{expert}", layer, Q_PROJ.format(layer), accuracy, tokens)
            for model in models
            for expert, accuracy, tokens in ((0, 0.9, 100), (1, 1.0, 60))
            for layer in (0, 1)
        ],
        "How are tokens spread": sorted(
            (model, f"expert-{expert}", load, accuracy)
            for model in models
            for expert, load, accuracy in ((0, 0.563, 0.9), (1, 0.438, 1.0))
        ),
        "Which models recognise a prompt": [(models[1], 0.987, 20, 30, 0.75, 0.05)],
        "Which experts take each other's tokens": [
            (model, "expert-0", "expert-1", 0.1) for model in sorted(models)
        ],
        "Where do runs spend their time": [("fit", 2, 50.0), ("stack", 2, 1.0)],
        "Which scores fell significantly": [("nightly", "sorting", 0.88, 0.7)],
    }
    found = {title: asked.ledger.query(sql).rows for title, sql in examples()}
    for beginning, rows in answers.items():
        (title,) = (title for title in found if title.startswith(beginning))
        close = sorted if "task" in title or "wrong most" in title else list
        assert close(found[title]) == close(rows), title
    (ran,) = (rows for title, rows in found.items() if title.startswith("What ran lately"))
    assert [row[1:] for row in ran] == [
        ("nightly", None, None, None),
        ("nightly", "ok", "", 120.0),
        ("nightly", "ok", "", 60.0),
    ]
    (wrong,) = (rows for title, rows in found.items() if title.startswith("What went wrong"))
    assert [row[1:] for row in wrong] == [
        ("nightly", "check", asked.hostile, "AdapterError", "it uses DoRA")
    ]
    (published,) = (rows for title, rows in found.items() if title.startswith("Where is everyth"))
    assert [row[:3] for row in published] == [(models[1], "someone/model", COMMIT)]
    assert len(found) == len(answers) + 4
    assert all(rows for rows in found.values())


def test_a_stage_that_a_record_names_twice_is_one_in_the_map(shelf: Shelf) -> None:
    stages = [{"stage": "fit", "wall_seconds": seconds} for seconds in (1.0, 2.5)]
    body = {"run_id": "r9", "outcome": "ok", "reason": "", "wall_seconds": 4.0, "stages": stages}
    shelf.ledger.records.write(Record("run-ended", "r9", body, "r9", "2026-01-01T00:00:00Z"))
    shelf.ledger.ingest()
    assert shelf.ledger.query("SELECT stage_seconds FROM runs").rows == [({"fit": 3.5},)]


def test_the_loads_of_a_router_add_up_to_one(shelf: Shelf) -> None:
    """Also where an expert without rows of its own has tokens in one of two layers."""
    for spec in (shelf.base, shelf.adapter(1), shelf.adapter(2)):
        shelf.make(spec)
    stack = shelf.fused(shelf.adapter(1), shelf.adapter(2))
    shelf.make(stack)
    gates = shelf.make(shelf.router(stack))
    counts = (0, "expert-0", 100), (1, "expert-0", 50), (1, "expert-1", 50)
    shelf.ledger.record_routing(
        [
            RoutingScore(gates, Q_PROJ.format(layer), "expert-0", chosen, count)
            for layer, chosen, count in counts
        ],
        run_id="r1",
    )
    shelf.ledger.ingest()
    (sql,) = (sql for title, sql in examples() if title.startswith("How are tokens spread"))
    loads = {expert: load for _, expert, load, _ in shelf.ledger.query(sql).rows}
    assert loads == {"expert-0": 0.75, "expert-1": 0.25}


def test_means_are_of_the_same_tasks_and_of_the_metric_that_is_tested(filled: Shelf) -> None:
    """More tasks that only some were asked, and a metric that no comparison tests."""
    stack = filled.fused(filled.adapter(1), filled.adapter(2))
    first, second = (filled.router(stack, seed=night) for night in (1, 2))
    for task in ("words", "dates", "lines"):
        filled.measure(first, task, 0.1)
        filled.measure(filled.base, task, 0.0)
    filled.measure(second, "words", 0.1)
    told = filled.measure(second, "composite-2", 0.1)
    for score, metric in ((told, "composite_right"), (filled.measure(second, "sorting", 0.7), "f")):
        spec = replace(score.spec, metric=metric)
        filled.ledger.record_score(replace(score, spec=spec, value=0.2), run_id="r2")
    filled.ledger.ingest()
    assert filled.ledger.query("FROM means").rows == [
        (first.id, "gate", 2, pytest.approx(0.815), pytest.approx(0.075), pytest.approx(0.85)),
        (second.id, "gate", 2, pytest.approx(0.725), pytest.approx(0.075), pytest.approx(0.85)),
    ]


def test_a_mean_beside_the_base_alone_has_no_oracle(shelf: Shelf) -> None:
    stack = shelf.fused(shelf.adapter(1))
    gates = shelf.router(stack)
    for spec in (shelf.base, shelf.adapter(1), stack, gates):
        shelf.make(spec)
    for task in ("sorting", "words"):
        shelf.measure(gates, task, 0.5)
    shelf.measure(shelf.base, "words", 0.25)
    shelf.ledger.ingest()
    assert shelf.ledger.query("FROM means").rows == [(gates.id, "gate", 1, 0.5, 0.25, None)]


def brief(artifact_id: str) -> str:
    kind, _, digest = artifact_id.partition(":")
    return f"{kind}:{digest[:12]}"


def test_every_column_says_what_it_holds(asked: Shelf) -> None:
    assert asked.ledger.query("FROM dictionary WHERE meaning IS NULL").rows == []
    times = asked.ledger.query(
        "SELECT DISTINCT meaning FROM dictionary WHERE data_type LIKE 'TIMESTAMP%'"
    ).rows
    assert all("UTC" in meaning for (meaning,) in times)


def test_every_tables_comment_is_there(asked: Shelf) -> None:
    for sql in (
        "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND comment IS NULL",
        "SELECT view_name FROM duckdb_views() WHERE NOT internal AND comment IS NULL",
    ):
        assert asked.ledger.query(sql).rows == []


@pytest.mark.parametrize(
    "sql",
    [
        "FROM read_text('/etc/hostname')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM '/etc/passwd'",
        "COPY scores TO '/tmp/scores.csv'",
        "EXPLAIN ANALYZE COPY scores TO '/tmp/scores.csv'",
        "ATTACH '/tmp/other.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET memory_limit = '1TB'",
        "RESET lock_configuration",
        "PRAGMA enable_progress_bar",
        "CALL pragma_version()",
        "EXPORT DATABASE '/tmp/out'",
        "INSERT INTO scores SELECT * FROM scores",
        "DELETE FROM scores",
        "DROP TABLE scores",
        "EXPLAIN ANALYZE DELETE FROM scores",
        "WITH gone AS (DELETE FROM scores RETURNING id) FROM gone",
        "CREATE TABLE memory.main.mine AS SELECT 1",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "FROM scores; DROP TABLE scores",
        "",
        "-- nothing",
        "SELEC 1",
        "FROM nowhere",
    ],
)
def test_a_question_can_do_nothing_but_ask(asked: Shelf, sql: str) -> None:
    before = asked.ledger.query("FROM scores ORDER BY ALL")
    with pytest.raises(QueryError):
        asked.ledger.query(sql)
    assert asked.ledger.query("FROM scores ORDER BY ALL") == before


@pytest.mark.parametrize(
    "sql",
    [
        "FROM leaderboard",
        "WITH best AS (FROM leaderboard WHERE place = 1) SELECT task FROM best",
        "DESCRIBE leaderboard",
        "SHOW TABLES",
        "SUMMARIZE scores",
        "EXPLAIN FROM leaderboard",
        "EXPLAIN ANALYZE FROM leaderboard",
        "VALUES (1)",
        "SELECT 1;",
    ],
)
def test_each_way_of_asking_is_answered(asked: Shelf, sql: str) -> None:
    answer = asked.ledger.query(sql)
    assert answer.rows
    assert answer.columns


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b", "stopped after"),
        (
            "WITH RECURSIVE r AS (SELECT 1 i UNION ALL SELECT i + 1 FROM r) SELECT max(i) FROM r",
            ".",
        ),
        ("SELECT list(range) FROM range(100000000)", "memory"),
        ("SELECT repeat('a', 2 << 20) || range FROM range(40)", "needs more than 64 MiB"),
        ("SELECT {'a': [repeat('b', 2 << 20) || range]} FROM range(40)", "needs more than 64 MiB"),
        ("FROM range(200)", "add a LIMIT"),
    ],
    ids=["long", "endless", "large", "large texts", "large texts inside", "many rows"],
)
def test_a_question_stops_at_its_limits(asked: Shelf, sql: str, sentence: str) -> None:
    began = time.monotonic()
    with pytest.raises(QueryError, match=sentence):
        asked.ledger.query(sql, limits=Limits(seconds=2.0, memory_bytes=1 << 26, rows=100))
    assert time.monotonic() - began < 60  # of hours or for ever


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b",
        # DuckDB alone does not hear Ctrl-C here
        "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range%7 = b.range%11",
    ],
)
def test_ctrl_c_stops_a_question(asked: Shelf, sql: str) -> None:
    asker = threading.main_thread().ident
    assert asker
    threading.Timer(0.5, signal.pthread_kill, (asker, signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asked.ledger.query(sql)
    assert time.monotonic() - began < 30  # of 60


def test_now_is_in_the_time_zone_of_recorded_times(filled: Shelf) -> None:
    """Wherever the asker is: DuckDB takes times without a zone for times of the session's zone."""
    filled.ledger.record_run(RunStarted("r9", "nightly", "9" * 64, {}, "cpu"))
    filled.ledger.ingest()
    asked = (
        "import sys; from pathlib import Path; from store.ledger import Ledger;"
        "print(Ledger(Path(sys.argv[1])).query('SELECT run_id FROM runs WHERE started_at"
        " BETWEEN now() - INTERVAL 1 HOUR AND now()').rows)"
    )
    for zone in ("America/Los_Angeles", "Asia/Tokyo"):
        said = subprocess.run(
            [sys.executable, "-c", asked, filled.home],
            env={**os.environ, "TZ": zone},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout == "[('r9',)]\n", zone


def test_controls_are_those_of_the_routers(asked: Shelf) -> None:
    controls = get_args(Control)
    kinds = ", ".join(f"'{kind}'" for kind in (*ROUTER_KINDS, *controls))
    sql = f"SELECT kind FROM (SELECT unnest([{kinds}]) AS kind) WHERE is_control(kind)"  # noqa: S608
    found = [kind for (kind,) in asked.ledger.query(sql).rows]
    assert found == [*controls]


def test_comments_name_every_kind_of_router(asked: Shelf) -> None:
    found = asked.ledger.query(
        "SELECT table_name, comment FROM duckdb_columns()"
        " WHERE column_name = 'router' AND table_name NOT LIKE '%rows' AND comment LIKE '%gate%'"
    ).rows
    assert {view for view, _ in found} == {"changes", "leaderboard", "regressions", "routers"}
    for view, comment in found:
        assert not {*ROUTER_KINDS} - {*re.findall(r"\w+", comment)}, view


def test_the_examples_are_read_whole() -> None:
    assert len(examples()) >= 10
    for title, sql in examples():
        assert re.fullmatch(r"[A-Z].*\?", title)
        assert sql.endswith(";")


def test_a_score_is_worse_only_beyond_chance(tmp_path: Path) -> None:
    """Also where all rows of a night are right, so that a standard error would be 0."""
    shelf, stack = Shelf(tmp_path), Shelf.fused(Shelf.adapter(1))
    for spec in (Shelf.base, Shelf.adapter(1), stack):
        shelf.make(spec)
    right, fewer, few = (1.0, 0.963, 1.0), (0.96, 0.902, 0.984), (0.9, 0.826, 0.945)
    nights = {
        "one": ((1.0, 0.207, 1.0), (0.0, 0.0, 0.793)),
        "chance": (right, fewer),
        "worse": (right, few),
        "better": (few, right),
        "the same": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    }
    for night in (0, 1):
        run_id, model = f"r{night}", Shelf.router(stack, seed=night)
        shelf.ledger.record_run(RunStarted(run_id, "nightly", "9" * 64, {}, "cpu"))
        shelf.make(model, run_id=run_id)
        blob = shelf.ledger.blobs.put_bytes(b"answers")
        for task, values in nights.items():
            value, low, high = values[night]
            for name, more in (
                (task, {"value": value, "low": low, "high": high}),
                (f"{task}, errors", {"value": 1 - value, "low": 1 - high, "high": 1 - low,
                                     "higher_is_better": False}),
            ):  # fmt: skip
                found = Shelf.score(Shelf.benchmark(model.id, name), 0.5, blob)
                shelf.ledger.record_score(replace(found, **more), run_id=run_id)
    shelf.ledger.ingest()
    fallen = [("worse",), ("worse, errors",)]
    assert shelf.ledger.query("SELECT task FROM changes WHERE worse ORDER BY task").rows == fallen
    assert shelf.ledger.query("SELECT task FROM regressions ORDER BY task").rows == fallen


def test_scores_that_differ_by_rounding_share_a_place(shelf: Shelf) -> None:
    """Conversations with 1/3 and 1 right have another mean than two with 2/3, by one last digit."""
    stack = Shelf.fused(Shelf.adapter(1))
    models = [Shelf.router(stack, seed=night) for night in range(3)]
    for spec in (Shelf.base, Shelf.adapter(1), stack, *models):
        shelf.make(spec)
    for model, value in zip(models, (0.1 + 0.2, 0.3, 0.299), strict=True):
        shelf.measure(model, "conversation-3", value)
    shelf.ledger.ingest()
    found = shelf.ledger.query("SELECT place FROM leaderboard ORDER BY value DESC")
    assert found.rows == [(1,), (1,), (3,)]


def test_a_model_without_a_dropped_expert_is_made_from_it_and_does_not_contain_it(
    shelf: Shelf,
) -> None:
    kept, dropped = Shelf.adapter(1), Shelf.adapter(2)
    whole, rest = Shelf.fused(kept, dropped), Shelf.fused(kept)
    before = Shelf.router(whole)
    after = replace(Shelf.router(rest), grown_from=before.id)
    for spec in (Shelf.base, kept, dropped, whole, rest, before, after):
        shelf.make(spec)
    for number, spec in enumerate((kept, dropped)):
        verdict = AdapterVerdict(
            f"expert-{number}", "", f"a/{number}", COMMIT, "accept", adapter_id=spec.id
        )
        shelf.ledger.record_adapter(verdict, run_id="r1")
    shelf.ledger.ingest()
    made_from = "SELECT relative_id FROM lineage WHERE relation = 'made from' AND artifact_id = '"
    assert (dropped.id,) in shelf.ledger.query(f"{made_from}{after.id}'").rows
    (contain,) = (sql for title, sql in examples() if title.startswith("Which models contain"))
    found = [(name, used) for name, _, _, used in shelf.ledger.query(contain).rows]
    assert ("expert-0", brief(after.id)) in found
    with_both = [used for name, used in found if name == "expert-1"]
    assert with_both == [brief(whole.id), brief(before.id)]


def test_examples_know_in_which_direction_a_metric_is_better(tmp_path: Path) -> None:
    shelf, expert = Shelf(tmp_path), Shelf.adapter(1)
    stack = Shelf.fused(expert)
    model = Shelf.router(stack)
    for spec in (Shelf.base, expert, stack, model):
        shelf.make(spec)
    blob = shelf.ledger.blobs.put_bytes(b"answers")
    found_apart = []
    for task, metric, of_model, of_expert, higher in (
        ("sorting", "exact_match", 0.5, 0.6, True),
        ("sorting", "rouge1", 0.7, 0.8, True),
        ("composite-3", "composite_attempted", 1.0, 1.0, True),
        ("errors", "ter", 0.4, 0.1, False),
        ("fewer errors", "ter", 0.1, 0.4, False),
    ):
        for subject, value in ((model, of_model), (expert, of_expert)):
            asked = replace(Shelf.benchmark(subject.id, task), metric=metric)
            found = replace(Shelf.score(asked, value, blob), higher_is_better=higher)
            shelf.ledger.record_score(found, run_id="r1")
        ids = [replace(asked, subject_id=subject.id).id for subject in (model, expert)]
        apart = of_model - of_expert
        if metric != "rouge1":  # only the first metric of a task is compared
            found_apart.append(apart_on(task, metric, *ids, apart, p=1.0 if apart == 0 else 0.01))
    record_comparison(shelf, model, found_apart)
    shelf.ledger.ingest()
    by_title = {title[:20]: sql for title, sql in examples()}
    (means,) = shelf.ledger.query(by_title["How do my models com"]).rows
    assert means[2:] == (1, 0.5, None, 0.6)  # of the metric that is compared
    worse = shelf.ledger.query(by_title["On which tasks is a "]).rows
    assert [row[0] for row in worse] == ["errors", "sorting"]


def apart_on(
    task: str, metric: str, own: ArtifactId, other: ArtifactId, apart: float, p: float
) -> Difference:
    return Difference(
        task, metric, own, other, apart, apart - 0.1, apart + 0.1, p, p, "mcnemar", 100
    )


def record_comparison(shelf: Shelf, model: Spec, apart: Sequence[Difference]) -> None:
    """Record a comparison of a model with the oracle."""
    pairs = tuple(ScorePair(one.score_id, one.other_id) for one in apart)
    spec = ComparisonSpec(model.id, "fused", "oracle", pairs)
    built = ComparisonBuild(spec, tuple(apart), 0.0, -0.1, 0.1)
    shelf.ledger.record_artifact(spec, weights_sha256="", built=built, run_id="r1")


def test_a_task_that_is_tested_again_is_one_row_of_the_latest(shelf: Shelf) -> None:
    """Among more tasks, alone, and on other rows: each is a comparison of its own."""
    expert = Shelf.adapter(1)
    stack = Shelf.fused(expert)
    model = Shelf.router(stack)
    for spec in (Shelf.base, expert, stack, model):
        shelf.make(spec)
    blob = shelf.ledger.blobs.put_bytes(b"answers")

    def ask(task: str, rows: str, p: float) -> Difference:
        ids = []
        for subject in (model, expert):
            spec = replace(Shelf.benchmark(subject.id, task), rows_sha256=rows * 64)
            if spec.id not in shelf.ledger.scores_of([spec.id]):
                shelf.ledger.record_score(Shelf.score(spec, 0.5, blob), run_id="r1")
            ids.append(spec.id)
        return apart_on(task, "exact_match", *ids, -0.1, p)

    old = ask("sums", "1", 0.001)
    record_comparison(shelf, model, [old])
    record_comparison(shelf, model, [ask("sums", "2", 0.03)])  # alone: corrected for nothing
    record_comparison(shelf, model, [ask("sums", "2", 0.06), ask("dates", "2", 0.5)])
    shelf.ledger.ingest()
    found = shelf.ledger.query("SELECT task, p_holm FROM latest_comparisons").rows
    assert found == [("dates", 0.5), ("sums", 0.06)]
    assert len(shelf.ledger.query("FROM comparisons").rows) == 4
    worse = {title[:20]: sql for title, sql in examples()}["On which tasks is a "]
    assert not shelf.ledger.query(worse).rows
