"""`--dry-run`: the steps of a run. Names are resolved; nothing is downloaded or written."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console

from meteora.adapters.compatibility import IncompatibleAdaptersError, check_stackable
from meteora.artifacts import COMMIT, BaseSpec, BuiltBase
from meteora.base.sources import PATH, SourceError
from meteora.untrusted.findings import MOST_NAMED, counted, listed
from pipelines.admission import sources
from pipelines.admission.experts import Expert, Missing, Outcome, Refusal
from pipelines.data.row_sources import read_rows
from pipelines.hub import repositories
from pipelines.hub.client import hub_of
from pipelines.hub.errors import HubError, HubOfflineError
from pipelines.hub.upload import describe_destination
from pipelines.planning.needs import print_estimates, shape_at_hand
from pipelines.planning.plan import Plan
from pipelines.planning.resolve import local_steps, read_adapters
from pipelines.planning.row_faults import faults_of_rows
from pipelines.recipe.recipe import ExpertSection, Recipe
from pipelines.recipe.stage import Stage
from pipelines.workspace.bases import unfinished
from pipelines.workspace.console import plain_console
from pipelines.workspace.context import RunContext

MOST_ALIKE = 32
"""Most adapters with the same outcome and warnings that have a line; each refused one has its."""


def print_steps(
    context: RunContext,
    base: BaseSpec | None,
    built: BuiltBase | None,
    reason: str,
    until: Stage,
    plan: Plan | None,
) -> bool:
    """Print the steps of a run, with estimates if the base's config is on this disk.

    Args:
        base, built, reason, plan: as in `Look`

    Returns:
        Whether the run would reach its end, as far as can be known without a download.
    """
    reached = until.and_before()
    out = plain_console()
    context = replace(context, recipe=sources.discover(context.recipe))
    away = [] if base else ["its base"]
    text = _describe_base(context, base, away) if base else _not_here(context.recipe.base, reason)
    out.print(f"base       {text}", soft_wrap=True)
    known = shape_at_hand(context, base)
    experts: dict[str, Expert] = {}
    faults: list[str] = []
    if Stage.check in reached:
        sizes = built.sizes if built else known[0].linears if known else {}
        outcomes = _look_at_adapters(context, base, sizes, away)
        _print_adapters(out, outcomes)
        experts = {one.name: one for one in outcomes if isinstance(one, Expert)}
        faults += _faults_of_adapters(outcomes)
        context = _without_left_out(context, outcomes)
    _print_settings(out, context.recipe, reached)
    if Stage.publish in reached and context.recipe.publish is not None:
        out.print(f"publish    {describe_destination(context)}", soft_wrap=True)
    read = cache(read_rows)  # each source is read once, for estimates and faults
    done = _done(context, plan) if plan else set()
    left = [stage for stage in reached if stage not in done]
    if here := ", ".join(stage for stage in reached if stage in done):
        out.print(f"here       {here}: in the ledger already")
    faults += print_estimates(out, context, base, experts, known, left, read)
    if Stage.check in reached:
        faults += faults_of_rows(context, base, read)
    if away:
        faults.append(f"the Hub was not reached for {listed(away, MOST_NAMED)}")
    for fault in faults:
        out.print(f"\nthe run would stop: {fault}", soft_wrap=True)
    return not faults


def _done(context: RunContext, plan: Plan) -> set[Stage]:
    """The stages whose result is in the ledger; they take no time again."""
    made = {Stage.stack: plan.fused.id, Stage.gates: plan.router.id}
    # a plan is made of a base that is there
    return {Stage.base, *(stage for stage, one in made.items() if context.holds(one))}


def _look_at_adapters(
    context: RunContext,
    base: BaseSpec | None,
    sizes: Mapping[str, tuple[int, int]],
    away: list[str],
) -> list[Outcome]:
    """Every adapter of the recipe, read if its files are on this disk.

    The names of those for which the Hub was not reached are added to `away`.
    """
    unpinned = BaseSpec(context.recipe.base, "")  # nothing is compared with it
    steps = replace(
        local_steps(context, base or unpinned),
        resolve_adapter=_or_missing(sources.resolve_adapter, away),
        fetch_adapter=_or_missing(sources.adapter_at_hand, away),
    )
    return list(read_adapters(context, base if sizes else None, sizes, steps))


def _print_adapters(out: Console, outcomes: Sequence[Outcome]) -> None:
    alike: Counter[tuple[str, ...]] = Counter()
    for outcome in outcomes:
        warnings = outcome.adapter.reasons if isinstance(outcome, Expert) else ()
        kind = (type(outcome).__name__, *(one.code for one in warnings))
        alike[kind] += not isinstance(outcome, Refusal)
        if alike[kind] <= MOST_ALIKE:
            said = [_describe_adapter(outcome), *(one.message for one in warnings)]
            out.print("expert    ", "\n           warning: ".join(said), soft_wrap=True)
    for (name, *codes), count in alike.items():
        if count > MOST_ALIKE:
            state = ", ".join(["accepted" if name == Expert.__name__ else "not here", *codes])
            out.print(f"           and {counted(count - MOST_ALIKE, 'more expert')}: {state}")


def _without_left_out(context: RunContext, outcomes: Sequence[Outcome]) -> RunContext:
    """The context without the experts that a run would leave out; unchanged if these are all."""
    left_out = {one.name for one in outcomes if isinstance(one, Refusal) and one.left_out}
    experts = tuple(expert for expert in context.recipe.experts if expert.name not in left_out)
    recipe = context.recipe.model_copy(update={"experts": experts})
    return replace(context, recipe=recipe) if experts else context


def _print_settings(out: Console, recipe: Recipe, reached: Collection[str]) -> None:
    """Print the recipe's settings for the router, the gates and the benchmark."""
    if Stage.gates in reached:
        out.print(f"router     {recipe.router.kind}, top_k {recipe.router.top_k}")
    if Stage.gates in reached and recipe.router.kind == "gate":
        source = f", of {recipe.gates.pool}" if recipe.gates.pool else ""
        out.print(
            f"gates      {recipe.gates.method},"
            f" {recipe.gates.examples_per_expert} examples an expert at most{source}",
            soft_wrap=True,
        )
    if Stage.benchmark in reached:
        systems = ", ".join(("fused", *recipe.benchmark.compare))
        most = counted(recipe.benchmark.limit, "row")
        on = listed([*recipe.task_names], MOST_NAMED) or "no task"
        out.print(f"benchmark  {systems} on {on}, {most} at most")


