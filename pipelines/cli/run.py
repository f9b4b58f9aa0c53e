"""Runs: now, as `meteora run` has them, or by a schedule, as `meteora serve` does."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli.options import DEFAULT_HOME, Home
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import say
from pipelines.workspace.environment import has_server, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext

app = typer.Typer()
WHOLE = (Stage.benchmark, Stage.publish)
"""Stages after which there are scores to show."""


@app.command()
def serve(
    recipes: Annotated[list[str], typer.Argument(help="Recipes' paths, or names of shipped ones.")],
    cron: Annotated[str | None, typer.Option(help='When, such as "0 3 * * *".')] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedule's hours.")] = "UTC",
    limit: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    on_failure: Annotated[str, typer.Option(metavar="URL", help="A webhook to call.")] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Run recipes by a schedule, and whenever their page says so, until this is stopped.

    A run looks at everything anew and does only what changed. Runs that were missed are done by the
    next one, and none begins while another of its recipe goes on; both are recorded as skipped.
    """
    home = home.expanduser().absolute()
    prepare(home)
    from pipelines.workspace.context import RunContext

    works = [RunContext.open(recipe, home) for recipe in recipes]
    secret = _find_server(home)
    from pipelines.flows import deployments  # Prefect reads its settings when it is imported

    schedule = deployments.read_schedule(cron, timezone) if cron else None
    if on_failure:
        from pipelines.flows.failure_webhook import tell

        tell(on_failure)
    deployments.serve(works, schedule, limit=limit, secret=secret)


def run(works: Sequence[RunContext], plans: Sequence[Plan | None], until: Stage, dask: str) -> None:
    """Do what is not done yet, one recipe after the other or on Dask, and show what came out.

    Args:
        plans: Of those that are finished already.
    """
    done = {work.key: planned for work, planned in zip(works, plans, strict=True) if planned}
    to_do = [work for work in works if work.key not in done]
    for work in works:
        if work.key in done:
            say(f"{work.name}: everything is in the ledger already, nothing to do")
    seconds: dict[str, dict[str, float]] = {}
    wrong: dict[str, str] = {}
    if to_do:
        _find_server(works[0].home)
        try:
            if dask:
                wrong = _on_dask(to_do, until, dask)
            else:
                for work in to_do:
                    seconds[work.key] = _run_one(work, until, wrong, alone=len(works) == 1)
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise typer.Exit(130) from None
    lacking = _show(works, done, to_do if until in WHOLE else (), seconds, until)
    for key, reason in wrong.items():
        say(f"{key}: {reason}", "error")
    failed = lacking or bool(wrong)
    if to_do:
        _leave_a_dead_server(failed)
    if failed:
        raise typer.Exit(1)


def _find_server(home: Path) -> Path | None:
    """The user's, or the home's own; call it before Prefect is imported.

    Returns:
        The file with the secret that the home's own asks for.
    """
    if has_server():
        return None
    from pipelines.flows.local_server import use_local_server
    from pipelines.flows.server_secret import secret_file

    say("using a local Prefect server; set PREFECT_API_URL to use yours")
    use_local_server(home)
    return secret_file(home)


def _run_one(
    work: RunContext, until: Stage, wrong: dict[str, str], *, alone: bool
) -> dict[str, float]:
    from pipelines.flows import flow, local_server

    try:
        return flow.fuse_adapters(str(work.path), str(work.home), until)
    except MeteoraError as error:
        if alone:
            raise
        wrong[work.key] = str(error)  # the others go on
    except Exception as error:
        if local_server.answers():
            raise
        # a run ends without the server, too: what the ledger holds says whether it did
        say(f"{work.name}: the Prefect server was lost ({type(error).__name__})", "note")
    return {}


def _on_dask(to_do: Sequence[RunContext], until: Stage, dask: str) -> dict[str, str]:
    from pipelines.flows.dask import run_many

    keys = {str(work.path.resolve()): work.key for work in to_do}
    wrong = run_many(list(keys), str(to_do[0].home), until, dask)
    return {keys[path]: reason for path, reason in wrong.items()}


def _show(
    works: Sequence[RunContext],
    done: dict[str, Plan],
    to_do: Sequence[RunContext],
    seconds: dict[str, dict[str, float]],
    until: Stage,
) -> bool:
    """Show every recipe that is finished now; returns whether one that should be is not."""
    from pipelines.cli import score_table
    from pipelines.flows.up_to_date import finished

    lacking = False
    for work in works:
        planned = done.get(work.key)
        if planned is None and work in to_do:
            planned = finished(work, until)
            lacking = lacking or planned is None
        if planned is not None:
            score_table.summary(work, planned, seconds.get(work.key, {}))
    return lacking


def _leave_a_dead_server(failed: bool) -> None:
    from pipelines.flows import local_server

    if not local_server.answers():
        say("the Prefect server does not answer any more; what was finished is in the ledger")
        sys.stdout.flush()
        os._exit(int(failed))  # Prefect would spend minutes on its farewells, one after the other
