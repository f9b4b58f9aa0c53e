"""Scheduled runs: their first event, and the runs to skip: missed ones, and overlapping ones.

Every scheduled run resolves its recipe again, so one run does the work of all that are due: after a
night without power the first one to start cancels the others. Two runs of one recipe never work at
the same time, by the ledger's lock: a killed run cannot leave it behind, as it could leave a slot
on a server. Both kinds of skipped runs are recorded.
"""

from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.runtime import deployment
from prefect.states import Cancelled

from meteora.untrusted.findings import counted
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext
from pipelines.workspace.cron import clock
from store.events import Outcome, RunEnded, RunStarted


def is_scheduled() -> bool:
    """Whether a deployment started this run: by its schedule, or by a click on its page."""
    return deployment.get_id() is not None


def send_first_event() -> None:
    """Send the first event of a scheduled run, since Prefect's scheduler sends none.

    Prefect delays an event until the one before it arrives, for a quarter of an hour at most. So
    without this, automations would hear late of a run that fails soon after it was due.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or not run.auto_scheduled:
        return
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(run.id)
    first = min(states, key=lambda state: state.timestamp)
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
    emit_event(f"prefect.flow-run.{first.name}", resource, id=first.id)


def skip_overlap(context: RunContext, why: str) -> State[None]:
    """Record that another run of the recipe is at work; returns the final state of this one."""
    say(f"{context.name}: skipped, {why}")
    _record(context, context.run_id, "skipped_overlap", why)
    context.ledger.ingest()
    return Cancelled(name="SkippedOverlap", message=why)


def skip_late(context: RunContext) -> None:
    """Cancel and record all other runs of this deployment that are due; say when the next is."""
    deployment_id = deployment.get_id()
    if deployment_id is None:
        return
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        due = _waiting(client, deployment_id, before_=now)
        coming = _waiting(client, deployment_id, after_=now)[:1]
        late = [run for run in due if run.auto_scheduled]  # a run that a person started stays
        why = f"it was late, and run {context.run_id} does its work"
        for run in late:
            client.set_flow_run_state(run.id, Cancelled(name="SkippedLate", message=why))
            _record(context, _name(run), "skipped_late", why)
    when = f"; the next run is due on {clock(coming[0].expected_start_time)}" if coming else ""
    say(f"{context.name}: begins on {clock(now)}{when}")
    if late:
        context.ledger.ingest()
        say(f"{context.name}: {counted(len(late), 'missed run')} skipped, this one does the work")


def _waiting(client: SyncPrefectClient, deployment_id: str, **when: datetime) -> list[FlowRun]:
    """The runs of a deployment that have not begun, the first due first."""
    asked = {
        "deployment_id": {"any_": [deployment_id]},
        "state": {"name": {"any_": ["Scheduled", "Late"]}},
        "expected_start_time": when,
    }
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(asked),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )


def _name(run: FlowRun) -> str:
    """A name like those of other runs, made of its due time; the same at every call."""
    due = run.expected_start_time or datetime.now(UTC)
    return f"{due.astimezone(UTC):%Y%m%dT%H%M%S}-{run.id.hex[-8:]}"


def _record(context: RunContext, run_id: str, outcome: Outcome, why: str) -> None:
    # the end first: the next run that gets the lock would take a run without an end for killed
    context.ledger.record_run(RunEnded(run_id, outcome, why, 0.0))
    context.ledger.record_run(RunStarted(run_id, context.key, context.recipe_sha256))
