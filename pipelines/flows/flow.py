"""The order of a run: Prefect tasks over the stages, which also work without their decorators.

    resolve base ─▶ build base ─▶ discover, resolve, fetch, read each adapter ─▶ plan
        ─▶ stack ─▶ (divide the pool, plan again) ─▶ gates ─▶ benchmark ─▶ checkpoint ─▶ publish

A decorator only sets how a stage runs: after a passing fault it is tried again, and Prefect caches
nothing, since the ledger knows the finished work. All computing happens in a child process that can
be stopped; no model library is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TagsContext
from prefect.states import Completed

from meteora.artifacts import BaseSpec, BuiltBase, MeteoraError, RouterBuild
from meteora.base.sources import PATH
from meteora.untrusted.findings import counted
from pipelines.admission import sources, verdicts
from pipelines.flows import device_lock, missed_runs, run_page
from pipelines.flows.up_to_date import Look, look_or_reason
from pipelines.hub.upload import hub_to_publish
from pipelines.planning.resolve import Steps, complete, recording, resolve
from pipelines.recipe.recipe import DeadlinesSection, ExpertSection, FoundExpert, Recipe, locate
from pipelines.recipe.stage import Stage
from pipelines.reports.summary import Summary, summarise
from pipelines.scoring import regressions
from pipelines.stages.worker_client import StageProcess
from pipelines.workspace.console import CONSOLE, say
from pipelines.workspace.context import RunContext, name_of
from pipelines.workspace.cron import clock
from pipelines.workspace.faults import describe
from pipelines.workspace.recorded_run import alone, recorded, timed
from store.errors import BusyError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

    from pipelines.planning.plan import Plan


def may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether another try can help: only after a passing fault of the network, which is printed."""
    error = state.result(raise_on_failure=False)
    if not getattr(error, "retry", False):
        return False
    say(f"{error}; it is tried again", "note")
    return True


def at_the_network(function: Callable[..., Any], name: str | None = None) -> Any:  # noqa: ANN401  (Prefect's decorator)
    """A task, with runs called `name`, that is tried again after passing faults of the network."""
    return task(
        task_run_name=name,
        retries=3,
        retry_delay_seconds=[2, 10, 60],
        retry_jitter_factor=0.5,
        retry_condition_fn=may_pass,
        cache_policy=NO_CACHE,
    )(function)


@dataclass(frozen=True)
class Made:
    """The result of a run."""

    seconds: dict[str, float]
    """The seconds of each stage, in the order of the stages."""
    plan: Plan | None
    """None if the run stops before the benchmark, as `until` says."""
    summary: Summary | None
    """None if there is no plan."""


@dataclass(frozen=True)
class Run:
    """A run at work: its context, its child process, its progress."""

    context: RunContext
    child: StageProcess
    progress: run_page.Progress
    seconds: dict[str, float] = field(default_factory=dict)
    """As in `Made`."""

    @property
    def deadlines(self) -> DeadlinesSection:
        """The recipe's deadlines: a stage that takes longer is stopped."""
        return self.context.recipe.deadlines

    @contextmanager
    def stage(self, name: Stage) -> Generator[None]:
        self.progress.begin(name)
        with timed(self.seconds, name):
            yield


resolve_base = at_the_network(sources.resolve_base)
discover = at_the_network(sources.discover)
resolve_adapter = at_the_network(sources.resolve_adapter, "resolve {expert.name}")
fetch_adapter = at_the_network(sources.fetch_adapter, "fetch {expert.name}")
require_stackable = task(cache_policy=NO_CACHE)(verdicts.require_stackable)


@at_the_network
def build_base(run: Run, base: BaseSpec) -> BuiltBase:
    return run.child.call("build_base", base, deadline_seconds=run.deadlines.base)


@task(cache_policy=NO_CACHE)
def stack(run: Run, plan: Plan) -> None:
    run.child.call("stack", plan, deadline_seconds=run.deadlines.stack)


