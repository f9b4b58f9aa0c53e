"""The stages that measure: every subject on every task, and where the router sends the tokens."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from meteora.artifacts import RouterBuild, RoutingBuild, RoutingScore, RoutingShare, Score
from meteora.model import force_expert, make_router, routed_by, without_experts
from pipelines import benchmark, judge
from pipelines.opening import opened
from pipelines.progress import bar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import BuiltBase
    from pipelines.plan import Measurement, Plan
    from pipelines.workplace import Workplace


def missing(work: Workplace, plan: Plan) -> list[Measurement]:
    """The measurements that the ledger does not hold yet."""
    return [m for m in plan.measurements if work.ledger.score_of(m.spec.id) is None]


def measure(work: Workplace, plan: Plan, built: BuiltBase, gates: RouterBuild) -> None:
    """Take every measurement that is missing, each recorded as it is done.

    One model serves all subjects: the base is the model without its experts, an adapter alone is
    the model with that expert forced, and tests prove both equal to the real thing.
    """
    to_do = missing(work, plan)
    owns_tests = any(name in plan.tests for name in plan.fused.names)
    watch = owns_tests and work.ledger.built(plan.routing.id) is None
    if not to_do and not watch:
        return
    for spec in plan.others.values():
        if work.ledger.weights_of(spec.id) is None:
            experts = str(work.ledger.weights_of(plan.fused.id))
            work.ledger.record_artifact(
                spec,
                weights_sha256=experts,
                built=RouterBuild(spec, experts, 0, None, 0.0, ""),
                blobs=[experts],
                run_id=work.run_id,
            )
    with opened(work, plan, built, gates) as (model, tokenizer):
        judge.probe(work, plan, model, tokenizer)
        for measurement in to_do:
            _measure_one(work, plan, measurement, model, tokenizer)
        if watch:
            _watch_routing(work, plan, model, tokenizer)


def _measure_one(
    work: Workplace,
    plan: Plan,
    measurement: Measurement,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    spec, settings = measurement.spec, work.recipe.benchmark
    rows = plan.tests[spec.task]
    with (
        _as_system(model, measurement, plan),
        bar(f"{spec.task}: {measurement.system}", len(rows), "rows") as advance,
    ):
        found = benchmark.measure(
            model,
            tokenizer,
            spec.task,
            rows,
            max_new_tokens=spec.max_new_tokens,
            batch_size=settings.batch_size,
            seed=spec.seed,
            advance=advance,
        )
    with work.scratch() as scratch:
        found.write_outputs(scratch / "outputs.parquet")
        outputs_sha256 = work.ledger.blobs.put(scratch / "outputs.parquet", move=True)
    score = Score(
        spec=spec,
        value=found.value,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        num_samples=found.num_samples,
        outputs_sha256=outputs_sha256,
        harness=found.harness,
        wall_seconds=found.wall_seconds,
    )
    work.ledger.record_score(score, run_id=work.run_id)


def _as_system(
    model: PreTrainedModel, measurement: Measurement, plan: Plan
) -> AbstractContextManager[None]:
    """The model as one of the systems that are compared."""
    if measurement.system == "fused":
        return nullcontext()
    if measurement.system == "base":
        return without_experts(model)
    if measurement.system == "oracle":
        return force_expert(model, measurement.expert)
    spec = plan.others[measurement.system]
    return routed_by(
        model, lambda layer: make_router(spec.router, layer, spec.top_k, spec.temperature)
    )


def _watch_routing(
    work: Workplace, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Feed each expert's own test rows, and count where every routed module sends their tokens."""
    started = time.perf_counter()
    names = plan.fused.names
    own = [name for name in names if name in plan.tests]
    scores: list[RoutingScore] = []
    with bar("watching the routes", sum(len(plan.tests[n]) for n in own), "rows") as advance:
        for truth in own:
            counts = benchmark.count_routes(
                model,
                tokenizer,
                plan.tests[truth],
                batch_size=work.recipe.benchmark.batch_size,
                advance=advance,
            )
            scores.extend(
                RoutingScore(plan.router.id, path, truth, chosen, count)
                for path, by_expert in counts.items()
                for chosen, count in zip(names, by_expert, strict=True)
                if count
            )
    by_expert = tuple(RoutingShare(name, _accuracy(scores, [name])) for name in own)
    made = RoutingBuild(
        plan.routing,
        accuracy=_accuracy(scores, own),
        by_expert=by_expert,
        num_tokens=_tokens(scores),
        wall_seconds=time.perf_counter() - started,
    )
    work.ledger.record_routing(scores, run_id=work.run_id)
    work.ledger.record_artifact(plan.routing, weights_sha256="", built=made, run_id=work.run_id)


def _accuracy(scores: Sequence[RoutingScore], truths: Sequence[str]) -> float:
    own = [score for score in scores if score.truth in truths]
    right = sum(score.num_tokens for score in own if score.chosen == score.truth)
    return right / sum(score.num_tokens for score in own)


def _tokens(scores: Sequence[RoutingScore]) -> int:
    """Tokens that were fed: every module saw them all."""
    first = scores[0].module
    return sum(score.num_tokens for score in scores if score.module == first)
