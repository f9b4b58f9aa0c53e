"""Recipes that are served: a real server, a real runner, real processes, and what is recorded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import DeploymentStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import result_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from uuid import UUID

    from prefect.client.schemas.objects import Artifact, FlowRun

    from tests.conftest import World

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 300.0
"""How long a busy machine may take for a step that takes seconds."""


def wait_for(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.3)
    raise AssertionError(f"waited in vain for {what}")


@dataclass
class Served:
    """`meteora schedule` on one recipe: its process, its deployment, and where it works."""

    work: RunContext
    process: subprocess.Popen[bytes]
    log: Path
    client: SyncPrefectClient

    @property
    def deployment_id(self) -> UUID:
        return self.client.read_deployment_by_name(f"meteora/{self.work.key}").id

    def runs(self) -> list[FlowRun]:
        only = FlowRunFilterDeploymentId(any_=[self.deployment_id])
        return self.client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=only))

    def ended(self, run_id: UUID, name: str = "") -> FlowRun | None:
        run = self.client.read_flow_run(run_id)
        if run.state is None or not run.state.is_final() or (name and run.state.name != name):
            return None
        return run

    def ask(self) -> UUID:
        """Start a run as a click on the deployment's page does."""
        return self.client.create_flow_run_from_deployment(self.deployment_id).id

    def ask_and_wait(self) -> FlowRun:
        run_id = self.ask()
        return wait_for(lambda: self.ended(run_id), "a run that was asked for")

    def shown(self, run_id: UUID) -> dict[str, Artifact]:
        """What a run shows, by the first word of its key."""
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        found = self.client.read_artifacts(artifact_filter=only)
        return {str(one.key).partition("-")[0]: one for one in found}

    def told(self, run_id: UUID, text: str) -> str:
        """The line of the run's log that holds a text, if there is one."""
        only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        lines = [log.message for log in self.client.read_logs(log_filter=only)]
        return next((line for line in lines if text in line), "")

    def outcomes(self) -> list[tuple[str, str]]:
        answer = self.work.ledger.query("SELECT outcome, reason FROM runs ORDER BY ended_at")
        return [(outcome, reason) for outcome, reason in answer.rows]


WITH_SECONDS = """
from pipelines import cli
from pipelines.workspace import cron
cron.require_schedule = lambda *_: None
cli.main()
"""
"""The program with schedules of six fields: nobody waits for the next minute."""


def start(
    folder: Path, home: Path, *options: str, env: Mapping[str, str] = os.environ
) -> tuple[subprocess.Popen[bytes], Path]:
    log = home.with_suffix(".log")
    command = [sys.executable, "-c", WITH_SECONDS, "schedule", str(folder / "recipe.yaml")]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, "--home", str(home), *options], stdout=out, stderr=out,
            env={**env, "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
        )  # fmt: skip
    return process, log


def stop(process: subprocess.Popen[bytes]) -> int:
    with suppress(ProcessLookupError):
        process.terminate()
    return process.wait(timeout=60)


@pytest.fixture(scope="module")
def served(
    prefect_server: str, recipe_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Served]:
    assert prefect_server == os.environ["PREFECT_API_URL"]
    folder, home = tmp_path_factory.mktemp("served") / "letters", tmp_path_factory.mktemp("homes")
    shutil.copytree(recipe_folder, folder, symlinks=True)
    (folder / "none").mkdir(exist_ok=True)
    process, log = start(folder, home / "home", "--cron", "* * * * * */1")
    with get_client(sync_client=True) as client:
        work = RunContext.open(str(folder / "recipe.yaml"), home / "home")
        yield Served(work, process, log, client)
    assert stop(process) == 0, log.read_text()


