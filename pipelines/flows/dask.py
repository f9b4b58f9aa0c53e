"""Several recipes at once: each is a run of its own, given to whoever is free.

Who is free is Dask's to know, through Prefect's task runner for it: processes on this machine, or
the workers of a cluster. What two runs may not do at once is held off as ever: one recipe by its
lock, one GPU by its limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from meteora.artifacts import MeteoraError
from pipelines.flows import flow as flows
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.task_runners import TaskRunner


class NoDaskError(MeteoraError):
    """Dask is asked for and not installed."""


@task(cache_policy=NO_CACHE, task_run_name="{recipe}")
def run_recipe(recipe: str, home: str, until: Stage) -> str:
    """One recipe's run, in the process that took it; returns what was wrong, or nothing."""
    try:
        # by its module, which a worker imports: a flow that is sent along leaves behind what the
        # annotations of its parameters name
        flows.fuse_adapters(recipe, home, until)
    except MeteoraError as error:  # the others go on
        return str(error)
    return ""


@flow(name="meteora-many", persist_result=False)
def fuse_many(recipes: list[str], home: str, until: Stage = Stage.publish) -> dict[str, str]:
    """Run every recipe, whatever becomes of the others.

    Returns:
        What was wrong, by recipe; a recipe that was done is not in it.
    """
    futures = {recipe: run_recipe.submit(recipe, home, until) for recipe in recipes}
    wrong = {recipe: _outcome(future) for recipe, future in futures.items()}
    return {recipe: reason for recipe, reason in wrong.items() if reason}


def run_many(recipes: Sequence[str], home: str, until: Stage, dask: str) -> dict[str, str]:
    """Run recipes on Dask.

    Args:
        dask: A number of processes on this machine, or the address of a cluster's scheduler.

    Raises:
        NoDaskError: The extra `dask` is not installed.
    """
    on = fuse_many.with_options(task_runner=_task_runner(dask))
    say(f"{len(recipes)} recipes on Dask: {dask}")
    return on(list(recipes), home, until)


def _outcome(future: Any) -> str:  # noqa: ANN401  (each task runner has futures of its own)
    try:
        return future.result()
    except Exception as error:  # a worker that died, or a fault of ours: one recipe's, not all's
        return f"{type(error).__name__}: {error}"


def _task_runner(dask: str) -> TaskRunner[Any]:
    try:
        from prefect_dask import DaskTaskRunner  # noqa: PLC0415  (an extra)
    except ImportError:
        raise NoDaskError(
            "Dask is not installed; run `pip install 'meteora-pipelines[dask]'`"
        ) from None
    if dask.isdecimal():
        # one run a process: what computes does so in a process of its own
        return DaskTaskRunner(cluster_kwargs={"n_workers": int(dask), "threads_per_worker": 1})
    return DaskTaskRunner(address=dask)
