"""`meteora serve`: runs by a schedule, from a page, or on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli_options import DEFAULT_HOME, Home
from pipelines.environment import has_server, prepare
from pipelines.progress import say

app = typer.Typer()


@app.command()
def serve(
    recipes: Annotated[list[str], typer.Argument(help="Recipes' paths, or names of shipped ones.")],
    cron: Annotated[str | None, typer.Option(help='When, such as "0 3 * * *".')] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedule's hours.")] = "UTC",
    limit: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    home: Home = DEFAULT_HOME,
) -> None:
    """Run recipes by a schedule, and whenever their page says so, until this is stopped.

    A run looks at everything anew and does only what changed. Runs that were missed are done by the
    next one, and none begins while another of its recipe goes on; both are recorded as skipped.
    """
    home = home.expanduser().absolute()
    prepare(home)
    from pipelines.workplace import Workplace

    works = [Workplace.open(recipe, home) for recipe in recipes]
    if not has_server():
        from pipelines.server import use_local_server

        say("using a local Prefect server; set PREFECT_API_URL to use yours")
        use_local_server(home)
    from pipelines import serving  # Prefect reads its settings when it is imported

    schedule = serving.read_schedule(cron, timezone) if cron else None
    serving.serve(works, schedule, limit=limit)