def _faults_of_adapters(outcomes: Sequence[Outcome]) -> list[str]:
    """Why a run would end with these adapters; empty if it would not."""
    refused = [one for one in outcomes if isinstance(one, Refusal)]
    faults = [f"{one.name} is refused" for one in refused if not one.left_out]
    absent = [  # no run can fetch a local folder
        one.reason for one in outcomes if isinstance(one, Missing) and one.source.startswith(PATH)
    ]
    if absent:
        more = counted(len(absent) - 1, "more adapter")
        others = f" (and {more})" if len(absent) > 1 else ""
        faults.append(f"{absent[0]}{others}")
    if len(refused) == len(outcomes):
        faults.append("no adapter can be used")
    taken = {one.name: one.adapter for one in outcomes if isinstance(one, Expert)}
    try:
        check_stackable(taken, sys.maxsize)
    except IncompatibleAdaptersError as error:
        faults.append(str(error))
    return faults


def _describe_base(context: RunContext, base: BaseSpec, away: list[str]) -> str:
    if COMMIT.fullmatch(base.base_revision) is None:
        return context.recipe.base
    folder = context.base_folder(base)
    if folder.is_dir():
        state = "here already"
    else:
        hub = hub_of(context.recipe, base.base_model)
        try:
            left = repositories.base_bytes(base, unfinished(folder), hub=hub)
            state = f"{left / 1e6:,.1f} MB to download"
        except HubError as error:
            _raise_if_answered(error)
            away.append("its base")
            state = "to download; the Hub was not reached"
    return f"{base.base_model} at {base.base_revision[:12]}, {state}"


def _describe_adapter(one: Outcome) -> str:
    if isinstance(one, Missing):
        if one.ref is None or _begins_with(one.reason, one.source):
            return f"{one.name}: {_not_here(one.source, one.reason)}"
        state = one.reason
    elif isinstance(one, Refusal):
        state = f"refused: {one.error}"
    else:
        ranks = [module.r for module in one.adapter.spec.modules]
        low, high = min(ranks), max(ranks)
        state = f"accepted, rank {low if low == high else f'{low} to {high}'}"
    ref = one.ref
    if ref and COMMIT.fullmatch(ref.revision):
        where = "/".join(filter(None, (ref.repo_id, ref.subfolder)))
        here = "here already, " if isinstance(one, Expert) else ""
        return f"{one.name}: {where} at {ref.revision[:12]}, {here}{state}"
    return f"{one.name}: {one.source}, {state}"


def _not_here(name: str, reason: str) -> str:
    """The text for a base or adapter that is not on this disk; it has the name once."""
    return f"not here: {reason}" if _begins_with(reason, name) else f"{name}, not here: {reason}"


def _begins_with(sentence: str, name: str) -> bool:
    """Whether a sentence begins with a name, as the messages on Hub repositories do."""
    return sentence.startswith(name.removeprefix(PATH).partition("@")[0])


def _or_missing(step: Callable[..., Any], away: list[str]) -> Callable[..., Any]:
    """The step, but a source that cannot be found now is `NotHereError`: missing, not refused."""

    def step_or_missing(context: RunContext, expert: ExpertSection, *arguments: object) -> object:
        try:
            return step(context, expert, *arguments)
        except (SourceError, HubError) as error:
            _raise_if_answered(error)
            if isinstance(error, HubError):
                away.append(expert.name)
            raise sources.NotHereError(str(error)) from error

    return step_or_missing


def _raise_if_answered(error: SourceError | HubError) -> None:
    """Raise an error that is an answer of the Hub; return if the Hub did not answer."""
    if isinstance(error, HubError) and not (error.retry or isinstance(error, HubOfflineError)):
        raise error