@task(cache_policy=NO_CACHE)
def divide_pool(run: Run, plan: Plan) -> Plan:
    """Divide the pool's prompts among the experts; returns the final plan."""
    run.child.call("divide_pool", plan, deadline_seconds=run.deadlines.gates)
    return complete(run.context, plan)


@task(cache_policy=NO_CACHE)
def fit_gates(run: Run, plan: Plan) -> RouterBuild:
    return run.child.call("fit_gates", plan, deadline_seconds=run.deadlines.gates)


@task(cache_policy=NO_CACHE)
def measure(run: Run, plan: Plan, gates: RouterBuild) -> None:
    run.child.call("measure", plan, gates, deadline_seconds=run.deadlines.benchmark)


@task(cache_policy=NO_CACHE)
def write_checkpoint(run: Run, plan: Plan, gates: RouterBuild) -> None:
    run.child.call("write_checkpoint", plan, gates, deadline_seconds=run.deadlines.stack)


@task(cache_policy=NO_CACHE)
def publish(run: Run, plan: Plan) -> None:
    run.child.call("publish", plan, deadline_seconds=run.deadlines.publish)


@flow(name="meteora", persist_result=False)
def fuse_adapters(recipe: str, home: str = "~/.meteora", until: Stage = Stage.publish) -> Any:  # noqa: ANN401
    """Make the parts of a recipe that the ledger does not have yet, and record the outcome.

    Args:
        recipe: A recipe's path, or the name of a shipped one.
        home: The folder of ledger and blobs.
        until: Stop after this stage.

    Returns:
        A `Made`; a scheduled run with nothing to do returns a state of Prefect's.

    Raises:
        BusyError: Another process runs this recipe, and this run is not a scheduled one.
        MeteoraError: A stage failed or refused its input; it is recorded with its reason.
    """
    folder = Path(home).expanduser().absolute()
    if not missed_runs.is_scheduled():
        return _run(RunContext.open(recipe, folder), until, None)
    missed_runs.send_first_event()
    name = name_of(locate(recipe))
    try:
        made = _run(RunContext.open(recipe, folder), until, None)
    except Exception as error:
        why = str(error) if isinstance(error, MeteoraError) else describe(error) or repr(error)
        say(f"{name}: failed on {clock()}: {why}", "error")
        raise
    if isinstance(made, Made):
        say(f"{name}: done on {clock()}")
    return made


def run_recipe(context: RunContext, until: Stage, looked: Look | None = None) -> Made:
    """`fuse_adapters` in the process that made the look: the run starts from it.

    A flow's parameters are sent to the server, so the look cannot be one of them.
    """

    @flow(name=fuse_adapters.name, persist_result=False)
    def start_from_look(recipe: str, home: str, until: Stage) -> Any:  # noqa: ANN401, ARG001  (for the page)
        return _run(context, until, looked)

    with tags(*run_page.tags_of(context)):  # before the flow starts, in case it is killed at once
        return start_from_look(str(context.path), str(context.home), until)


def _run(context: RunContext, until: Stage, looked: Look | None) -> Any:  # noqa: ANN401
    """Hold the recipe's lock, close the records of killed runs, and run."""
    with ExitStack() as held:
        held.enter_context(CONSOLE.listening(run_page.note))
        # no tags on tasks: each task would ask the server for a slot of every tag
        held.enter_context(TagsContext(current_tags=frozenset()))
        try:
            killed = held.enter_context(alone(context.ledger, context.key))
        except BusyError as error:
            if missed_runs.is_scheduled():
                return missed_runs.skip_overlap(context, str(error))
            raise
        for before in killed:
            say(f"the run {before.run_id} was killed; what it had finished is kept")
        run_page.introduce(context)
        run_page.close_killed(context)
        missed_runs.skip_late(context)
        if missed_runs.is_scheduled():
            looked = look_or_reason(context, until)
            if looked.summary:
                say(f"{context.name}: nothing new")
                return Completed(message="nothing new: everything is in the ledger already")
        return _recorded(context, until, looked or Look(None))


