"""What a scheduled run does about others of its recipe: those that were missed, and one that runs.

A run by schedule looks at everything anew, so one does the work of all that are due: after a night
without power the first to start cancels the rest. Two runs of one recipe never work at once,
whoever started them: that is the ledger's lock, which a killed run cannot leave behind, as it can a
slot on a server. Both kinds of skipped runs are recorded, like any other end of a run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment
from prefect.states import Cancelled

from pipelines.workspace.console import say
from store.events import RunEnded, RunStarted

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

    from pipelines.workspace.context import RunContext


def is_scheduled() -> bool:
    """Whether this run came from a deployment: by its schedule, or by a click on its page."""
    return deployment.get_id() is not None


def skip_overlap(work: RunContext, why: str) -> State[None]:
    """Record that this run found its recipe being run; returns how it ends."""
    say(f"{work.name}: skipped, {why}")
    _record(work, work.run_id, "skipped_overlap", why)
    work.ledger.ingest()
    return Cancelled(name="SkippedOverlap", message=why)


def skip_late(work: RunContext) -> int:
    """Cancel and record every other run of this deployment that is due; returns how many."""
    deployment_id = deployment.get_id()
    if deployment_id is None:
        return 0
    with get_client(sync_client=True) as client:
        due = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
                state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Scheduled", "Late"])),
                expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )
        late = [run for run in due if run.auto_scheduled]  # a person's click is not a schedule's
        why = f"it was late, and run {work.run_id} does its work"
        for run in late:
            client.set_flow_run_state(run.id, Cancelled(name="SkippedLate", message=why))
            _record(work, _name(run), "skipped_late", why)
    if late:
        work.ledger.ingest()
        say(f"{work.name}: {len(late)} missed runs are skipped, this one does their work")
    return len(late)


def _name(run: FlowRun) -> str:
    """Like a run that starts, by its time; the same name however often it is seen."""
    due = run.expected_start_time or datetime.now(UTC)
    return f"{due.astimezone(UTC):%Y%m%dT%H%M%S}-{run.id.hex[-8:]}"


def _record(work: RunContext, run_id: str, outcome: str, why: str) -> None:
    # its end first: a run without one is taken for killed by whoever gets the lock next
    work.ledger.record_run(RunEnded(run_id, outcome, why, 0.0))
    work.ledger.record_run(RunStarted(run_id, work.key, work.recipe_sha256))
