"""A checkpoint without a recipe of its own is measured, as a person would do it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meteora.artifacts import ArtifactId
from meteora.checkpoint.manifest import CARD, read_manifest
from pipelines.planning.recorded_tasks import recorded_tasks
from store.events import RunStarted
from store.ledger import Ledger
from tests.pipelines.cli.command_line import ask
from tests.pipelines.conftest import finished, letters, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.workspace.context import RunContext

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
        plan = finished(work)
        assert plan is not None
        folder = work.checkpoint_folder(plan.router.id)
        said = ask("drop", folder, "attention", "--home", work.home)
        assert said.returncode == 0, said.stderr
        assert "dropped attention: router:" in said.stderr
        assert "has q_and_v\nall others are as in router:" in said.stderr
        assert "measure it with `meteora benchmark router:" in said.stderr
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
    assert f"`meteora benchmark {router[:19]}`" in said.stderr
    before = len(work.ledger.query("FROM scores").rows)
    name = f"benchmark of {router[:19]}"
    work.ledger.record_run(RunStarted("20261126T000000-killed", name, "0" * 64))
    left = work.home / "runs" / "20261126T000000-killed" / "scratch"
    left.mkdir(parents=True)

    said = benchmark(work, folder, recipe_folder)
    assert said.returncode == 0, said.stderr
    assert "q_and_v" in said.stdout
    rows = work.ledger.query(f"{LEADERBOARD}'{router}'").rows
    assert rows == [("q_and_v", 2, True)]
    assert len(work.ledger.query("FROM scores").rows) == before + 1  # base and oracle are recorded
    assert "exact_match" in (folder / CARD).read_text()
    assert ask(*report).returncode == 0
    assert page.is_file()
    assert not work.ledger.verify().findings
    runs = "SELECT outcome, device, map_keys(stage_seconds), run_id FROM runs WHERE recipe_name ="
    done, killed = work.ledger.query(f"{runs} '{name}'").rows
    assert done[:3] == ("ok", "cpu", ["benchmark"])
    assert killed[0] == "killed"
    assert not left.exists()
    assert not (work.home / "runs" / done[3]).exists()
    found = f"FROM scores WHERE run_id = '{done[3]}' AND subject_id = '{router}'"
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
    ):
        said = benchmark(work, folder, recipe_folder, *words)
        assert said.returncode == 1
        assert sentence in said.stderr


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

    said = ask("add", folder, *words, "--test", test, *where)
    assert said.returncode == 0, said.stderr
    made = Path(said.stdout.splitlines()[0])
    router = read_manifest(made).router_id
    asked = work.ledger.query(f"{LEADERBOARD}'{router}' ORDER BY task").rows
    assert asked == [("attention", 2, True), ("q_and_v", 2, True)]

    said = ask("drop", made, "q_and_v", "--benchmark", "--json", *where)
    assert said.returncode == 0, said.stderr
    change, scores = map(json.loads, said.stdout.splitlines())
    assert (change["grown_from"], change["experts"]) == (router, ["attention"])
    router = change["router_id"]
    assert scores["router_id"] == router
    assert work.ledger.query(f"{LEADERBOARD}'{router}'").rows == [("attention", 2, True)]


def test_what_is_not_in_the_ledger_is_not_measured(
    dropped: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    work, folder = dropped
    said = ask("benchmark", folder, "--base", recipe_folder / "base", "--home", tmp_path / "other")
    assert said.returncode == 1
    assert "this checkpoint is not in the ledger in" in said.stderr
    asked = re.search(r"`(python -m pipelines.lm_eval_model .*) --tasks TASK`", said.stderr)
    assert asked is not None
    assert f"pretrained={folder}" in asked[1]
    manifest = read_manifest(folder)
    strange = {"q_and_v": ArtifactId("adapter:" + "0" * 64)}
    base = work.ledger.spec_of(ArtifactId(manifest.fused_id))
    assert base is not None
    assert recorded_tasks(Ledger(work.home), base["base_id"], strange) == {}
