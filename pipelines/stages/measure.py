"""The stages that measure: scores of every subject on every task, comparisons, routes and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING

from meteora.artifacts import (
    NULL,
    WITH_GATES,
    ComparisonBuild,
    RouterBuild,
    RoutingBuild,
    RoutingScore,
    RoutingShare,
    RoutingSwitch,
    canonical_sha256,
)
from meteora.base.placement import input_device
from meteora.base.shapes import shape_of_model
from meteora.model.fused import expert_names
from meteora.model.generate import prompts_at_once
from meteora.routing.layer import routed_layers
from meteora.untrusted.findings import MOST_NAMED, counted, listed
from pipelines.admission import silent_experts
from pipelines.data.rows import ExamplesError
from pipelines.evaluation import evaluate, routing_stats, speed
from pipelines.evaluation.harness import HARNESS
from pipelines.evaluation.measurements import ONE_EXPERT, Measurement, control_of
from pipelines.evaluation.resume import BATCHES, Log, open_log
from pipelines.evaluation.systems import use_system
from pipelines.planning.overlaps import place_of_example
from pipelines.planning.passes import rows_at_once
from pipelines.planning.room import check_names, check_room, check_rows, longest
from pipelines.scoring import compare
from pipelines.scoring.judges import judged_scores
from pipelines.scoring.outputs import write_outputs
from pipelines.stages.checkpoint import not_fitted, record_router
from pipelines.stages.open_model import is_spread, opened, tokenizer_of_gates
from pipelines.workspace.console import bar, say
from pipelines.workspace.machine import device_name, memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import BenchmarkSpec
    from pipelines.data.rows import Row
    from pipelines.evaluation.tasks import Task
    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext

WATCHED = 16
"""The batch size for the measurement of routes, if `benchmark.batch_size` is `auto`."""


def missing(work: RunContext, plan: Plan) -> list[list[Measurement]]:
    """The measurements that the ledger does not have yet, grouped by subject and task.

    A stopped run continues with the next group, and inside it with the next row: see
    `evaluation.resume`.

    Raises:
        JudgedError: a recorded score was judged by another metric than the plan's.
    """
    askings: dict[tuple[str, str], dict[str, Measurement]] = {}
    ids = (one.spec.id for one in plan.measurements)
    recorded = judged_scores(work.ledger, ids, plan.judges)
    for one in plan.measurements:
        if one.spec.id not in recorded:
            asking = askings.setdefault((one.spec.subject_id, one.spec.task), {})
            asking.setdefault(one.spec.id, one)  # the oracle is one of the experts, too
    return [list(asking.values()) for asking in askings.values()]


def check_prompts(work: RunContext, plan: Plan) -> None:
    """Refuse examples and prompts that are too long for the base, before any work is done.

    Raises:
        ExamplesError: gates are not fitted yet, and an example is too long, or the base's chat
            template does not take its turns, or does not suit the gates.
        BenchmarkError: a prompt of a missing measurement is too long, or lm-eval does not know its
            task.
    """
    askings = missing(work, plan)
    tasks, systems = _tasks_of(askings, plan), {one[0].system for one in askings}
    check_names(tasks)
    own = {name: rows for name, rows in plan.examples.items() if name != NULL}
    examples, spans = ({}, ()) if work.holds(plan.router.id) else (own, plan.spans)
    speed = plan.speed if _is_to_be_timed(work, plan) else None
    if tasks or examples or spans or speed:
        place = partial(place_of_example, work)
        options, plain = plan.router.options, plan.router.template == "plain"
        folder = work.base_folder(plan.base)
        cards = plan.card_examples.keys() & examples.keys()
        check_rows(
            folder, tasks, examples, spans, place, options,
            plain=plain, of_cards=cards, systems=systems, speed=speed,
        )  # fmt: skip


def _tasks_of(askings: Sequence[Sequence[Measurement]], plan: Plan) -> list[Task]:
    return [plan.tasks[name] for name in dict.fromkeys(one[0].spec.task for one in askings)]


def _is_to_be_timed(work: RunContext, plan: Plan) -> bool:
    return plan.speed is not None and work.ledger.built(plan.speed.id) is None


def measure(work: RunContext, plan: Plan, gates: RouterBuild) -> None:
    """Take every missing measurement, with the model from the store."""
    measure_model(
        work,
        plan,
        lambda: opened(work, plan, "auto" if is_spread(work, plan) else None, gates=gates),
    )


def measure_model(
    work: RunContext,
    plan: Plan,
    open_model: Callable[
        [], AbstractContextManager[tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    ],
    dtype: str = "auto",
) -> None:
    """Take every missing measurement, and record each at once.

    One model serves all subjects: the base is the model without its experts, an adapter alone is
    the model with that expert forced, and tests show that both equal the real ones.

    Args:
        open_model: the fused model and its tokenizer, loaded only if a measurement is missing
        dtype: of the base, if a person named one; it is recorded with the device
    """
    to_do, say_once = missing(work, plan), cache(say)
    watch = plan.watches_routing and work.ledger.built(plan.routing.id) is None
    timing = _is_to_be_timed(work, plan)
    if to_do or watch or timing:
        _record_controls(work, plan)
        with open_model() as (model, tokenizer):
            speed = plan.speed if timing else None
            check_room(_tasks_of(to_do, plan), model.config, tokenizer, speed)
            device = device_name(input_device(model), dtype)
            if not _is_probed(work, plan):
                silent_experts.probe(work, plan.experts, model, tokenizer)
            for askings in _of_one_system(to_do, plan):
                first = askings[0][0]
                with use_system(model, tokenizer, first, plan.tasks[first.spec.task], plan):
                    for asking in askings:
                        number = _batch_size(work, plan, asking[0], model, tokenizer, say_once)
                        _ask(work, plan, asking, model, tokenizer, number, device)
            if watch:
                _watch_routing(work, plan, model, tokenizer)
            if timing:
                _time(work, plan, model)
    _compare(work, plan)


def _is_probed(work: RunContext, plan: Plan) -> bool:
    """Whether this run probed its experts when it fitted the gates; it takes a forward for each."""
    return plan.router.router in WITH_GATES and work.ledger.run_of(plan.router.id) == work.run_id


def _batch_size(
    work: RunContext,
    plan: Plan,
    measurement: Measurement,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say_once: Callable[[str], None],
) -> int:
    """The number of prompts to answer together, for the task and system of a measurement."""
    settings = work.recipe.benchmark
    if settings.batch_size != "auto":
        return settings.batch_size
    task, shape = plan.tasks[measurement.spec.task], shape_of_model(model)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    if measurement.system in plan.merges:
        routed = [shape.linears[f"{path}.projection"] for path in routed_layers(model)]
        held += sum(a * b for a, b in routed) * shape.dtype.itemsize
    tokens = longest(task, model.config, tokenizer)
    room = memory_bytes(input_device(model))
    most = rows_at_once(settings, shape, tokens, held_bytes=held, memory_bytes=room)
    number: int = prompts_at_once(model, most)
    say_once(f"{task.name}: {counted(number, 'prompt')} at a time")
    return number


def _of_one_system(
    askings: Sequence[list[Measurement]], plan: Plan
) -> list[list[list[Measurement]]]:
    """Group the tasks of each merge: it takes long to make, so it is made once.

    Each other task is a group of its own: a random router begins anew with every task.
    """
    groups: dict[object, list[list[Measurement]]] = {}
    for number, asking in enumerate(askings):
        system = asking[0].system
        groups.setdefault(system if system in plan.merges else number, []).append(asking)
    return list(groups.values())


def _record_controls(work: RunContext, plan: Plan) -> None:
    """Record the routers and merges that are only measured: their scores refer to them."""
    for spec in plan.others.values():
        if work.ledger.weights_of(spec.id) is None:
            record_router(work, not_fitted(work, spec))
    for spec in plan.merges.values():
        if work.ledger.weights_of(spec.id) is None:
            work.ledger.record_artifact(spec, weights_sha256="", run_id=work.run_id)


def _ask(
    work: RunContext,
    plan: Plan,
    asking: Sequence[Measurement],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: str,
) -> None:
    """Ask the model one task, with its present routing, and record a score for each metric."""
    first = asking[0]
    task = plan.tasks[first.spec.task]
    answers = work.answers_file(_answers_key(first.spec, batch_size, device))
    control = control_of(first.system, task)
    total = task.num_questions * (len(task.part_metrics) if control == ONE_EXPERT else 1)
    with (
        bar(f"{task.name}: {first.system}", total, "rows") as advance,
        nullcontext(Log()) if first.system == "random" else open_log(answers) as log,
    ):
        result = evaluate.evaluate_task(
            model,
            tokenizer,
            task,
            batch_size=batch_size,
            seed=first.spec.seed,
            control=control,
            log=log,
            advance=advance,
        )
    with work.scratch() as scratch:
        write_outputs(result.outputs, scratch / "outputs.parquet")
        outputs_sha256 = work.ledger.blobs.put(scratch / "outputs.parquet", move=True)
    for one in asking:
        score = result.score(one.spec, outputs_sha256, device)
        work.ledger.record_score(score, run_id=work.run_id)
    answers.unlink(missing_ok=True)


def _answers_key(spec: BenchmarkSpec, batch_size: int, device: str) -> str:
    """The hash of all settings that can change the answers; the metric is not one of them."""
    settings = {
        name: value
        for name, value in spec.to_dict().items()
        if name != "metric" and value is not None
    }
    return canonical_sha256([settings, batch_size, BATCHES, device, HARNESS])


def _compare(work: RunContext, plan: Plan) -> None:
    for spec in plan.comparisons:
        if work.ledger.built(spec.id) is None:
            made = compare.compare(work.ledger, spec)
            _note_untested(plan, made)
            work.ledger.record_artifact(spec, weights_sha256="", built=made, run_id=work.run_id)


def _note_untested(plan: Plan, made: ComparisonBuild) -> None:
    """Name the tasks that a comparison leaves out."""
    tested = {one.score_id for one in made.differences}
    tasks = {one.spec.id: one.spec.task for one in plan.measurements}
    untested = (one.score_id for one in made.spec.pairs if one.score_id not in tested)
    left_out = [*dict.fromkeys(tasks[score] for score in untested)]
    if left_out:
        say(
            f"{listed(left_out, MOST_NAMED)}: {made.spec.system} and {made.spec.other} were asked"
            " other prompts, as by two versions of lm-eval or of its data set, so they are not"
            " compared; with another `name` of the task both are asked again",
            "note",
        )


def _time(work: RunContext, plan: Plan, model: PreTrainedModel) -> None:
    assert plan.speed is not None  # noqa: S101  (the caller checks it)
    stored = {str(work.ledger.weights_of(part.id)) for part in (plan.fused, plan.router)}
    num_bytes = sum(work.ledger.blobs.path_of(sha256).stat().st_size for sha256 in stored)
    with bar("timing against the base", plan.speed.rounds + 1, "rounds") as advance:
        made = speed.time_model(model, plan.speed, num_bytes, advance)
    work.ledger.record_artifact(plan.speed, weights_sha256="", built=made, run_id=work.run_id)


def _watch_routing(
    work: RunContext, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Measure and record the routes of each expert's own test rows, in every routed module."""
    started = time.perf_counter()
    tokenizer = tokenizer_of_gates(tokenizer, plan.router.template)
    names = expert_names(model)
    own = plan.own_tests
    number = work.recipe.benchmark.batch_size
    scores: list[RoutingScore] = []
    total: dict[str, routing_stats.RoutingSums] = {}
    with bar("measuring routing", sum(map(len, own.values())), "rows") as advance:
        for truth, rows in own.items():
            sums_of = routing_stats.measure_routing(
                model,
                tokenizer,
                rows,
                batch_size=WATCHED if number == "auto" else number,
                advance=advance,
            )
            scores.extend(
                RoutingScore(plan.router.id, path, truth, chosen, count)
                for path, sums in sums_of.items()
                for chosen, count in zip(names, sums.counts.tolist(), strict=True)
                if count
            )
            routing_stats.add(total, sums_of)
    switches = _switches(own, model, tokenizer)
    rows_without_expert, abstention = plan.rows_without_expert, None
    if rows_without_expert:
        everyones = [row for rows in own.values() for row in rows]
        count = len(everyones) + len(rows_without_expert)
        with bar("measuring abstention", count, "prompts") as advance:
            abstention = routing_stats.measure_abstention(
                model, tokenizer, everyones, rows_without_expert, advance=advance
            )
    by_expert = tuple(RoutingShare(name, _accuracy(scores, [name])) for name in own)
    made = RoutingBuild(
        plan.routing,
        accuracy=_accuracy(scores, list(own)),
        by_expert=by_expert,
        num_tokens=next(iter(total.values())).num_tokens,  # the same in every module
        wall_seconds=time.perf_counter() - started,
        details=tuple(sums.detail(path) for path, sums in total.items()),
        switches=switches,
        abstention=abstention,
    )
    work.ledger.record_routing(scores, run_id=work.run_id)
    work.ledger.record_artifact(plan.routing, weights_sha256="", built=made, run_id=work.run_id)


def _switches(
    own: Mapping[str, Sequence[Row]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[RoutingSwitch, ...]:
    """How soon routing follows a change of subject; nothing where a base cannot tell.

    Nobody asked for it, so it ends no run.
    """
    if not (composites := routing_stats.composites_of(own)):
        return ()
    try:
        with bar("measuring switches", len(composites), "prompts") as advance:
            return routing_stats.measure_switches(model, tokenizer, composites, advance=advance)
    except ExamplesError as error:
        say(f"switches are not measured: {error}", "note")
        return ()


def _accuracy(scores: Sequence[RoutingScore], truths: Sequence[str]) -> float:
    own = [score for score in scores if score.truth in truths]
    right = sum(score.num_tokens for score in own if score.chosen == score.truth)
    return right / sum(score.num_tokens for score in own)
