"""Several recipes in parallel, on Dask or on Ray: each is a run of its own, on a free worker.

Dask or Ray assigns the runs, through Prefect's task runner for it: to processes on this machine, or
to the workers of a cluster. Locks work as for other runs: one run of a recipe, one run on a GPU.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner

from meteora.artifacts import MeteoraError
from pipelines.flows import flow as flows
from pipelines.flows import local_server
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    # runs lock GPUs themselves and reserve none in Ray; without this Ray would hide them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Settings of a Ray that a command starts; the environment overrides them."""


class NoWorkersError(MeteoraError):
    """Dask or Ray is asked for, and is not installed or takes no runs."""


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
def fuse_recipes(recipes: list[str], home: str, until: Stage) -> dict[str, str]:
    """Run every recipe, whether or not others fail; returns as `run_recipes` does."""
    futures = {recipe: run_recipe.submit(recipe, home, until) for recipe in recipes}
    wrong = {recipe: _outcome(future) for recipe, future in futures.items()}
    return {recipe: reason for recipe, reason in wrong.items() if reason}


def run_recipes(
    recipes: Sequence[str], home: str, until: Stage, kind: str, where: str
) -> dict[str, str]:
    """Run recipes on Dask or Ray; returns the error's text by recipe, for those that failed.

    Args:
        kind: `dask` or `ray`
        where: a number of processes on this machine, or the address of a cluster

    Raises:
        NoWorkersError: The extra of that name is not installed, or the workers take no runs.
    """
    on = fuse_recipes.with_options(task_runner=_task_runner(kind, where))
    say(f"{len(recipes)} recipes on {kind.title()}: {where}")
    try:
        return on(list(recipes), home, until)
    except Exception as error:  # `_outcome` handles errors of runs, so here no run has begun
        if not local_server.answers():
            raise
        local_server.raise_if_it_failed(error)
        local = where.isdecimal()
        advice = "run again when this machine has less to do" if local else "check the address"
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise NoWorkersError(
            f"{kind.title()} at {where} takes no runs ({reason}); {advice}"
        ) from error


def _outcome(future: Any) -> str:  # noqa: ANN401  (each task runner has futures of its own)
    try:
        return future.result()
    except Exception as error:  # a worker died, or a fault of ours: it ends one recipe, not all
        return f"{type(error).__name__}: {error}"


def _task_runner(kind: str, where: str) -> TaskRunner[Any]:
    try:
        return _dask(where) if kind == "dask" else _ray(where)
    except ImportError:
        raise NoWorkersError(
            f"{kind.title()} is not installed; run `pip install 'meteora-pipelines[{kind}]'`"
        ) from None


def _dask(where: str) -> TaskRunner[Any]:
    from prefect_dask import DaskTaskRunner  # noqa: PLC0415  (an extra)

    if where.isdecimal():
        # one run a process: each computes in a child process of its own
        return DaskTaskRunner(cluster_kwargs={"n_workers": int(where), "threads_per_worker": 1})
    return DaskTaskRunner(address=where)


def _ray(where: str) -> TaskRunner[Any]:
    from prefect_ray import RayTaskRunner  # noqa: PLC0415  (an extra)

    if not where.isdecimal():
        return RayTaskRunner(address=where)
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    local = {"include_dashboard": False, "logging_level": "ERROR"}
    return RayTaskRunner(init_kwargs={"num_cpus": int(where), **local})
