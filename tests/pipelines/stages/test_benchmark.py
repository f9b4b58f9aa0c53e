"""A checkpoint without a recipe of its own is measured, as a person would do it."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from safetensors.torch import load_file, save_file

from meteora.artifacts import ArtifactId, MeteoraError
from meteora.checkpoint.manifest import CARD, GATES, MANIFEST, STATISTICS, read_manifest
from pipelines.data.rows import ExamplesError, Row
from pipelines.evaluation.tasks import Task
from pipelines.planning.recorded_tasks import recorded_tasks
from pipelines.recipe.recipe import HubSection, Recipe, locate
from pipelines.stages.benchmark import (
    BenchmarkRequest,
    _choose_tasks,
    _note_untested,
    _write_card,
)
from store.events import RunStarted
from store.ledger import Ledger
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.conftest import letters, result_of, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from meteora.checkpoint.manifest import Manifest
    from pipelines.reports.summary import Summary
    from pipelines.workspace.context import RunContext
    from tests.conftest import World

pytestmark = pytest.mark.usefixtures("prefect_server")
LEADERBOARD = (
    "SELECT task, num_samples, base_value IS NOT NULL FROM leaderboard WHERE subject_id = "
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the first test, for the others."""
    return tmp_path_factory.mktemp("kept") / "home"


@pytest.fixture
def dropped(workplace: Callable[..., RunContext], kept: Path) -> tuple[RunContext, Path]:
    """A run, and its checkpoint without one expert."""
    work = workplace(benchmark={"limit": 2, "compare": ["base", "oracle"], "max_new_tokens": 1})
    if kept.exists():
        shutil.copytree(kept, work.home, dirs_exist_ok=True)
    else:
        run(work)
        plan, _ = result_of(work)
        folder = work.checkpoint_folder(plan.router.id)
        said = done("drop", folder, "attention", "--home", work.home)
        assert "dropped attention: router:" in said.stderr
        assert "has q_and_v\nall others have the weights and the gate rows of router:" in (
            said.stderr
        )
        assert re.search(
            r"no scores yet; measure it with `meteora benchmark router:\w+ --base FOLDER`",
            said.stderr,
        )
        shutil.copytree(work.home, kept)
    made = work.home.glob("checkpoints/*")
    return work, next(one for one in made if read_manifest(one).names == ["q_and_v"])


def benchmark(work: RunContext, folder: Path, recipe_folder: Path, *more: object):
    base = ("--base", recipe_folder / "base")
    return ask("benchmark", folder, *base, *more, "--home", work.home)


