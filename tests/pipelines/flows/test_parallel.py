"""Several recipes on two local workers, of Dask and of Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self
from unittest.mock import Mock

import pytest
import yaml
from prefect.task_runners import ThreadPoolTaskRunner

from pipelines.cli.run import _run_in_turn as run_in_turn
from pipelines.cli.run import _show as show
from pipelines.flows.up_to_date import Look
from pipelines.recipe.stage import Stage
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.pipelines.cli.command_line import ask
from tests.pipelines.flows.test_local_server import wait_until
from tests.pipelines.process_tree import descendants, ends, stat_of

KINDS = ("dask", "ray")
STEPS = {"first": 300, "second": 301}
"""Of gates that are trained, so that a run is still there when it is killed."""


@pytest.fixture
def recipes(recipe_folder: Path, tmp_path: Path) -> dict[str, Path]:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    broken = [{**body["experts"][0], "adapter": "path:nowhere"}, body["experts"][1]]
    changes = {name: {"gates": {"method": "joint", "steps": n}} for name, n in STEPS.items()}
    made = {}
    for name, change in {**changes, "broken": {"experts": broken}}.items():
        made[name] = recipe_folder / f"{name}-{tmp_path.name}.yaml"
        made[name].write_text(yaml.safe_dump(body | change))
    return made


def test_results_that_stayed_on_a_worker_s_own_disk_are_said(
    workplace: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    work = workplace()
    assert not show(work, Look(None), None, Stage.publish, as_json=False)
    assert f"not all of its results are under {work.home}; run it again" in capsys.readouterr().err


def test_a_run_up_to_an_early_stage_whose_server_was_lost_is_not_done(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else says how it ended; that of a whole run is in the ledger."""
    work = workplace()
    monkeypatch.setattr("pipelines.flows.local_server.answers", lambda: False)
    monkeypatch.setattr("pipelines.flows.flow.run_recipe", Mock(side_effect=ConnectionError))
    _, wrong = run_in_turn([work], Stage.gates, Look(None), alone=True)
    assert "the Prefect server was lost (ConnectionError); the same command" in wrong[work.key]
    assert run_in_turn([work], Stage.publish, Look(None), alone=True) == ({}, {})


def start(kind: str, server: str, home: Path, *recipes: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "pipelines.cli", "run", *map(str, recipes),
            f"--{kind}", "2", "--until", "gates", "--home", str(home),
        ],
        env=os.environ | {"PREFECT_API_URL": server},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def stages(running: subprocess.Popen[str]) -> list[int]:
    """The processes that compute the stages of its runs."""
    return descendants(running.pid, "pipelines.stages.worker")


def at_work(running: subprocess.Popen[str], home: Path) -> bool:
    """Whether each of its runs that computes is recorded, and there is one."""
    there = home.is_dir() and stages(running)
    return bool(there) and len(there) == len(Ledger(home).unended_runs())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_share_the_recipes_and_one_that_fails_stops_no_other(
    kind: str, prefect_server: str, recipes: dict[str, Path], tmp_path: Path
) -> None:
    running = start(kind, prefect_server, tmp_path / "home", *recipes.values())
    _, said = running.communicate()
    assert running.returncode == 1, said
    assert "error: broken-" in said
    assert "nowhere" in said
    ledger = Ledger(tmp_path / "home")
    rows = ledger.query("SELECT split_part(recipe_name, '-', 1), outcome FROM runs ORDER BY 1").rows
    assert [row for row in rows if row[1] == "ok"] == [("first", "ok"), ("second", "ok")]
    together = ledger.query(  # a run's name begins with its time
        "SELECT max(run_id) < strftime(min(ended_at), '%Y%m%dT%H%M%S') FROM runs"
        " WHERE outcome = 'ok'"
    )
    assert together.rows == [(True,)]
    assert ledger.query("SELECT count(*) FROM artifacts WHERE kind = 'fused'").rows == [(1,)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_killed_loses_nothing(
    kind: str, prefect_server: str, recipes: dict[str, Path], tmp_path: Path
) -> None:
    """Its run is given to another worker, which closes the killed one and makes the same."""
    home = tmp_path / "home"
    running = start(kind, prefect_server, home, recipes["first"], recipes["second"])
    wait_until(lambda: at_work(running, home), seconds=600)
    victim = int(stat_of(stages(running)[0])[1])
    os.kill(victim, signal.SIGKILL)
    _, said = running.communicate()
    assert running.returncode == 0, said
    ledger = Ledger(home)
    rows = ledger.query("SELECT outcome, count(*) FROM runs GROUP BY ALL ORDER BY 1").rows
    assert rows == [("killed", 1), ("ok", 2)]
    assert ledger.query("SELECT count(*) FROM artifacts WHERE kind = 'router'").rows == [(2,)]
    assert not ledger.verify().findings


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_as_a_whole_it_leaves_no_process_and_the_next_goes_on(
    kind: str, prefect_server: str, recipes: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    running = start(kind, prefect_server, home, recipes["first"], recipes["second"])
    wait_until(lambda: at_work(running, home), seconds=600)
    started = descendants(running.pid)
    running.kill()
    running.communicate()
    assert all(ends(pid, 300) for pid in started)
    again = start(kind, prefect_server, home, recipes["first"], recipes["second"])
    _, said = again.communicate()
    assert again.returncode == 0, said
    ledger = Ledger(home)
    outcomes = dict(ledger.query("SELECT outcome, count(*) FROM runs GROUP BY ALL").rows)
    # Ray asks the workers of one that is gone to stop, and they may have time to record it
    assert {"ok"} < outcomes.keys() <= {"killed", "stopped", "ok"}
    assert outcomes["ok"] == 2
    assert not ledger.verify().findings


@pytest.mark.parametrize("kind", KINDS)
def test_without_them_a_sentence_says_what_to_install(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.flows import parallel  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, f"prefect_{kind}", None)
    with pytest.raises(
        parallel.NoWorkersError, match=rf"pip install 'meteora-pipelines\[{kind}\]'"
    ):
        parallel._task_runner(kind, "2")


@pytest.mark.parametrize(
    ("where", "ends"),
    [("2", "run again when this machine has less to do"), ("tcp://a:1", "check the address")],
)
@pytest.mark.usefixtures("prefect_server")
def test_workers_that_do_not_start_are_one_sentence(
    where: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives a node 30 seconds; a machine under load may need more."""
    from pipelines.flows import parallel  # noqa: PLC0415

    class Slow(ThreadPoolTaskRunner):
        def __enter__(self) -> Self:
            raise Exception("The current node timed out during startup. This could happen\nif …")

    monkeypatch.setattr(parallel, "_ray", lambda _where: Slow())
    with pytest.raises(parallel.NoWorkersError) as raised:
        parallel.run_recipes(["a", "b"], "nowhere", Stage.gates, "ray", where)
    assert str(raised.value) == (
        f"Ray at {where} takes no runs (The current node timed out during startup. This could"
        f" happen); {ends}"
    )


def test_both_at_once_is_wrong_usage(recipe_folder: Path, tmp_path: Path) -> None:
    both = ("--dask", "2", "--ray", "2", "--home", tmp_path)
    said = ask("run", recipe_folder / "recipe.yaml", *both)
    assert said.returncode == 2
    assert "give one of --dask and --ray" in said.stderr
