"""The whole line on a tiny world: real files, real PEFT adapters, a real Prefect flow."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import yaml

import meteora
from meteora.artifacts import MeteoraError, canonical_sha256, file_sha256
from meteora.checkpoint.manifest import EXPERTS, FILES, GATES, LINEAGE, STATISTICS
from meteora.untrusted.findings import AdapterError
from pipelines.flows.local_server import HOST
from pipelines.flows.run_page import tags_of
from pipelines.recipe.stage import Stage
from pipelines.stages.worker_client import StageError, StageProcess
from pipelines.workspace.context import RunContext
from store.errors import BusyError
from tests.conftest import World
from tests.pipelines.conftest import Here, finished, print_steps, result_of, run
from tests.pipelines.flows.test_local_server import servers, wait_until, without_prefect
from tests.pipelines.process_tree import descendants, ends

ROOT = Path(__file__).parents[3]
QUICK = {"limit": 1, "compare": [], "max_new_tokens": 1}

pytestmark = pytest.mark.usefixtures("prefect_server")


def fingerprint(work: RunContext) -> str:
    """What a finished run left behind, but for times and run names."""
    planned, summary = result_of(work)
    scores = {
        f"{task}/{system}": [score.value, score.outputs_sha256]
        for task, row in summary.scores.items()
        for system, score in row.items()
    }
    weights = [work.ledger.weights_of(i) for i in (planned.fused.id, planned.router.id)]
    routing = summary.routing.accuracy if summary.routing else None
    return canonical_sha256([scores, weights, routing])


def test_a_run_makes_everything_and_a_second_finds_nothing_to_do(
    workplace: Callable[..., RunContext], world: World
) -> None:
    work = workplace()
    assert finished(work) is None
    seconds = run(work, apart=True)
    assert list(seconds) == [*Stage][:-1]  # it does not publish

    planned, summary = result_of(work)
    assert summary.systems == ["base", "oracle", "fused", "uniform", "arrow"]
    assert all(len(row) == 5 for row in summary.scores.values())
    assert summary.routing is not None
    assert summary.routing.accuracy > 0.9  # their alphabets have no letter in common

    folder = work.checkpoint_folder(planned.router.id)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    subjects = json.loads((folder / LINEAGE).read_text())["subject"]
    assert {s["name"]: s["digest"]["sha256"] for s in subjects} == {
        name: file_sha256(folder / name) for name in (EXPERTS, GATES, STATISTICS)
    }

    answer = work.ledger.query("SELECT outcome FROM runs")
    assert answer.rows == [("ok",)]
    assert work.ledger.query("SELECT count(DISTINCT task) FROM leaderboard").rows == [(2,)]
    assert not work.ledger.verify().findings

    model, tokenizer = meteora.load(folder, base_folder=world.base)
    prompt = tokenizer("abcd", return_tensors="pt")
    with torch.inference_mode(), meteora.force_expert(model, "q_and_v"):
        ours = model(**prompt).logits
    torch.testing.assert_close(
        ours, world.load_peft("q_and_v")(**prompt).logits, atol=1e-5, rtol=1e-5
    )


def test_what_is_asked_differently_is_made_and_the_rest_is_kept(
    workplace: Callable[..., RunContext],
) -> None:
    """Other gates need no other stack, and no base or oracle is measured twice."""
    benchmark = QUICK | {"compare": ["base", "oracle"]}
    work = workplace(benchmark=benchmark)
    run(work)
    before = work.ledger.query("SELECT id FROM artifacts WHERE kind = 'fused'").rows
    scores = work.ledger.query("SELECT count(*) FROM scores").rows[0][0]
    other = workplace(benchmark=benchmark, gates={"examples_per_expert": 4})
    assert finished(other) is None
    run(other)
    assert other.ledger.query("SELECT id FROM artifacts WHERE kind = 'fused'").rows == before
    assert other.ledger.query("SELECT count(*) FROM scores").rows[0][0] == scores + 2


def test_one_recipe_is_run_by_one_process_at_a_time(workplace: Callable[..., RunContext]) -> None:
    work = workplace()
    with work.ledger.running(work.key), pytest.raises(BusyError, match="another process"):
        run(work)


def test_a_refused_adapter_ends_the_run_or_is_left_out_as_the_recipe_says(
    workplace: Callable[..., RunContext], recipe_folder: Path
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    (recipe_folder / "none").mkdir(exist_ok=True)
    experts = [*body["experts"], {**body["experts"][0], "name": "empty", "adapter": "path:none"}]
    (recipe_folder / "none" / "adapter_model.safetensors").write_bytes(b"")

    work = workplace(experts=experts)
    with pytest.raises(AdapterError, match="empty"):
        run(work)
    assert work.ledger.query("SELECT outcome FROM runs").rows == [("refused",)]

    lenient = workplace(experts=experts, policy={"on_refused": "skip"}, benchmark=QUICK)
    run(lenient)
    planned, _ = result_of(lenient)
    assert planned.fused.names == ("q_and_v", "attention")
    refused = lenient.ledger.query("SELECT name FROM adapters WHERE verdict = 'refuse'").rows
    assert ("empty",) in refused


def test_one_bad_recipe_of_several_is_named_and_recorded_and_the_others_are_run(
    workplace: Callable[..., RunContext], recipe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.pipelines.cli.command_line import meteora  # noqa: PLC0415

    monkeypatch.setattr("pipelines.flows.flow.StageProcess", Here)
    bad, good = workplace(base="path:nowhere"), recipe_folder / "recipe.yaml"
    said = meteora("run", bad.path, good, "--dry-run", home=bad.home)
    assert said.returncode == 1
    assert re.search("error: changed: .*nowhere", said.stderr)
    assert "expert     attention" in said.stdout
    assert not bad.home.exists()

    said = meteora("run", bad.path, good, "--until", "stack", home=bad.home)
    assert said.returncode == 1
    assert re.search(f"error: {bad.key}: .*nowhere", said.stderr)
    outcomes = dict(bad.ledger.query("SELECT recipe_name, outcome FROM runs").rows)
    assert outcomes[bad.key] == "failed"
    assert sorted(outcomes.values()) == ["failed", "ok"]


def test_a_test_row_among_the_examples_is_refused(
    workplace: Callable[..., RunContext], recipe_folder: Path
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    leaky = [{**expert, "test": expert["examples"]} for expert in body["experts"]]
    work = workplace(experts=leaky)
    with pytest.raises(MeteoraError, match="is also an example"):
        run(work)


def test_a_process_of_stages_that_does_not_start_is_recorded(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Here):
        def call(self, stage: str, *_: Any, **__: Any) -> Any:
            raise StageError(f"{stage}: its process ended")

    monkeypatch.setattr("tests.pipelines.conftest.Here", Broken)
    work = workplace()
    with pytest.raises(StageError, match="device: its process ended"):
        run(work)
    runs = work.ledger.query("SELECT outcome, reason FROM runs").rows
    assert runs == [("failed", "device: its process ended")]


def test_a_stage_that_is_killed_or_late_fails_and_the_next_run_goes_on(
    workplace: Callable[..., RunContext],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = StageProcess.call

    def killed(self: StageProcess, stage: str, *arguments: object, **asked: Any) -> Any:
        if stage == "fit_gates":
            os.kill(self.pid, signal.SIGKILL)
        return call(self, stage, *arguments, **asked)

    monkeypatch.setattr(StageProcess, "call", killed)
    work = workplace()
    with pytest.raises(StageError, match=r"fit_gates: .* SIGKILL.* run again to go on"):
        run(work, "gates", apart=True)
    monkeypatch.undo()
    (stacked,) = work.ledger.query("SELECT run_id FROM artifacts WHERE kind = 'fused'").rows
    capsys.readouterr()
    print_steps(work)
    said = capsys.readouterr().out
    assert "here       base, stack: in the ledger already" in said
    assert re.findall(r"^  (\w+) +memory", said, re.MULTILINE) == ["check", "gates", "benchmark"]

    late = workplace(deadlines={"gates": "0.01s"})
    with pytest.raises(StageError, match=r"fit_gates: .* its deadline of 0\.01 s"):
        run(late, "gates", apart=True)
    run(work, "gates")
    assert work.ledger.query("SELECT run_id FROM artifacts WHERE kind = 'fused'").rows == [stacked]
    assert work.ledger.query("SELECT outcome FROM runs ORDER BY ended_at").rows == [
        ("failed",),
        ("failed",),
        ("ok",),
    ]


STEPS = (
    "resolve_base", "build_base", "resolve_adapter", "fetch_adapter", "require_stackable", "stack",
    "fit_gates", "measure", "write_checkpoint",
)  # fmt: skip

KILLED = """
import functools, os, signal, sys
from pathlib import Path
from pipelines.flows import flow as flows
from pipelines.recipe.stage import Stage
from pipelines.workspace.context import RunContext

