"""Schedules that were not kept: the machine slept, or nobody served. One run does it all."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterExpectedStartTime
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from pipelines.flows.server_secret import read_or_make, secret_file
from pipelines.workspace.context import RunContext
from tests.pipelines.flows.test_local_server import servers, without_prefect
from tests.pipelines.flows.test_serve import start, stop, wait_for

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Generator

    from prefect.client.schemas.objects import FlowRun

pytestmark = pytest.mark.slow

EVERY_SECONDS = 8
MISSED_SECONDS = 4.5 * EVERY_SECONDS


@dataclass
class Nightly:
    """A recipe that is served with a local server of its own, which comes and goes with it."""

    folder: Path
    home: Path
    process: subprocess.Popen[bytes] = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.serve()

    @property
    def work(self) -> RunContext:
        return RunContext.open(str(self.folder / "recipe.yaml"), self.home)

    def serve(self) -> None:
        cron = f"* * * * * */{EVERY_SECONDS}"
        self.process, self.log = start(
            self.folder, self.home, "--cron", cron, env=without_prefect()
        )

    @contextmanager
    def client(self) -> Generator[SyncPrefectClient]:
        url = (self.home / "prefect" / "address").read_text()
        secret = read_or_make(secret_file(self.home))
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: secret}),
            get_client(sync_client=True) as client,
        ):
            yield client

    def runs(self, since: datetime, until: datetime) -> list[FlowRun]:
        """The runs that were due in a time, in that order; none while the server is away."""
        due = FlowRunFilterExpectedStartTime(after_=since, before_=until)
        only = FlowRunFilter(expected_start_time=due)
        with suppress(OSError, httpx.HTTPError), self.client() as client:
            order = FlowRunSort.EXPECTED_START_TIME_ASC
            return client.read_flow_runs(flow_run_filter=only, sort=order)
        return []

    def completed(self, since: datetime, until: datetime) -> list[FlowRun]:
        return [run for run in self.runs(since, until) if run.state and run.state.is_completed()]

    def family(self) -> list[int]:
        """What serves, its server, and all that they have started."""
        parents = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(after_name[1])
        found = [self.process.pid, *servers(self.home)]
        for pid in found:
            found += [
                child for child, above in parents.items() if above == pid and child not in found
            ]
        return found


@pytest.fixture(scope="module")
def nightly(recipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Nightly]:
    folder, home = tmp_path_factory.mktemp("nightly") / "letters", tmp_path_factory.mktemp("homes")
    shutil.copytree(recipe_folder, folder, symlinks=True)
    (folder / "none").mkdir(exist_ok=True)
    it = Nightly(folder, home / "home")
    try:
        yield it
    finally:
        stop(it.process)
    wait_for(lambda: not servers(it.home), "the end of the server")


def one_did_the_work_of_all(nightly: Nightly, since: datetime, until: datetime) -> None:
    """What was due in a time is done by one run, the first or one that was due before and waited.

    The others are recorded as skipped, on the server and in the ledger.
    """

    def due() -> list[FlowRun]:
        runs = nightly.runs(since, until)
        return runs if all(run.state and run.state.is_final() for run in runs) else []

    runs = wait_for(due, "the end of all that was due")
    late = [run for run in runs if run.state_name == "SkippedLate"]
    assert len(late) >= 3
    assert {run.state_name for run in runs[: len(runs) - len(late)]} <= {"Completed"}
    assert len(runs) - len(late) <= 1
    names = [f"{run.expected_start_time:%Y%m%dT%H%M%S}-{run.id.hex[-8:]}" for run in late]

    def recorded() -> set[str]:
        question = "SELECT run_id, reason FROM runs WHERE outcome = 'skipped_late'"
        reasons = dict(nightly.work.ledger.query(question).rows)
        return {reasons[name] for name in names} if reasons.keys() >= set(names) else set()

    (why,) = wait_for(recorded, "their records")
    assert {run.state.message for run in late if run.state} == {why}
    its_name = why.split()[5]
    before = since - timedelta(seconds=2 * MISSED_SECONDS)

    def done() -> bool:
        return any(its_name in run.name for run in nightly.completed(before, until))

    wait_for(done, "the end of the one that did their work")


def test_a_machine_that_slept_does_one_run_when_it_wakes(nightly: Nightly) -> None:
    """The server and a run that goes on sleep with it: whatever falls due meanwhile is one run."""
    began = datetime.now(UTC)
    wait_for(lambda: nightly.completed(began, datetime.now(UTC)), "a first run")
    secret = secret_file(nightly.home)
    assert f"to log in there, paste the line that is in {secret}\n" in nightly.log.read_text()
    asleep, slept = nightly.family(), datetime.now(UTC)
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(MISSED_SECONDS)
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    one_did_the_work_of_all(nightly, slept, datetime.now(UTC))
    assert nightly.process.poll() is None


def test_what_fell_due_while_nobody_served_is_one_run_once_somebody_does(nightly: Nightly) -> None:
    """The server was away, too: it was the home's own, and ended with its last user."""
    assert stop(nightly.process) == 0
    wait_for(lambda: not servers(nightly.home), "the end of the server")
    stopped = datetime.now(UTC)
    time.sleep(MISSED_SECONDS)
    resumed = datetime.now(UTC)
    nightly.serve()
    one_did_the_work_of_all(nightly, stopped, resumed)
    outcomes = nightly.work.ledger.query("SELECT outcome, count(*) FROM runs GROUP BY ALL").rows
    assert dict(outcomes)["ok"] == 1  # the others found nothing new
