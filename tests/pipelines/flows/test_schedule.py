"""What a scheduled run does about others that are due, on a real server with its real scheduler."""

from __future__ import annotations

import errno
import re
import time
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from pipelines.flows import missed_runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from pipelines.workspace.context import RunContext


def runs_of(client: SyncPrefectClient, deployment_id: UUID) -> list[FlowRun]:
    from prefect.client.schemas.filters import (  # noqa: PLC0415
        FlowRunFilter,
        FlowRunFilterDeploymentId,
    )

    only = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
    return client.read_flow_runs(flow_run_filter=only)


def wait_for_late(client: SyncPrefectClient, deployment_id: UUID, count: int) -> None:
    """Nobody runs what falls due every second."""
    from prefect.types._datetime import now  # noqa: PLC0415

    for _ in range(600):
        due = [run.expected_start_time for run in runs_of(client, deployment_id)]
        if sum(1 for when in due if when is not None and when < now("UTC")) >= count:
            return
        time.sleep(0.2)
    raise AssertionError("nothing fell due")


@pytest.mark.usefixtures("prefect_server")
def test_missed_runs_collapse_into_one_and_what_a_person_asked_for_stays(
    workplace: Callable[..., RunContext],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As after a night without power, or of a machine that slept: all are late at once."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.actions import DeploymentScheduleCreate  # noqa: PLC0415
    from prefect.client.schemas.schedules import CronSchedule  # noqa: PLC0415

    from pipelines.flows.flow import fuse_adapters  # noqa: PLC0415

    work = workplace()
    every_second: Any = CronSchedule(cron="* * * * * *")
    with get_client(sync_client=True) as client:
        deployment_id = client.create_deployment(
            client.create_flow(fuse_adapters),
            name="missed",
            schedules=[DeploymentScheduleCreate(schedule=every_second)],
        )
        monkeypatch.setattr(missed_runs.deployment, "get_id", lambda: str(deployment_id))
        wait_for_late(client, deployment_id, 4)
        asked = client.create_flow_run_from_deployment(deployment_id).id
        missed_runs.skip_late(work)
        client.pause_deployment(deployment_id)
        there = runs_of(client, deployment_id)
    missed = sum(run.state_name == "SkippedLate" for run in there)
    assert missed >= 4
    said = capfd.readouterr().err
    assert f"{work.name}: {missed} missed runs skipped, this one does the work" in said
    assert re.search(r": begins on 20.* \d\d:\d\d \S+; the next run is due on 20", said)
    assert next(run for run in there if run.id == asked).state_name == "Scheduled"
    question = "SELECT outcome, recipe_name, reason, started_at <= ended_at FROM runs"
    why = f"it was late, and run {work.run_id} does its work"
    assert work.ledger.query(question).rows == [("skipped_late", work.key, why, True)] * missed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (RuntimeError("of a library"), "RuntimeError('of a library')"),
    ],
)
def test_a_scheduled_run_that_fails_for_any_reason_says_so(
    error: Exception,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines.flows import flow  # noqa: PLC0415

    monkeypatch.setattr(missed_runs, "is_scheduled", lambda: True)
    monkeypatch.setattr(missed_runs, "send_first_event", lambda: None)
    monkeypatch.setattr(flow, "_run", Mock(side_effect=error))
    with pytest.raises(type(error)):
        flow.fuse_adapters.fn("quickstart", str(tmp_path))
    assert re.search(f"quickstart: failed on .*: {re.escape(said)}", capsys.readouterr().err)
