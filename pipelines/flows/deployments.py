"""Recipes that run by themselves: for each a deployment of Prefect's, and one runner for all.

Prefect schedules and starts the runs, each in a process of its own, and stops those that are
cancelled on its page. What a run does about other runs of its recipe: see `missed_runs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import flows as prefect_flows
from prefect.exceptions import PrefectException
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType

from meteora.artifacts import MeteoraError
from pipelines.flows import local_server
from pipelines.flows.flow import fuse_adapters
from pipelines.flows.run_page import TAG
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from prefect.deployments.runner import RunnerDeployment

    from pipelines.workspace.context import RunContext


class ServeError(MeteoraError):
    """Recipes cannot be served: the schedule is none, or the server takes no deployments."""


def read_schedule(cron: str, timezone: str) -> Schedule:
    """What a person wrote as a schedule.

    Raises:
        ServeError: That is no schedule, or no time zone.
    """
    try:
        return Cron(cron, timezone=timezone)
    except ValueError as error:
        raise ServeError(
            f"{cron!r} in {timezone!r} is no schedule ({error}); it takes minute, hour, day, month"
            ' and weekday, and a time zone such as Europe/Berlin: "0 3 * * *" is every night at'
            " three"
        ) from None


def serve(
    works: Sequence[RunContext],
    schedule: Schedule | None,
    *,
    limit: int,
    secret: Path | None = None,
) -> None:
    """Serve recipes until SIGINT or SIGTERM comes; runs that go on then are stopped, too.

    The schedules stay: what was missed when serving begins again is done by one run.

    Args:
        limit: Runs at the same time, of all recipes together; the others wait.
        secret: The file with what the server's page asks for, where that is known.

    Raises:
        ServeError: Two recipes are one, or the server refused.
    """
    keys = [work.key for work in works]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ServeError(f"the recipe {twice.pop()} is given twice; once is enough")
    for work in works:
        when = f"at {schedule.cron!r} ({schedule.timezone})" if schedule else "when asked to"
        say(f"{work.name}: runs {when}, as `meteora/{work.key}` on {local_server.page()}")
    if secret is not None:
        say(f"to log in there, paste the line that is in {secret}")
    try:
        prefect_flows.serve(
            *(_deployment(work, schedule) for work in works),
            pause_on_shutdown=False,
            print_starting_message=False,
            limit=limit,
        )
    except (PrefectException, OSError) as error:
        raise ServeError(f"the Prefect server took no deployments: {error}") from error


def _deployment(work: RunContext, schedule: Schedule | None) -> RunnerDeployment:
    return fuse_adapters.to_deployment(
        name=work.key,
        schedules=[schedule] if schedule else None,
        paused=False,
        parameters={"recipe": str(work.path.resolve()), "home": str(work.home)},
        tags=[TAG, f"recipe:{work.name}", f"base:{work.recipe.base}"],
        description=f"{work.name}: what the recipe asks for and the ledger does not hold yet.",
        version=work.recipe_sha256[:12],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )  # ty: ignore[invalid-explicit-return]  (no coroutine, outside a loop)