recipe, home, victim = sys.argv[1:]

def kill(*_args):
    assert "torch" not in sys.modules  # that is for the process of the stages
    os.kill(os.getpid(), signal.SIGKILL)

if victim == "start":
    flows._run = kill
elif task := getattr(flows, victim, None):
    step = task.fn
    task.fn = functools.wraps(step)(lambda *args: kill(step(*args)))
flows.run_recipe(RunContext.open(recipe, Path(home)), Stage.publish)
"""


def kill_after(step: str, work: RunContext) -> None:
    """Run a recipe in a process that kills itself at the end of a step, inside its task."""
    command = [sys.executable, "-c", KILLED, str(work.path), str(work.home), step]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_killed_runs_are_closed_by_the_next_in_the_ledger_and_on_the_server(
    workplace: Callable[..., RunContext],
) -> None:
    """One of them was killed after Prefect had begun it, and before it was recorded."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas import filters  # noqa: PLC0415

    work = workplace()
    kill_after("stack", work)
    kill_after("start", work)
    (run_id,) = [one.run_id for one in work.ledger.unended_runs()]
    (lock,) = [tag for tag in tags_of(work) if tag.startswith("run-lock:")]
    all_runs = filters.FlowRunFilter(tags=filters.FlowRunFilterTags(all_=[lock]))
    with get_client(sync_client=True) as client:
        wait_until(lambda: len(client.read_task_runs(flow_run_filter=all_runs)) > 2, seconds=20)
        before = client.read_flow_runs(flow_run_filter=all_runs)
        run(work, "stack")
        after = client.read_flow_runs(flow_run_filter=all_runs)
        tasks = client.read_task_runs(flow_run_filter=all_runs)
    assert [one.state_name for one in before] == ["Running"] * 2
    assert sorted(str(one.state_name) for one in after) == ["Completed", "Crashed", "Crashed"]
    assert {one.state_name for one in tasks} <= {"Completed", "Crashed"}
    # an adapter in a folder asks no network, so it needs no task
    assert not [one for one in tasks if one.name.startswith(("resolve ", "fetch "))]
    assert dict(work.ledger.query("SELECT run_id, outcome FROM runs").rows)[run_id] == "killed"
    (stacked,) = work.ledger.query("SELECT run_id FROM artifacts WHERE kind = 'fused'").rows
    assert stacked == (run_id,)  # and not a second time