def test_a_schedule_does_the_work_once_and_then_says_that_nothing_is_new(served: Served) -> None:
    """While the first run works others fall due: the next does the work of all, and says so."""

    def done() -> list[FlowRun]:
        with suppress(Exception):  # it is not deployed yet
            runs = served.runs()
            return [run for run in runs if run.state is not None and run.state.is_completed()]
        return []

    wait_for(lambda: len(done()) >= 2, f"two runs by schedule: {served.log.read_text()}")
    served.client.pause_deployment(served.deployment_id)
    wait_for(lambda: all(run.state and run.state.is_final() for run in served.runs()), "its rest")
    first, second = sorted(done(), key=lambda run: str(run.start_time))[:2]
    assert second.state is not None
    assert second.state.message == "nothing new: everything is in the ledger already"
    assert "letters: nothing new" in served.log.read_text()

    (run_id,) = served.work.ledger.query("SELECT run_id FROM runs WHERE outcome = 'ok'").rows[0]
    assert first.name == f"letters {run_id}"
    assert {"meteora", "recipe:letters", "base:path:base"} <= set(first.tags)
    assert first.parameters["recipe"] == str(served.work.path)
    shown = served.shown(first.id)
    assert set(shown) == {"progress", "adapters", "scores", "report"}
    assert shown["progress"].data == 100.0
    assert "q_and_v" in str(shown["adapters"].data)
    assert "exact_match" in str(shown["scores"].data)
    assert "## " in str(shown["report"].data)
    told = wait_for(lambda: served.told(first.id, "fitting the gates"), "what it says, in its log")
    assert "2 of 2 layers" in told

    late = [run for run in served.runs() if run.state and run.state.name == "SkippedLate"]
    told = [reason for outcome, reason in served.outcomes() if outcome == "skipped_late"]
    assert late
    assert len(told) >= len(late) > 0
    assert "does its work" in told[0]


def child_of(pid: int) -> int | None:
    """The process of stages that a runner's run has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"pipelines.stages.worker" in words:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
                if above == pid:
                    return int(entry.name)
    return None


def test_a_run_that_is_cancelled_on_its_page_stops_and_the_next_goes_on(
    served: Served, world: World
) -> None:
    """And an adapter that changed gives a new stack, which is compared with the last."""
    before, _ = result_of(served.work)
    (served.work.folder / "attention").unlink()
    (served.work.folder / "attention").symlink_to(world.adapters["all_seven"])
    asked = served.ask()
    wait_for(served.work.ledger.unended_runs, "the run's beginning")
    child = wait_for(lambda: child_of(served.process.pid), "the process of its stages")
    served.client.set_flow_run_state(asked, Cancelling())
    wait_for(lambda: served.ended(asked, "Cancelled"), "the end of a cancelled run")
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the end of the process of its stages")
    assert served.outcomes()[-1] == ("stopped", "interrupted or cancelled")

    ended = served.ask_and_wait()
    assert ended.state is not None
    assert ended.state.is_completed(), ended.state.message
    after, _ = result_of(served.work)
    assert after.fused.id != before.fused.id
    assert '"last"' in str(served.shown(ended.id)["scores"].data)
    question = "SELECT task, previous_id FROM changes WHERE router = 'gate' ORDER BY task"
    assert served.work.ledger.query(question).rows == [
        ("attention", before.router.id),
        ("q_and_v", before.router.id),
    ]
    text = served.log.read_text()
    assert "it was" in text or "scored the same" in text


def test_a_run_that_finds_its_recipe_being_run_is_skipped_and_recorded(served: Served) -> None:
    with served.work.ledger.running(served.work.key):
        ended = served.ask_and_wait()
    assert ended.state is not None
    assert ended.state.name == "SkippedOverlap"
    outcome, reason = served.outcomes()[-1]
    assert outcome == "skipped_overlap"
    assert "is being run by another process" in reason


def test_ctrl_c_ends_a_schedule_with_the_exit_status_of_all_commands(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    assert prefect_server == os.environ["PREFECT_API_URL"]
    key = RunContext.open(str(recipe_folder / "recipe.yaml"), tmp_path / "home").key
    process, log = start(recipe_folder, tmp_path / "home")
    with get_client(sync_client=True) as client:

        def is_served() -> bool:
            with suppress(ObjectNotFound):
                found = client.read_deployment_by_name(f"meteora/{key}")
                return found.status == DeploymentStatus.READY
            return False

        wait_for(is_served, "a runner that looks for runs")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