def _recorded(context: RunContext, until: Stage, looked: Look) -> Made:
    """Run between the records of its start and of its end."""
    progress = run_page.Progress(context, until)
    with StageProcess(context, on_progress=progress.advance, on_message=run_page.note) as child:
        run, asked = Run(context, child, progress), context.recipe_sha256
        try:
            device = child.call("device", deadline_seconds=context.recipe.deadlines.base)
        except MeteoraError:  # the process did not start, or found no device: that is recorded, too
            with recorded(context, context.key, asked, "", run.seconds):
                raise
        with recorded(context, context.key, asked, device, run.seconds), closing(child):
            plan = _stages(run, until, looked)
    return Made(run.seconds, plan, _show(context, plan) if plan else None)


def _show(context: RunContext, plan: Plan) -> Summary:
    """Show the results on the run's page, compared with those of the last checkpoint."""
    changes = regressions.since_last(context.ledger, plan.router.id)
    for line in regressions.describe(changes):
        say(line)
    summary = summarise(context.ledger, plan, context.base_folder(plan.base))
    assert summary is not None  # noqa: S101  (the checkpoint was written with it)
    run_page.show_results(context, plan, summary, changes)
    return summary


def _stages(run: Run, until: Stage, looked: Look) -> Plan | None:
    """Run every stage up to `until`; returns the plan if the benchmark is one of them."""
    context = run.context
    if until is Stage.publish and context.recipe.publish is not None:
        hub_to_publish(context.recipe, context.recipe.publish.repo)  # or it is refused at the end
    with run.stage(Stage.base):
        base = looked.base or resolve_base(context)
        built = build_base(run, base)
    if until is Stage.base:
        return None
    with run.stage(Stage.check):
        plan = resolve(context, built, _steps(run, built), looked.plan)
        run.child.call("check_prompts", plan, deadline_seconds=run.deadlines.stack)
    if until is Stage.check:
        return None
    with run.stage(Stage.stack):
        stack(run, plan)
    if until is Stage.stack:
        return None
    slots = run.child.call("slots", plan, deadline_seconds=run.deadlines.base)
    with device_lock.held(*slots):
        with run.stage(Stage.gates):
            if not plan.is_pool_divided:
                plan = divide_pool(run, plan)
            gates = fit_gates(run, plan)
        if until is Stage.gates:
            return None
        with run.stage(Stage.benchmark):
            measure(run, plan, gates)
            write_checkpoint(run, plan, gates)
    if until is Stage.publish and context.recipe.publish is not None:
        with device_lock.held(*slots), run.stage(Stage.publish):  # it computes, too
            publish(run, plan)
    run.progress.end()
    return plan


def _steps(run: Run, built: BuiltBase) -> Steps:
    """The steps of a run; those that use the network or may end the run are Prefect tasks."""
    ask = partial(run.child.call, deadline_seconds=run.deadlines.stack)
    memory_limit_bytes = ask("memory")
    return replace(
        recording(run.context, built, partial(ask, "proportion"), memory_limit_bytes),
        discover=_discover,
        resolve_adapter=_at_the_network_unless_local(resolve_adapter),
        fetch_adapter=_at_the_network_unless_local(fetch_adapter),
        check_stack=partial(require_stackable, run.context, memory_limit_bytes),
    )


def _at_the_network_unless_local(step: Task[..., Any]) -> Callable[..., Any]:
    """A step of an adapter: a task if it may ask the Hub, and a plain call for a folder.

    A task takes 0.1 s or more on the server, and a recipe may have thousands of folders.
    """

    def take(context: RunContext, expert: ExpertSection, *arguments: object) -> object:
        call = step.fn if expert.adapter.startswith(PATH) else step
        return call(context, expert, *arguments)

    return take


def _discover(recipe: Recipe) -> Recipe:
    recipe = discover(recipe)
    if found := sum(isinstance(expert, FoundExpert) for expert in recipe.experts):
        say(f"found {counted(found, 'adapter')} on the Hub")
    return recipe
