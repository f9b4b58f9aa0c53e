"""Several recipes in parallel on Dask: each is a run of its own, on a free worker.

Dask hands out the runs, through Prefect's task runner for it: to processes on this machine, or to
the workers of a cluster. Locks work as for other runs: one run of a recipe, one run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from meteora.artifacts import MeteoraError
from pipelines.flows import flow as flows
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.task_runners import TaskRunner


class NoDaskError(MeteoraError):
    """Dask is asked for and not installed."""


@task(cache_policy=NO_CACHE, task_run_name="{recipe}")
def run_recipe(recipe: str, home: str, until: Stage) -> str:
    """Run one recipe in a worker; returns the error's text, empty if there was none."""
    try:
        # called through its module, which a worker imports: a pickled flow lacks the names in its
        # annotations
        flows.run_recipe(RunContext.open(recipe, Path(home)), until)
    except MeteoraError as error:  # the others go on
        return str(error)
    return ""


@flow(name="meteora-many", persist_result=False)
def fuse_recipes(recipes: list[str], home: str, until: Stage = Stage.publish) -> dict[str, str]:
    """Run every recipe, whether or not others fail.

    Returns:
        The error's text by recipe, for those that failed.
    """
    futures = {recipe: run_recipe.submit(recipe, home, until) for recipe in recipes}
    wrong = {recipe: _outcome(future) for recipe, future in futures.items()}
    return {recipe: reason for recipe, reason in wrong.items() if reason}


def run_recipes(recipes: Sequence[str], home: str, until: Stage, dask: str) -> dict[str, str]:
    """Run recipes on Dask.

    Args:
        dask: A number of processes on this machine, or the address of a cluster's scheduler.

    Raises:
        NoDaskError: The extra `dask` is not installed.
    """
    on = fuse_recipes.with_options(task_runner=_task_runner(dask))
    say(f"{len(recipes)} recipes on Dask: {dask}")
    return on(list(recipes), home, until)


def _outcome(future: Any) -> str:  # noqa: ANN401  (each task runner has futures of its own)
    try:
        return future.result()
    except (
        Exception
    ) as error:  # a worker that died, or a fault of ours: it ends one recipe, not all
        return f"{type(error).__name__}: {error}"


def _task_runner(dask: str) -> TaskRunner[Any]:
    try:
        from prefect_dask import DaskTaskRunner  # noqa: PLC0415  (an extra)
    except ImportError:
        raise NoDaskError(
            "Dask is not installed; run `pip install 'meteora-pipelines[dask]'`"
        ) from None
    if dask.isdecimal():
        # one run a process: each computes in a child process of its own
        return DaskTaskRunner(cluster_kwargs={"n_workers": int(dask), "threads_per_worker": 1})
    return DaskTaskRunner(address=dask)
