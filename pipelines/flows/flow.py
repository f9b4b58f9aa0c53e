"""What runs, and in what order: Prefect tasks over the stages, which work without their decorators.

    resolve base ─▶ build base ─▶ discover, resolve, fetch, read each adapter ─▶ check ─▶ plan
        ─▶ stack ─▶ gates ─▶ benchmark ─▶ checkpoint ─▶ publish

A decorator says only how a stage runs: what may pass by itself is tried again, nothing is cached by
Prefect. Whether work is done already is the ledger's to know. What computes does so in a child
process, so that it can be stopped; no model library is loaded here.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import AdapterError
from pipelines.admission import sources, verdicts
from pipelines.flows import device_lock, missed_runs, run_page
from pipelines.flows.up_to_date import finished
from pipelines.planning import plan
from pipelines.recipe.stage import Stage
from pipelines.reports.summary import summarise
from pipelines.scoring import regressions
from pipelines.stages.worker_client import StageProcess
from pipelines.workspace.console import CONSOLE, say
from pipelines.workspace.context import RunContext
from store.errors import BusyError
from store.events import RunEnded, RunStarted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

    from meteora.artifacts import BaseSpec, BuiltBase, FusedCheckpoint, RouterBuild
    from pipelines.planning.plan import Plan

VERSIONS = ("torch", "transformers", "safetensors", "prefect", "duckdb", "lm-eval")


def may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether another try can help: the network's passing faults, and nothing else."""
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "retry", False))


def at_the_network(function: Callable[..., Any], name: str | None = None) -> Any:  # noqa: ANN401  (Prefect's decorator)
    """A task that is tried again while the fault is one that may pass.

    Args:
        name: Of its runs, with arguments in braces.
    """
    return task(
        task_run_name=name,
        retries=3,
        retry_delay_seconds=[2, 10, 60],
        retry_jitter_factor=0.5,
        retry_condition_fn=may_pass,
        cache_policy=NO_CACHE,
    )(function)


