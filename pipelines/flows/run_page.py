"""A run's page in Prefect: name, tags, log, progress, scores, and the model card.

The ledger is the record; the page is a view. If the server does not answer, the run goes on.
"""

import logging
import re
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import MissingContextError, PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Crashed

from meteora.artifacts import COMMIT, Score, canonical_sha256
from meteora.checkpoint.manifest import CARD
from pipelines.hub.client import hub_of, without_password
from pipelines.planning.plan import Plan
from pipelines.recipe.stage import Stage
from pipelines.reports.summary import Summary
from pipelines.scoring.regressions import Change
from pipelines.workspace.context import RunContext

logger = logging.getLogger(__name__)
TAG = "meteora"
"""The tag of all our runs and deployments, for filters and automations."""
LOOKED_AT = """
SELECT name, verdict, repo_id, revision, licence, array_to_string(messages, '; ') AS reasons
FROM adapters WHERE run_id = '{}'
"""


FAULTS = (httpx.HTTPError, PrefectException, ConcurrencySlotAcquisitionError, OSError, RuntimeError)


@contextmanager
def if_it_answers(request: str = "show a part of the run's page") -> Generator[None]:
    """Go on if the server does not do what is asked of it, with a warning in the log."""
    try:
        yield
    except FAULTS as error:
        logger.warning("the Prefect server did not %s: %s", request, error)


def tags_of(context: RunContext) -> list[str]:
    """The tags of a recipe's runs; the last one names the lock that a run of it holds."""
    shown = [TAG, f"recipe:{context.name}", f"base:{context.recipe.base}"]
    return [*shown, _lock_tag(context)]


def _lock_tag(context: RunContext) -> str:
    # with the host name: homes on two machines may share a path and a server
    digest = canonical_sha256([socket.gethostname(), str(context.home), context.key])
    return f"run-lock:{digest[:12]}"


def introduce(context: RunContext) -> None:
    """Give the flow run its name in the ledger, and its tags."""
    tags = {*flow_run.get_tags(), *tags_of(context)}
    with if_it_answers(), get_client(sync_client=True) as client:
        client.update_flow_run(
            UUID(flow_run.get_id()), name=f"{context.name} {context.run_id}", tags=sorted(tags)
        )


def note(text: str) -> None:
    """Write a line that was printed to the run's log, too, unless a thread of its own printed it.

    Such threads, as those of the store that exchange records, know no run.
    """
    with suppress(MissingContextError):
        get_run_logger().info(text)


def close_killed(context: RunContext) -> None:
    """Mark killed runs of the recipe as crashed; Prefect would show them as running without end.

    Call it under the recipe's lock: no other run with the lock's tag works then. A run that is
    about to find the lock taken overwrites this state when it ends.
    """
    begun = {"type": {"any_": [StateType.PENDING, StateType.RUNNING]}}
    with_tag = {"tags": {"all_": [_lock_tag(context)]}, "state": begun}
    runs = FlowRunFilter.model_validate(with_tag)
    tasks = TaskRunFilter.model_validate({"state": begun})
    state = Crashed(message="its process was killed")
    with if_it_answers(), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=runs):
            # a deployment's run is pending while its process starts
            waits = run.state_type is StateType.PENDING and run.deployment_id is not None
            if str(run.id) == flow_run.get_id() or waits:
                continue
            only = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
            for part in client.read_task_runs(flow_run_filter=only, task_run_filter=tasks):
                client.set_task_run_state(part.id, state, force=True)
            client.set_flow_run_state(run.id, state, force=True)


class Progress:
    """A bar on a run's page: each stage has an equal share of it."""

    def __init__(self, context: RunContext, until: Stage) -> None:
        self._stages = until.and_before()
        self._at = 0
        self._artifact: UUID | None = None
        with if_it_answers():
            key = f"progress-{_slug(context)}"
            self._artifact = create_progress_artifact(0.0, key=key)  # ty: ignore[invalid-assignment]  (no coroutine, outside a loop)

    def begin(self, stage: Stage) -> None:
        self._at = self._stages.index(stage)
        self._show(0.0, stage)

    def advance(self, what: str, done: int, total: int) -> None:
        self._show(done / max(1, total), f"{what}: {done} of {total}")

    def end(self) -> None:
        self._at = len(self._stages)  # not every recipe publishes
        self._show(0.0, "done")

    def _show(self, share: float, text: str) -> None:
        if self._artifact is not None:
            percent = 100.0 * (self._at + share) / len(self._stages)
            # a lost server is not called again: Prefect's client would retry for a minute
            artifact, self._artifact = self._artifact, None
            with if_it_answers():
                update_progress_artifact(artifact, percent, description=text)
                self._artifact = artifact


def show_results(
    context: RunContext, plan: Plan, summary: Summary, since_last: Sequence[Change]
) -> None:
    """Show verdicts, scores, the card, and links to the Hub on the run's page."""
    before = {(one.task, one.metric): one for one in since_last}
    rows = [_row(task, row, summary.systems, before) for task, row in summary.scores.items()]
    worse = [f"**{one.describe()}**" for one in since_last if one.worse]
    file = context.checkpoint_folder(plan.router.id) / CARD
    card = file.read_text(encoding="utf-8").split("---\n", 2)[2]
    sources = [(plan.base.base_model, plan.base.base_revision)]
    sources += [(expert.ref.repo_id, expert.ref.revision) for expert in plan.experts]
    if context.recipe.publish is not None:
        sources += [
            (one.repo_id, one.revision)
            for one in context.ledger.publications(context.recipe.publish.repo)
            if one.artifact_id == plan.router.id
        ]
    adapters = context.ledger.query(LOOKED_AT.format(context.run_id)).dicts
    slug = _slug(context)
    with if_it_answers():
        create_table_artifact(
            adapters, key=f"adapters-{slug}", description=f"{context.name}: adapters looked at"
        )
        create_table_artifact(rows, key=f"scores-{slug}", description=f"{context.name}: scores")
        create_markdown_artifact("\n\n".join((*worse, card)), key=f"report-{slug}")
        for repo_id, revision in dict.fromkeys(sources):  # recorded again with another tag
            if COMMIT.fullmatch(revision):
                url = without_password(hub_of(context.recipe, repo_id).url())
                create_link_artifact(f"{url}/{repo_id}/tree/{revision}", link_text=repo_id)


def _row(
    task: str,
    row: Mapping[str, Score],
    systems: Sequence[str],
    before: Mapping[tuple[str, str], Change],
) -> dict[str, str | int | float]:
    """A task's row of the table, with the score of the last checkpoint if there is one."""
    fused = row["fused"]
    cells: dict[str, str | int | float] = {
        "task": task,
        "metric": fused.spec.metric,
        "n": fused.num_samples,
    }
    cells |= {system: round(row[system].value, 4) for system in systems if system in row}
    if last := before.get((fused.spec.task, fused.spec.metric)):
        cells["last"] = round(last.previous, 4)
    return cells


def _slug(context: RunContext) -> str:
    """The recipe's key in the letters that Prefect allows in a key."""
    return re.sub(r"[^a-z0-9]+", "-", context.key.lower()).strip("-")
