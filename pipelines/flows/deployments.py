"""Recipes that run on a schedule: a Prefect deployment for each, and one runner for all.

Prefect starts the runs, each in a process of its own, and stops those that are cancelled on its
page. Runs that were missed or overlap: see `missed_runs`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.exceptions import PrefectException
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType

from meteora.artifacts import MeteoraError
from pipelines.flows import local_server
from pipelines.flows.flow import fuse_adapters
from pipelines.flows.run_page import tags_of
from pipelines.workspace.console import say
from pipelines.workspace.cron import clock

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

    from pipelines.workspace.context import RunContext


class ServeError(MeteoraError):
    """Recipes cannot be served: one is given twice, or the server does not take them."""


def read_schedule(cron: str, timezone: str) -> Schedule:
    """Read a cron line and a time zone that `require_schedule` accepted.

    Times are local. When the clock is set back, a time in the repeated hour is due once; when it is
    set forward, a skipped time is due at the next time that exists.

    Raises:
        ServeError: Prefect does not accept it.
    """
    try:
        return Cron(cron, timezone=timezone)
    except ValueError as error:
        raise ServeError(f"{cron!r} is no schedule of Prefect's ({error})") from None


def serve(
    contexts: Sequence[RunContext],
    schedule: Schedule | None,
    *,
    limit: int,
    secret: Path | None = None,
) -> None:
    """Serve recipes until SIGINT or SIGTERM, which also stops unfinished runs.

    The schedules stay on the server. When serving begins again, one run does all missed work.

    Args:
        limit: The most runs at the same time, of all recipes together; others wait.
        secret: The file with the password of the server's page; None if it is not known.

    Raises:
        ServeError: A recipe is given twice, or the server refused.
    """
    counts = Counter(context.key for context in contexts)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ServeError(f"the recipe {twice[0]} is given twice; once is enough")
    for name, count in Counter(context.name for context in contexts).items():
        if count > 1:
            alike = ", ".join(f"{c.path} as `{c.key}`" for c in contexts if c.name == name)
            say(f"{count} recipes are called {name}: {alike}; rename all but one", "note")
    when = _when(schedule)
    for context in contexts:
        say(f"{context.name}: runs {when}, as `meteora/{context.key}` on {local_server.page()}")
    if secret is not None:
        say(f"to log in there, paste the line that is in {secret}")
    try:
        # `prefect.serve` does the same, and hides Ctrl-C from the exit status
        runner = Runner(pause_on_shutdown=False, limit=limit)
        for context in contexts:
            runner.add_deployment(_deployment(context, schedule))
        asyncio.run(runner.start())
    except (PrefectException, OSError) as error:
        raise ServeError(f"the Prefect server took no deployments: {error}") from error


def _when(schedule: Schedule | None) -> str:
    """When recipes run, with the next time."""
    if schedule is None:
        return "when asked to"
    from prefect.server.schemas.schedules import CronSchedule  # noqa: PLC0415  (not needed in runs)

    cron = CronSchedule(cron=str(schedule.cron), timezone=schedule.timezone)
    coming = "".join(f", next on {clock(moment)}" for moment in asyncio.run(cron.get_dates(1)))
    return f"at {schedule.cron!r} ({schedule.timezone}){coming}"


def _deployment(context: RunContext, schedule: Schedule | None) -> RunnerDeployment:
    return fuse_adapters.to_deployment(
        name=context.key,
        schedules=[schedule] if schedule else None,
        paused=False,
        parameters={"recipe": str(context.path.absolute()), "home": str(context.home)},
        tags=tags_of(context),
        description=f"{context.name}: what the recipe asks for and the ledger does not hold yet.",
        version=context.recipe_sha256[:12],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )  # ty: ignore[invalid-explicit-return]  (no coroutine, outside a loop)