@dataclass(frozen=True)
class Run:
    """A run that goes on: where it works, who computes for it, and how it is followed."""

    work: RunContext
    child: StageProcess
    progress: run_page.Progress
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took, in the order in which they ran."""

    @contextmanager
    def stage(self, name: Stage) -> Generator[None]:
        started = time.perf_counter()
        self.progress.begin(name)
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)


resolve_base = at_the_network(sources.resolve_base)
discover = at_the_network(sources.discover)
resolve_adapter = at_the_network(sources.resolve_adapter, "resolve {expert.name}")
fetch_adapter = at_the_network(sources.fetch_adapter, "fetch {expert.name}")
check = task(cache_policy=NO_CACHE)(verdicts.check)


@at_the_network
def build_base(run: Run, base: BaseSpec) -> BuiltBase:
    return run.child.call("build_base", base, deadline_seconds=run.work.recipe.deadlines.base)


@task(cache_policy=NO_CACHE)
def stack(run: Run, planned: Plan) -> FusedCheckpoint:
    return run.child.call("stack", planned, deadline_seconds=run.work.recipe.deadlines.stack)


@task(cache_policy=NO_CACHE)
def fit_gates(run: Run, planned: Plan, built: BuiltBase, fused: FusedCheckpoint) -> RouterBuild:
    deadline = run.work.recipe.deadlines.gates
    return run.child.call("fit_gates", planned, built, fused, deadline_seconds=deadline)


@task(cache_policy=NO_CACHE)
def measure(run: Run, planned: Plan, built: BuiltBase, gates: RouterBuild) -> None:
    deadline = run.work.recipe.deadlines.benchmark
    run.child.call("measure", planned, built, gates, deadline_seconds=deadline)


@task(cache_policy=NO_CACHE)
def write_checkpoint(run: Run, planned: Plan, built: BuiltBase, gates: RouterBuild) -> Path:
    deadline = run.work.recipe.deadlines.stack
    return run.child.call("write_checkpoint", planned, built, gates, deadline_seconds=deadline)


@task(cache_policy=NO_CACHE)
def publish(run: Run, planned: Plan) -> None:
    run.child.call("publish", planned, deadline_seconds=run.work.recipe.deadlines.publish)


@flow(name="meteora", persist_result=False)
def fuse_adapters(recipe: str, home: str = "~/.meteora", until: Stage = Stage.publish) -> Any:  # noqa: ANN401
    """Make everything that a recipe asks for and the ledger does not hold, and record how it ended.

    Args:
        recipe: A recipe's path, or the name of a shipped one.
        home: The folder of ledger and blobs.
        until: Stop after this stage.

    Returns:
        Seconds by stage; by schedule, a state of Prefect's where there was nothing to do.

    Raises:
        BusyError: The recipe is being run by another process, and this run is none by schedule.
        MeteoraError: Something was refused or could not be done; it is recorded with its reason.
    """
    work = RunContext.open(recipe, Path(home).expanduser().absolute())
    with ExitStack() as held:
        held.enter_context(CONSOLE.listening(run_page.note))
        try:
            killed = held.enter_context(work.ledger.running(work.key))
        except BusyError as error:
            if missed_runs.is_scheduled():
                return missed_runs.skip_overlap(work, str(error))
            raise
        for before in killed:
            shutil.rmtree(work.home / "runs" / before.run_id, ignore_errors=True)
            say(f"the run {before.run_id} was killed; what it had finished is kept")
        run_page.introduce(work)
        run_page.close_killed(work, [before.run_id for before in killed])
        missed_runs.skip_late(work)
        if missed_runs.is_scheduled() and _finished(work, until):  # a person's command has looked
            say(f"{work.name}: nothing new")
            return Completed(message="nothing new: everything is in the ledger already")
        return _recorded(work, until)


def _finished(work: RunContext, until: Stage) -> bool:
    """Whether there is nothing to do; what is wrong is for the run to find, and to record."""
    try:
        return finished(work, until) is not None
    except MeteoraError:
        return False


def _recorded(work: RunContext, until: Stage) -> dict[str, float]:
    """The run itself, between the records of its beginning and of its end."""
    progress = run_page.Progress(work, until)
    with StageProcess(work, on_progress=progress.advance, on_message=run_page.note) as child:
        run = Run(work, child, progress)
        work.ledger.record_run(_started(run))
        began = time.perf_counter()
        outcome, reason = "stopped", "interrupted or cancelled"
        try:
            planned = _stages(run, until)
            outcome, reason = "ok", ""
        except MeteoraError as error:
            outcome = "refused" if isinstance(error, AdapterError) else "failed"
            reason = str(error)
            raise
        except Exception as error:
            outcome, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            child.close()
            wall_seconds = time.perf_counter() - began
            work.ledger.record_run(
                RunEnded(work.run_id, outcome, reason, wall_seconds, run.seconds)
            )
            work.ledger.ingest()
            shutil.rmtree(work.home / "runs" / work.run_id, ignore_errors=True)
    if planned is not None:
        _show(work, planned)
    return run.seconds


def _show(work: RunContext, planned: Plan) -> None:
    """What came out, on the run's page; and how it compares with what was before."""
    found = regressions.since_last(work.ledger, planned.router.id)
    for line in regressions.describe(found):
        say(line)
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    if summary is not None:
        run_page.show_results(work, planned, summary, found)


def _started(run: Run) -> RunStarted:
    work = run.work
    return RunStarted(
        work.run_id,
        recipe_name=work.key,
        recipe_sha256=work.recipe_sha256,
        versions={name: version(name) for name in VERSIONS},
        device=run.child.call("device", deadline_seconds=work.recipe.deadlines.base),
    )


def _stages(run: Run, until: Stage) -> Plan | None:
    """Every stage up to `until`; the plan where nothing of it is left to do."""
    work = run.work
    with run.stage(Stage.base):
        base = resolve_base(work.recipe, work.folder)
        built = build_base(run, base)
    if until is Stage.base:
        return None
    with run.stage(Stage.check):
        work = replace(work, recipe=discover(work.recipe))
        ask = partial(run.child.call, deadline_seconds=work.recipe.deadlines.stack)
        experts = verdicts.find_experts(
            work,
            built,
            resolve=resolve_adapter,
            fetch=fetch_adapter,
            proportion=partial(ask, "proportion"),
        )
        memory = ask("memory")
        check(work, built, experts, memory)
        planned = plan.make_plan(work.recipe, work.folder, base, experts)
    if until is Stage.check:
        return None
    with run.stage(Stage.stack):
        fused = stack(run, planned)
    if until is Stage.stack:
        return None
    with device_lock.held(*run.child.call("slots", deadline_seconds=work.recipe.deadlines.base)):
        with run.stage(Stage.gates):
            gates = fit_gates(run, planned, built, fused)
        if until is Stage.gates:
            return None
        with run.stage(Stage.benchmark):
            measure(run, planned, built, gates)
            write_checkpoint(run, planned, built, gates)
    if until is Stage.publish and work.recipe.publish is not None:
        with run.stage(Stage.publish):
            publish(run, planned)
    run.progress.end()
    return planned