def test_a_changed_checkpoint_is_asked_what_its_experts_were_asked_before(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    work, folder = dropped
    router = read_manifest(folder).router_id
    page = tmp_path / "report.html"
    report = ("report", folder, "--base", recipe_folder / "base", "-o", page, "--home", work.home)
    said = ask(*report)
    assert f"`meteora benchmark {folder}`" in said.stderr
    before = len(work.ledger.query("FROM scores").rows)
    name = f"benchmark of {router[:19]}"
    work.ledger.record_run(RunStarted("20261126T000000-killed", name, "0" * 64))
    left = work.home / "runs" / "20261126T000000-killed" / "scratch"
    left.mkdir(parents=True)

    said = benchmark(work, folder, recipe_folder)
    assert said.returncode == 0, said.stderr
    assert "q_and_v" in said.stdout
    assert "measuring routing: 2 of 2 rows" in said.stderr
    assert "measuring switches" not in said.stderr  # one task has no change of subject
    rows = work.ledger.query(f"{LEADERBOARD}'{router}'").rows
    assert rows == [("q_and_v", 2, True)]
    assert len(work.ledger.query("FROM scores").rows) == before + 1  # base and oracle are recorded
    assert "exact_match" in (folder / CARD).read_text()
    done(*report)
    assert page.is_file()
    assert not work.ledger.verify().findings
    runs = "SELECT outcome, device, map_keys(stage_seconds), run_id FROM runs WHERE recipe_name ="
    ended, killed = work.ledger.query(f"{runs} '{name}'").rows
    assert ended[:3] == ("ok", "cpu", ["benchmark"])
    assert killed[0] == "killed"
    assert not left.exists()
    assert not (work.home / "runs" / ended[3]).exists()
    found = f"FROM scores WHERE run_id = '{ended[3]}' AND subject_id = '{router}'"
    assert len(work.ledger.query(found).rows) == 1

    again = benchmark(work, folder, recipe_folder)
    assert again.stdout == said.stdout  # nothing is asked twice
    assert len(work.ledger.query(f"{runs} '{name}'").rows) == 2  # and that is no run
    scored = json.loads(benchmark(work, folder, recipe_folder, "--json").stdout)
    assert scored["router_id"] == router
    assert {(one["task"], one["system"], one["num_samples"]) for one in scored["scores"]} == {
        ("q_and_v", system, 2) for system in ("fused", "base", "oracle")
    }
    assert len(work.ledger.query("FROM scores").rows) == before + 1
    base = read_manifest(folder).base.spec.id
    assert recorded_tasks(work.ledger, base, {"q_and_v": ArtifactId("adapter:" + "0" * 64)}) == {}


def test_a_full_disk_leaves_a_checkpoint_its_card_and_its_manifest(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were written over in place."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(world.checkpoint, folder)
    (folder / CARD).write_text("as it was made")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def cut(path: Path, _text: str, **_how: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    monkeypatch.setattr("pipelines.reports.card.write_card", lambda *_about: "with scores")
    with pytest.raises(MeteoraError, match="No space left"):
        _write_card(folder, world.manifest, cast("Summary", None))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_download_keeps_the_card_that_it_came_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache holds one file for all revisions with that card."""
    folder, kept = tmp_path / "snapshot", tmp_path / "blob"
    shutil.copytree(world.checkpoint, folder)
    kept.write_text("as it was published")
    (folder / CARD).symlink_to(kept)
    monkeypatch.setattr("pipelines.reports.card.write_card", lambda *_about: "with scores")
    _write_card(folder, world.manifest, cast("Summary", None))
    assert (folder / CARD).read_text() == kept.read_text() == "as it was published"
    (folder / CARD).unlink()
    _write_card(folder, world.manifest, cast("Summary", None))
    assert (folder / CARD).read_text() == "with scores"


def test_experts_without_test_rows_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _note_untested([f"e{number}" for number in range(1000)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "e7 (and 992 more) have no test rows; give some with --tasks e0=jsonl:FILE"
    )


def test_new_rows_a_recipe_and_other_systems_can_be_given(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    work, folder = dropped
    rows = tmp_path / "new.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in letters("attention", 7, 3)))
    said = benchmark(
        work, folder, recipe_folder, "--tasks", f"new=jsonl:{rows}", "--compare", "uniform"
    )
    assert said.returncode == 0, said.stderr
    router = read_manifest(folder).router_id
    asked = work.ledger.query(f"{LEADERBOARD}'{router}' ORDER BY task").rows
    assert asked == [("new", 2, False), ("q_and_v", 2, True)]  # as many rows as the others
    assert "uniform" in said.stdout

    said = benchmark(work, folder, recipe_folder, "--recipe", work.path, "--tasks", "q_and_v")
    assert said.returncode == 0, said.stderr
    for words, sentence in (
        (("--tasks", "q_and_w"), "there is no task 'q_and_w' (did you mean 'q_and_v'?)"),
        (("--compare", "orcale"), "compare.0: Input should be 'base', 'oracle'"),
        (("--tasks", "x=csv:y"), "rows come from `jsonl:…`"),
        (("--tasks", "="), "--tasks =: rows are given as NAME=SOURCE"),
        (("--tasks", "q_and_v="), "rows are given as NAME=SOURCE"),
        (("--tasks", "a|b=jsonl:y"), "a name may hold letters from a to z, digits"),
        (("--tasks", "composite-3=jsonl:y"), "and is none of a composite or a conversation"),
        (
            ("--tasks", "x=jsonl:y", "--tasks", "x=jsonl:z"),
            "--tasks has rows for x twice, jsonl:y and jsonl:z; take one out",
        ),
        (("--tasks", "conversation-3"), "name a recipe that asks it with --recipe FILE"),
    ):
        said = benchmark(work, folder, recipe_folder, *words)
        assert said.returncode == 1
        assert sentence in said.stderr


def test_examples_of_a_recipe_are_no_test_rows(
    dropped: tuple[RunContext, Path], recipe_folder: Path
) -> None:
    work, folder = dropped
    path = f"jsonl:{recipe_folder / 'q_and_v.train.jsonl'}"
    rows = ("--tasks", f"q_and_v={path}")
    said = benchmark(work, folder, recipe_folder, "--recipe", work.path, *rows)
    assert said.returncode == 1
    assert "is also an example of expert q_and_v" in said.stderr
    elsewhere = work.path.read_text().replace("q_and_v.train.jsonl", "elsewhere.jsonl")
    work.path.write_text(elsewhere)
    said = benchmark(work, folder, recipe_folder, "--recipe", work.path, "--tasks", "q_and_v")
    assert said.returncode == 0, "examples are not needed"


@pytest.mark.parametrize("with_recipe", [True, False])
def test_new_rows_of_an_expert_are_scored_as_its_others_are(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_recipe: bool
) -> None:
    """Its metric and its length were left out."""
    (tmp_path / "new.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    name = world.manifest.names[0]
    recipe = {
        "base": "path:base",
        "experts": [{"name": name, "adapter": "path:a", "metric": "rougeL", "max_new_tokens": 200}],
        "router": {"kind": "uniform"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    recorded = {name: Task(name, ("rougeL",), "auto", 200, rows=[Row("q", "r")], expert=name)}
    monkeypatch.setattr("pipelines.stages.benchmark.recorded_tasks", lambda *_about: recorded)
    request = BenchmarkRequest(
        (f"{name}=jsonl:{tmp_path / 'new.jsonl'}",),
        recipe=tmp_path / "recipe.yaml" if with_recipe else None,
    )
    _, tasks, _ = _choose_tasks(Ledger(tmp_path / "home"), world.manifest, "", request)
    assert (tasks[name].metrics, tasks[name].max_new_tokens) == (("rougeL",), 200)
    assert [row.prompt for row in tasks[name].rows] == ["a"]


def test_new_rows_of_a_further_task_are_scored_as_the_recipe_says(
    world: World, tmp_path: Path
) -> None:
    """The metric, the length and the template of the recipe's task were left out."""
    (tmp_path / "new.jsonl").write_text('{"prompt": "a", "response": "1"}\n')
    settings = {"metric": "numeric_match", "max_new_tokens": 9, "template": "plain"}
    recipe = {
        "base": "path:base",
        "experts": [{"name": world.manifest.names[0], "adapter": "path:a"}],
        "router": {"kind": "uniform"},
        "benchmark": {"tasks": [{"name": "sums", "rows": "jsonl:old.jsonl", **settings}]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    request = BenchmarkRequest(
        (f"sums=jsonl:{tmp_path / 'new.jsonl'}",), recipe=tmp_path / "recipe.yaml"
    )
    _, tasks, _ = _choose_tasks(Ledger(tmp_path / "home"), world.manifest, "", request)
    sums = tasks["sums"]
    assert (sums.metrics, sums.max_new_tokens) == (("numeric_match",), 9)
    assert (sums.template, [row.prompt for row in sums.rows]) == ("plain", ["a"])


def test_a_recipe_without_an_expert_s_task_does_not_replace_its_routes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its rows come with the token that it names."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "1"}\n')
    first, second, *_ = world.manifest.names
    recipe = {
        "base": "path:base",
        "experts": [{"name": first, "adapter": "path:a", "test": "jsonl:rows.jsonl"}],
        "router": {"kind": "uniform"},
        "hub": {"token_for": ["me"], "allow_http": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    hubs = []
    monkeypatch.setattr("pipelines.stages.benchmark.token_of_rows", hubs.append)
    request = BenchmarkRequest(recipe=tmp_path / "recipe.yaml", token_for=("you",))
    asked = Ledger(tmp_path / "home"), world.manifest, "", request
    for names, whole in (((first,), True), ((first, second), False)):
        monkeypatch.setattr(
            "pipelines.stages.benchmark.recorded_tasks",
            lambda _ledger, _base_id, asked, _router_id, names=names: asked.keys() & names,
        )
        _, tasks, is_whole = _choose_tasks(*asked)
        assert ([*tasks], is_whole) == ([first], whole)
    assert hubs[0] == HubSection(token_for=("me", "you"), allow_http=True)


def test_how_new_rows_are_asked_is_said_where_recorded_tasks_differ_in_it(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "new.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    first, second, *_ = world.manifest.names
    recorded = {
        name: Task(name, ("rougeL",), "plain", 9, [Row("q", "r")]) for name in (first, second)
    }
    monkeypatch.setattr("pipelines.stages.benchmark.recorded_tasks", lambda *_about: recorded)
    asked = Ledger(tmp_path / "home"), world.manifest, ""
    request = BenchmarkRequest((f"sums=jsonl:{tmp_path / 'new.jsonl'}",))
    _choose_tasks(*asked, request)
    assert capsys.readouterr().err == ""
    recorded[second] = replace(recorded[second], system_prompt="Arr.")
    _choose_tasks(*asked, BenchmarkRequest())
    assert capsys.readouterr().err == ""
    _choose_tasks(*asked, request)
    said = " ".join(capsys.readouterr().err.split())
    assert f"have 2 templates or system prompts; new rows are asked as {first} was" in said
    assert "with template plain and the default system prompt; choose others in a recipe" in said


def test_rows_of_a_shipped_recipe_lie_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were looked for where the program is installed."""
    monkeypatch.chdir(tmp_path)
    path = locate("llama2-13b")
    model = SimpleNamespace(names=[one.name for one in Recipe.load(path).experts])
    with pytest.raises(ExamplesError, match=f"^{tmp_path}/bigbench"):
        _choose_tasks(Ledger(tmp_path), cast("Manifest", model), "", BenchmarkRequest(recipe=path))


def test_a_checkpoint_is_measured_as_soon_as_it_is_made(
    dropped: tuple[RunContext, Path], recipe_folder: Path
) -> None:
    work, folder = dropped
    train, test = (
        f"jsonl:{recipe_folder / f'attention.{part}.jsonl'}" for part in ("train", "test")
    )
    words = ("attention", recipe_folder / "attention", train)
    where = ("--base", recipe_folder / "base", "--home", work.home)
    said = ask("add", folder, *words, "--test", train, *where)
    assert said.returncode == 1
    assert "attention.train.jsonl, line 1 with the prompt" in said.stderr
    assert "is also an example of expert attention, " in said.stderr

    said = done("add", folder, *words, "--test", test, *where)
    made = Path(said.stdout.splitlines()[0])
    router = read_manifest(made).router_id
    asked = work.ledger.query(f"{LEADERBOARD}'{router}' ORDER BY task").rows
    assert asked == [("attention", 2, True), ("q_and_v", 2, True)]

    said = done("drop", made, "q_and_v", "--benchmark", "--json", *where)
    change, scores = map(json.loads, said.stdout.splitlines())
    assert (change["grown_from"], change["experts"]) == (router, ["attention"])
    router = change["router_id"]
    assert scores["router_id"] == router
    assert work.ledger.query(f"{LEADERBOARD}'{router}'").rows == [("attention", 2, True)]


def test_how_a_model_computes_is_told_and_recorded(
    dropped: tuple[RunContext, Path], recipe_folder: Path
) -> None:
    work, folder = dropped
    train, test = (
        f"jsonl:{recipe_folder / f'attention.{part}.jsonl'}" for part in ("train", "test")
    )
    words = ("attention", recipe_folder / "attention", train, "--test", test)
    how = ("--dtype", "bfloat16", "--device", "cpu", "--home", work.home)
    said = done("add", folder, *words, "--base", recipe_folder / "base", *how)
    made = Path(said.stdout.splitlines()[0])
    router = read_manifest(made).router_id
    told = "SELECT DISTINCT subject_id FROM scores WHERE device = 'cpu, bfloat16'"
    assert work.ledger.query(told).rows == [(router,)]  # the others have theirs already
    fits = "SELECT id FROM routers WHERE device = 'cpu, bfloat16'"
    assert work.ledger.query(fits).rows == [(router,)]
    runs = "SELECT count(*) FROM runs WHERE device = 'cpu, bfloat16'"
    assert work.ledger.query(runs).rows == [(2,)]

    said = done("drop", made, "q_and_v", "--benchmark", "--base", recipe_folder / "base", *how)
    assert work.ledger.query(runs).rows == [(3,)]
    said = benchmark(work, made, recipe_folder, "--compare", "uniform", "--dtype", "float16")
    assert said.returncode == 0, said.stderr
    halves = "FROM scores WHERE device = 'cpu, float16'"
    assert len(work.ledger.query(halves).rows) == 2  # uniform on both tasks; the others are there


def test_the_routes_of_some_tasks_alone_are_not_those_of_a_router(
    dropped: tuple[RunContext, Path], recipe_folder: Path
) -> None:
    work, folder = dropped
    words = ("attention", recipe_folder / "attention")
    where = ("--base", recipe_folder / "base", "--home", work.home)
    said = ask("add", folder, *words, f"jsonl:{recipe_folder / 'attention.train.jsonl'}", *where)
    made = Path(said.stdout.strip())
    counts = "SELECT DISTINCT truth FROM routing_counts WHERE router_id ="
    counts = f"{counts} '{read_manifest(made).router_id}'"

    said = benchmark(work, made, recipe_folder, "--tasks", "attention")
    assert said.returncode == 0, said.stderr
    assert "measuring" not in said.stderr
    assert "Routing accuracy" not in said.stdout
    assert work.ledger.query(counts).rows == []
    said = benchmark(work, made, recipe_folder)
    assert "measuring routing: 4 of 4 rows" in said.stderr
    assert {row[0] for row in work.ledger.query(counts).rows} == {"attention", "q_and_v"}


@pytest.mark.parametrize(
    ("name", "rows"), [("attention", ""), ("other", " --tasks other=jsonl:FILE")]
)
def test_what_to_measure_next_asks_for_rows_only_where_none_are_recorded(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path, name: str, rows: str
) -> None:
    work, folder = dropped
    words = (name, recipe_folder / "attention", f"jsonl:{recipe_folder / 'attention.train.jsonl'}")
    base = shutil.copytree((recipe_folder / "base").resolve(), tmp_path / "a base")
    said = ask("add", folder, *words, "--base", base, "--home", work.home)
    next_one = re.search(r"measure it with `meteora (benchmark router:\w+ .*)`", said.stderr)
    assert next_one is not None
    assert next_one[1].endswith(f" --base '{base}'{rows}")
    if not rows:
        said = ask(*shlex.split(next_one[1]), "--home", work.home)
        assert "meteora report router:" in said.stdout
        assert said.stdout.endswith(f" --base '{base}'\n")
        said = ask("add", folder, *words, "--base", base, "--home", work.home)
        assert re.search(
            r"it was measured before; .* `meteora report router:\w+ --base '.*/a base'`$",
            said.stderr.strip(),
        )


def test_a_checkpoint_of_elsewhere_is_taken_in_under_ids_of_its_own(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    work, made = dropped
    came, home = tmp_path / "came", tmp_path / "other"
    shutil.copytree(made, came)
    (came / STATISTICS).unlink()  # the Hub's are not downloaded to measure
    theirs = read_manifest(came)
    where = ("--base", recipe_folder / "base", "--home", home)
    said = ask("benchmark", came, *where)
    assert said.returncode == 1
    assert (
        f"no task of its experts is in the ledger under {home}; give rows as --tasks" in said.stderr
    )
    assert not (home / "checkpoints").exists()
    assert not (home / "records").exists()

    rows = f"q_and_v=jsonl:{recipe_folder / 'q_and_v.test.jsonl'}"
    said = done("benchmark", came, "--tasks", rows, *where)
    assert f"{came} was not made here: it is taken in as router:" in said.stderr
    ledger = Ledger(home)
    (folder,) = (home / "checkpoints").iterdir()
    assert f"checkpoint: {folder}" in said.stdout
    ours = read_manifest(folder)
    assert ours.gates["adopted_from"] == theirs.router_id
    assert ours.base == theirs.base  # its bytes are the ones that the manifest names
    assert not {ours.router_id, ours.fused_id, *(e.adapter_id for e in ours.experts)} & {
        row[0] for row in work.ledger.query("SELECT id FROM artifacts").rows
    }
    assert ledger.query(f"{LEADERBOARD}'{ours.router_id}'").rows == [("q_and_v", 4, True)]
    alone = ledger.query("SELECT value = oracle_value, oracle_name FROM leaderboard")
    assert alone.rows == [(True, "q_and_v")]  # its one expert is all that it has
    lineage = "SELECT source, revision, weights_sha256 FROM lineage WHERE kind = 'adapter'"
    (expert,) = theirs.experts
    assert ledger.query(f"{lineage} AND artifact_id = '{ours.router_id}'").rows == [
        (expert.source, expert.revision, expert.weights_sha256)
    ]
    assert ledger.query("SELECT verdict, codes FROM adapters").rows == [("warn", ["adopted"])]
    assert not ledger.verify().findings
    assert "exact_match" in (folder / CARD).read_text()
    assert "exact_match" not in (came / CARD).read_text()

    for name in (came, ours.router_id[:19]):  # it is known now, by both names
        again = done("benchmark", name, *where)
        assert again.stdout == said.stdout
    page = tmp_path / "report.html"
    (folder / CARD).unlink()  # no report needs it
    done("report", came, "-o", page, "--traces", "0", *where)
    assert "taken in from elsewhere on" in page.read_text()
    done("benchmark", came, "--recipe", work.path, *where)
    asked = ledger.query(f"{LEADERBOARD}'{ours.router_id}' ORDER BY num_samples").rows
    assert asked == [("q_and_v", 2, True), ("q_and_v", 4, True)]


def test_a_manifest_that_names_recorded_ids_is_not_believed(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    """With another scaling it is another model, whatever ids it names."""
    work, made = dropped
    forged = tmp_path / "forged"
    shutil.copytree(made, forged)
    body = json.loads((forged / MANIFEST).read_text())
    for module in body["modules"].values():
        module["scaling"] = [2 * one for one in module["scaling"]]
    (forged / MANIFEST).write_text(json.dumps(body))
    ids = body["router_id"], body["experts"][0]["adapter_id"]
    scores = f"FROM scores WHERE subject_id IN {ids}"
    before = work.ledger.query(scores).rows
    base = "--base", recipe_folder / "base"
    for words in (  # each would tell of the model that has the id
        ("report", forged, *base, "-o", tmp_path / "report.html"),
        ("report", made, forged, *base, "-o", tmp_path / "report.html"),
        ("publish", forged, "me/model", *base),
        ("verify", forged, "--served", "http://127.0.0.1:9"),
    ):
        said = ask(*words, "--home", work.home)
        assert said.returncode == 1
        assert "which the ledger has with other files, routing or base" in said.stderr
    rows = f"new=jsonl:{recipe_folder / 'q_and_v.test.jsonl'}"
    said = benchmark(work, forged, recipe_folder, "--tasks", rows)
    assert said.returncode == 0, said.stderr
    assert "it is taken in as router:" in said.stderr
    assert work.ledger.query(scores).rows == before

    body["files"][GATES] = "0" * 64
    (forged / MANIFEST).write_text(json.dumps(body))
    said = benchmark(work, forged, recipe_folder, "--tasks", rows)
    assert said.returncode == 1
    assert "its SHA-256 is not the one that is named there" in said.stderr
    assert not work.ledger.verify().findings

    tuned = tmp_path / "tuned"  # a base with other bytes than the one that the manifest names
    shutil.copytree(recipe_folder / "base", tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file(
        {k: w * 1.01 for k, w in weights.items()}, tuned / "model.safetensors", {"format": "pt"}
    )
    said = done("benchmark", made, "--tasks", rows, "--base", tuned, "--home", work.home)
    bases = work.ledger.query("SELECT base_model FROM base_models ORDER BY ALL").rows
    assert bases == [("path:base",), ("path:tuned",)]