def test_a_run_that_is_killed_after_its_last_result_is_closed_by_the_next(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is left to do."""
    from tests.pipelines.cli.command_line import done  # noqa: PLC0415

    monkeypatch.setattr("pipelines.flows.flow.StageProcess", Here)
    work = workplace(benchmark=QUICK)
    kill_after("write_checkpoint", work)
    assert finished(work) is not None
    done("run", work.path, "--home", work.home)
    assert work.ledger.unended_runs() == []
    assert sorted(work.ledger.query("SELECT outcome FROM runs").rows) == [("killed",), ("ok",)]
    assert "nothing to do" in done("run", work.path, "--home", work.home).stderr


def keep_a_port_for(home: Path) -> str:
    """The URL at which a home's server will be, and nobody's when that one is gone.

    Others on the machine take Prefect's own port, or one that the system gives, from 32768 on.
    """
    for port in random.sample(range(20_000, 30_000), 10):
        with suppress(OSError), socket.create_server((HOST, port)):
            url = f"http://{HOST}:{port}/api"
            (home / "prefect" / "address").write_text(url)
            return url
    raise AssertionError("no port is free")


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["its own, started again", "the user's, gone"])
def test_a_run_outlives_its_server(
    recipe_folder: Path, tmp_path: Path, new_database: Path, own: bool
) -> None:
    """With nothing done twice, and the next run finds nothing to do."""
    from pipelines.flows.server_secret import read_or_make, secret_file  # noqa: PLC0415
    from store.ledger import Ledger  # noqa: PLC0415
    from tests.pipelines.flows.test_local_server import told, user  # noqa: PLC0415

    home, env = tmp_path / "home", without_prefect()
    with_server = home if own else tmp_path / "elsewhere"
    (with_server / "prefect").mkdir(mode=0o700, parents=True)
    shutil.copy(new_database, with_server / "prefect")
    elsewhere = None
    if not own:
        env["PREFECT_API_URL"] = keep_a_port_for(with_server)
        elsewhere = user(with_server)
        assert told(elsewhere) == (True, env["PREFECT_API_URL"])
        env["PREFECT_API_AUTH_STRING"] = read_or_make(secret_file(with_server))
        env["PREFECT_CLIENT_MAX_RETRIES"] = "1"  # else each request waits a minute for it
    command = [
        sys.executable, "-m", "pipelines.cli", "run", str(recipe_folder / "recipe.yaml"),
        "--home", str(home),
    ]  # fmt: skip
    running = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: bool(Ledger(home).unended_runs()), seconds=200)
    if elsewhere is not None:
        elsewhere.kill()  # who would start it again
        elsewhere.communicate()
    for pid in servers(with_server):
        os.kill(pid, signal.SIGKILL)
    _, said = running.communicate(timeout=500)
    assert running.returncode == 0, said
    if not own:
        assert "does not answer any more" in said
    began = time.monotonic()
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "nothing to do" in again.stderr
    assert time.monotonic() - began < 60
    ledger = Ledger(home)
    assert ledger.query("SELECT outcome FROM runs").rows == [("ok",)]
    assert not ledger.verify().findings


@pytest.mark.slow
def test_kill_9_between_any_two_stages_loses_nothing(
    recipe_folder: Path, tmp_path: Path, workplace: Callable[..., RunContext]
) -> None:
    """One home is killed after every stage in turn, another never: both end up with the same."""
    home = tmp_path / "killed"

    def run_until(victim: str) -> int:
        command = [sys.executable, "-c", KILLED, str(recipe_folder / "recipe.yaml"), str(home)]
        done = subprocess.run([*command, victim], check=False, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    for victim in STEPS:
        assert run_until(victim) == -signal.SIGKILL
    assert run_until("nobody") == 0

    unharmed = workplace()
    run(unharmed)
    from dataclasses import replace  # noqa: PLC0415

    from store.ledger import Ledger  # noqa: PLC0415

    killed = replace(unharmed, ledger=Ledger(home))
    assert fingerprint(killed) == fingerprint(unharmed)
    outcomes = killed.ledger.query("SELECT outcome, count(*) FROM runs GROUP BY ALL ORDER BY 1")
    assert outcomes.rows == [("killed", len(STEPS)), ("ok", 1)]
    assert not killed.ledger.verify().findings
    with duckdb.connect(str(home / "ledger.snapshot.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (10,)


@pytest.mark.slow
def test_a_run_that_is_told_to_end_ends_cleanly_and_the_next_goes_on(
    recipe_folder: Path, tmp_path: Path
) -> None:
    """SIGTERM, as a system sends it that shuts down."""
    from store.ledger import Ledger  # noqa: PLC0415

    home = tmp_path / "home"
    command = [
        sys.executable, "-m", "pipelines.cli", "run", str(recipe_folder / "recipe.yaml"),
        "--home", str(home), "--until", "stack",
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=without_prefect())
    wait_until(lambda: home.is_dir() and bool(Ledger(home).unended_runs()), seconds=200)
    started = descendants(running.pid)
    running.terminate()
    began = time.monotonic()
    assert running.wait(timeout=60) == -signal.SIGTERM
    assert time.monotonic() - began < 10
    stages = [pid for pid in started if pid not in servers(home)]
    assert stages
    assert all(map(ends, stages))
    ledger = Ledger(home)
    assert ledger.query("SELECT outcome FROM runs").rows == [("stopped",)]
    assert not list((home / "runs").glob("*/*"))
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=without_prefect())
    assert ledger.query("SELECT outcome FROM runs ORDER BY 1").rows == [("ok",), ("stopped",)]


DIGESTS = """
import sys
from pathlib import Path
from pipelines.stages import build
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import plan_of

work = RunContext.open(sys.argv[1], Path(sys.argv[2]))
planned = plan_of(work)
build.stack(work, planned)
gates = build.fit_gates(work, planned)
experts = work.ledger.weights_of(planned.fused.id)
print(planned.router.id, experts, gates.weights_sha256, gates.statistics_sha256)
"""


@pytest.mark.slow
def test_neither_place_nor_zone_nor_language_nor_hash_seed_changes_a_byte(
    recipe_folder: Path, tmp_path: Path
) -> None:
    made = set()
    for number, (zone, language, seed) in enumerate(
        (
            ("UTC", "C", "0"),
            ("Asia/Kathmandu", "tr_TR.UTF-8", "1"),
            ("America/Lima", "C.UTF-8", "7"),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        told = {"TZ": zone, "LC_ALL": language, "PYTHONHASHSEED": seed}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        said = subprocess.run(
            [sys.executable, "-c", DIGESTS, str(recipe_folder / "recipe.yaml"), str(place)],
            env=os.environ | told | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=place, capture_output=True, text=True, check=True,
        )  # fmt: skip
        made.add(said.stdout)
    assert len(made) == 1
    assert len(made.pop().split()) == 4
