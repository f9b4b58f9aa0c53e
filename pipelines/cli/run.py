"""`meteora run`, and `meteora schedule` for runs on a schedule."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli import options
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import say
from pipelines.workspace.environment import has_server, use_prefect_of

if TYPE_CHECKING:
    from pipelines.flows.flow import Made
    from pipelines.flows.up_to_date import Look
    from pipelines.workspace.context import RunContext

app = typer.Typer()
Recipes = Annotated[list[str], typer.Argument(help="Paths of recipes, or names of shipped ones.")]
URL = re.compile(r"https?://[^/\s]\S*$")
MOST_WORKERS = 1024
"""Processes of a cluster that is started for one command."""


@app.command()
def run(
    recipes: Recipes,
    until: Annotated[Stage, typer.Option(help="Stop after this stage.")] = Stage.publish,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
    ] = False,
    dask: Annotated[
        str,
        typer.Option(
            metavar="N|ADDRESS",
            help="Run recipes in parallel on Dask: processes to start, or a scheduler.",
        ),
    ] = "",
    ray: Annotated[
        str,
        typer.Option(metavar="N|ADDRESS", help="The same on Ray, such as ray://HOST:10001."),
    ] = "",
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Make the model of a recipe: download, check, stack, fit gates, benchmark, publish."""
    if dask and ray:
        raise typer.BadParameter("recipes run on Dask or on Ray; give one of --dask and --ray")
    numbers = [number for number in (dask, ray) if number.isdecimal()]
    if any(len(number) > 4 or not 0 < int(number) <= MOST_WORKERS for number in numbers):
        raise typer.BadParameter(f"--dask and --ray take 1 to {MOST_WORKERS}, or an address")
    if dry_run and as_json:
        raise typer.BadParameter("--dry-run prints text for people; leave out --json")
    use_prefect_of(home)
    try:
        from pipelines.flows.up_to_date import look, look_or_reason
        from pipelines.workspace.context import RunContext

        contexts = [RunContext.open(recipe, home) for recipe in recipes]
        if dry_run:
            whole = [_dry_run(context, until, alone=len(contexts) == 1) for context in contexts]
            failed = not all(whole)
        else:
            # an error that ends the command is told at once; of several recipes the others go on
            look_at = look if len(contexts) == 1 else look_or_reason
            looks = {context.key: look_at(context, until) for context in contexts}
            workers = ("dask", dask) if dask else ("ray", ray)
            failed = _run_all(contexts, looks, until, workers, as_json=as_json)
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


