"""What runs, and in what order: Prefect tasks over the stages, which work without their decorators.

    resolve base ─▶ build base ─▶ discover, resolve, fetch, read each adapter ─▶ check ─▶ plan
        ─▶ stack ─▶ gates ─▶ benchmark ─▶ checkpoint

A decorator says only how a stage runs: what may pass by itself is tried again, nothing is cached by
Prefect. Whether work is done already is the ledger's to know.
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from meteora.adapters import AdapterError
from meteora.artifacts import MeteoraError
from meteora.checkpoint import CARD, EXPERTS, GATES, LINEAGE
from pipelines import card, judge, measures, plan, sources, stages
from pipelines.opening import describe
from pipelines.progress import say
from pipelines.recipe import Stage
from pipelines.summary import summarise
from pipelines.workplace import Workplace  # noqa: TC001  (Prefect reads annotations)
from store.events import RunEnded, RunStarted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

    from meteora.artifacts import BuiltBase, RouterBuild
    from pipelines.plan import Plan

VERSIONS = ("torch", "transformers", "safetensors", "prefect", "duckdb", "lm-eval")


def may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether another try can help: the network's passing faults, and nothing else."""
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "retry", False))


def at_the_network(function: Callable[..., Any]) -> Any:  # noqa: ANN401  (Prefect's decorator)
    """A task that is tried again while the fault is one that may pass."""
    return task(
        retries=3,
        retry_delay_seconds=[2, 10, 60],
        retry_jitter_factor=0.5,
        retry_condition_fn=may_pass,
        cache_policy=NO_CACHE,
    )(function)


resolve_base = at_the_network(sources.resolve_base)
discover = at_the_network(sources.discover)
resolve_adapter = at_the_network(sources.resolve_adapter)
fetch_adapter = at_the_network(sources.fetch_adapter)
build_base = at_the_network(stages.build_base)
check = task(cache_policy=NO_CACHE)(stages.check)
stack = task(cache_policy=NO_CACHE)(stages.stack)
fit_gates = task(cache_policy=NO_CACHE)(stages.fit_gates)
measure = task(cache_policy=NO_CACHE)(measures.measure)


@dataclass
class Clock:
    """How long each stage took, in seconds, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)


@flow(name="meteora", validate_parameters=False, persist_result=False)
def fuse_adapters(work: Workplace, until: Stage, clock: Clock) -> None:
    """Make everything that a recipe asks for and the ledger does not hold."""
    with clock.stage(Stage.base):
        base = resolve_base(work.recipe, work.folder)
        built = build_base(work, base)
    if until is Stage.base:
        return
    with clock.stage(Stage.check):
        work = replace(work, recipe=discover(work.recipe))
        experts = judge.find_experts(work, built, resolve=resolve_adapter, fetch=fetch_adapter)
        check(work, built, experts)
        planned = plan.make_plan(work.recipe, work.folder, base, experts)
    if until is Stage.check:
        return
    with clock.stage(Stage.stack):
        fused = stack(work, planned)
    if until is Stage.stack:
        return
    with clock.stage(Stage.gates):
        gates = fit_gates(work, planned, built, fused)
    if until is Stage.gates:
        return
    with clock.stage(Stage.benchmark):
        measure(work, planned, built, gates)
        finish(work, planned, built, gates)


def finish(work: Workplace, planned: Plan, built: BuiltBase, gates: RouterBuild) -> Path:
    """Write the checkpoint's folder with its card and lineage."""
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    if summary is None:
        raise MeteoraError("a measurement is missing, so no card can be written; run again")
    manifest = describe(planned, built, gates)
    files = {EXPERTS: str(work.ledger.weights_of(planned.fused.id))}
    if manifest.router.kind == "gate":
        files[GATES] = gates.weights_sha256
    texts = {
        CARD: card.write_card(manifest, summary, work.name),
        LINEAGE: card.write_lineage(manifest, files, work.recipe_sha256),
    }
    return stages.write_checkpoint(work, planned, built, gates, texts)


def run(work: Workplace, until: Stage = Stage.benchmark) -> Clock:
    """Run a recipe as a Prefect flow, under its lock, and record how it ended.

    Raises:
        BusyError: the recipe is being run by another process.
        MeteoraError: something was refused or could not be done; it is recorded with its reason.
    """
    with work.ledger.running(work.key) as killed:
        for run_before in killed:
            shutil.rmtree(work.home / "runs" / run_before.run_id, ignore_errors=True)
            say(f"the run {run_before.run_id} was killed; what it had finished is kept")
        work.ledger.record_run(_started(work))
        clock, began = Clock(), time.perf_counter()
        outcome, reason = "killed", "interrupted"
        try:
            fuse_adapters.with_options(flow_run_name=work.run_id)(work, until, clock)
            outcome, reason = "ok", ""
        except MeteoraError as error:
            outcome = "refused" if isinstance(error, AdapterError) else "failed"
            reason = str(error)
            raise
        except Exception as error:
            outcome, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            ended = RunEnded(
                work.run_id, outcome, reason, time.perf_counter() - began, clock.seconds
            )
            work.ledger.record_run(ended)
            work.ledger.ingest()
            shutil.rmtree(work.home / "runs" / work.run_id, ignore_errors=True)
    return clock


def _started(work: Workplace) -> RunStarted:
    return RunStarted(
        work.run_id,
        recipe_name=work.key,
        recipe_sha256=work.recipe_sha256,
        versions={name: version(name) for name in VERSIONS},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