@app.command("serve", hidden=True)
@app.command()
def schedule(
    context: typer.Context,
    recipes: Recipes,
    cron: Annotated[str | None, typer.Option(help='The schedule, such as "0 3 * * *".')] = None,
    timezone: Annotated[str, typer.Option(help="The time zone of the schedule.")] = "UTC",
    limit: Annotated[int, options.count("Greatest number of runs at the same time.")] = 1,
    on_failure: Annotated[
        str, typer.Option(metavar="URL", help="A webhook to call when a run fails.")
    ] = "",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Run recipes on a schedule, or when you start them on their page, until stopped.

    Each run resolves its recipe again and makes only what changed. Runs that were missed while no
    schedule was running are replaced by one. A run is skipped while another run of its recipe
    goes on.
    """
    if context.info_name == "serve":
        say("`meteora serve` is called `meteora schedule` now; 0.3 drops the old name", "note")
    if on_failure and not URL.match(on_failure):
        raise typer.BadParameter(f"--on-failure takes a URL with http or https, not {on_failure!r}")
    if cron is None and timezone != "UTC":
        raise typer.BadParameter("--timezone is of a schedule; name that with --cron")
    if cron is not None:
        from pipelines.workspace.cron import require_schedule

        require_schedule(cron, timezone)
    use_prefect_of(home)
    from pipelines.workspace.context import RunContext

    contexts = [RunContext.open(recipe, home) for recipe in recipes]
    secret = _find_server(home)
    from pipelines.flows import deployments  # Prefect reads its settings when it is imported

    schedule = deployments.read_schedule(cron, timezone) if cron is not None else None
    if on_failure:
        from pipelines.flows.failure_webhook import call_on_failure

        call_on_failure(on_failure)
    deployments.serve(contexts, schedule, limit=limit, secret=secret)


def _dry_run(context: RunContext, until: Stage, *, alone: bool) -> bool:
    """Look at a recipe and print what a run would do; returns whether it would reach its end."""
    from pipelines.flows.up_to_date import look
    from pipelines.planning.dry_run import print_steps
    from pipelines.workspace.console import plain_console

    if not alone:
        print(f"{context.name}:")
    try:
        looked = look(context, until)
        if looked.summary:
            plain_console().print(f"{context.name}: everything is in the ledger already")
            return True
        return print_steps(context, looked.base, looked.built, looked.reason, until, looked.plan)
    except MeteoraError as error:
        if alone:
            raise
        say(f"{context.name}: {error}", "error")  # the other recipes go on
        return False


def _run_all(
    contexts: Sequence[RunContext],
    looks: Mapping[str, Look],
    until: Stage,
    workers: tuple[str, str],
    *,
    as_json: bool,
) -> bool:
    """Run unfinished recipes, and show the scores; returns whether a run failed.

    Args:
        looks: The look at each recipe, by its key.
        workers: Their kind (Dask, Ray), and their number or address; without it, runs are in turn.
    """
    # with a run that was killed after its last result: another run must record its end
    to_do = [
        context
        for context in contexts
        if not looks[context.key].summary or context.ledger.unended_here(context.key)
    ]
    for context in contexts:
        if context not in to_do:
            say(f"{context.name}: everything is in the ledger already, nothing to do")
    made: dict[str, Made] = {}
    wrong: dict[str, str] = {}
    if to_do:
        _find_server(to_do[0].home)
        if workers[1]:
            wrong = _run_on_workers(to_do, until, *workers)
        else:
            # earlier runs make later looks out of date: only the first run starts from a look
            first = looks[to_do[0].key]
            made, wrong = _run_in_turn(to_do, until, first, alone=len(contexts) == 1)
    failed = bool(wrong)
    for context in contexts:
        if context.key not in wrong:
            looked, one = looks[context.key], made.get(context.key)
            failed |= not _show(context, looked, one, until, as_json=as_json)
    for key, reason in wrong.items():
        say(f"{key}: {reason}", "error")
    if to_do:
        _leave_a_dead_server(failed)
    return failed


def _find_server(home: Path) -> Path | None:
    """Use the user's Prefect server, or else the home's own, whose file with the secret it returns.

    Call it before Prefect is imported.
    """
    if has_server():
        return None
    from pipelines.flows.local_server import use_local_server
    from pipelines.flows.server_secret import secret_file

    say("using a local Prefect server; set PREFECT_API_URL to use yours")
    use_local_server(home)
    return secret_file(home)


def _run_in_turn(
    contexts: Sequence[RunContext], until: Stage, first: Look, *, alone: bool
) -> tuple[dict[str, Made], dict[str, str]]:
    """Run recipes one after the other; returns results and errors, by the recipes' keys.

    Args:
        first: The look at the first recipe.
        alone: Whether an error ends the command, since there is no other recipe.
    """
    from pipelines.flows import flow, local_server

    made: dict[str, Made] = {}
    wrong: dict[str, str] = {}
    looked: Look | None = first
    for context in contexts:
        try:
            made[context.key] = flow.run_recipe(context, until, looked)
            if Stage.benchmark not in until.and_before():
                say(f"{context.name}: done up to {until}; the same command without --until goes on")
        except MeteoraError as error:
            if alone:
                raise
            wrong[context.key] = str(error)  # the other recipes go on
        except Exception as error:
            if local_server.answers():
                local_server.raise_if_it_failed(error)
                raise
            lost = f"the Prefect server was lost ({type(error).__name__})"
            if Stage.benchmark in until.and_before():
                # the run also ends without the server, and the ledger has its outcome
                say(f"{context.name}: {lost}", "note")
            else:
                wrong[context.key] = f"{lost}; the same command goes on where it stopped"
        looked = None
    return made, wrong


def _run_on_workers(
    contexts: Sequence[RunContext], until: Stage, kind: str, where: str
) -> dict[str, str]:
    """Run recipes on Dask or Ray; returns each error by its recipe's key."""
    from pipelines.flows.parallel import run_recipes

    keys = {str(context.path.absolute()): context.key for context in contexts}
    wrong = run_recipes(list(keys), str(contexts[0].home), until, kind, where)
    return {keys[path]: reason for path, reason in wrong.items()}


def _show(
    context: RunContext, looked: Look, made: Made | None, until: Stage, *, as_json: bool
) -> bool:
    """Show the scores of a recipe, if it has some; returns False if it is not finished.

    Args:
        made: None if nothing was left to do, if another process ran the recipe, or if the server
            was lost. Then the ledger has the outcome.
    """
    from pipelines.cli import score_table
    from pipelines.flows.up_to_date import look

    seconds = made.seconds if made else {}
    if Stage.benchmark not in until.and_before() and not looked.summary:
        if as_json:
            print(json.dumps({"name": context.name, "until": until, "seconds": seconds}))
        return True
    found: Made | Look = made if made and made.plan else looked
    if found.summary is None:
        found = look(context, until)
    if (plan := found.plan) is None or found.summary is None:
        again = "run it again: what is missing is made, or comes from a shared storage"
        say(f"{context.name}: not all of its results are under {context.home}; {again}", "error")
        return False
    folder, base = context.checkpoint_folder(plan.router.id), context.base_folder(plan.base)
    score_table.print_scores(
        context.name, folder, plan, found.summary, seconds, base=base, as_json=as_json
    )
    return True


def _leave_a_dead_server(failed: bool) -> None:
    from pipelines.flows import local_server

    if not local_server.answers():
        say("the Prefect server does not answer any more; what was finished is in the ledger")
        sys.stdout.flush()
        os._exit(int(failed))  # Prefect would wait for minutes for a server that is gone
