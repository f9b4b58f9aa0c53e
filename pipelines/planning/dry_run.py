"""`--dry-run`: the steps of a run. Names are resolved; nothing is downloaded or written."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.adapters.compatibility import IncompatibleAdaptersError, check_stackable
from meteora.artifacts import COMMIT, BaseSpec, BuiltBase
from meteora.base.loading import Shape, load_config, load_tokenizer, shape_of
from meteora.base.sources import GGUF, PATH, SourceError, find_gguf
from meteora.untrusted.findings import MOST_NAMED, listed
from pipelines.admission import sources
from pipelines.admission.experts import Expert, Missing, Refusal
from pipelines.data.claims import prompts_of
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.data.spans import read_spans
from pipelines.evaluation.harness import BenchmarkError
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.hub import repositories
from pipelines.hub.errors import HubError, HubOfflineError
from pipelines.hub.snapshot import cached
from pipelines.hub.upload import describe_destination
from pipelines.planning.estimate import (
    ASSUMED_ANSWER_TOKENS,
    ASSUMED_RANK,
    Experts,
    Need,
    Rows,
    assumed_ranks,
    estimate,
)
from pipelines.planning.plan import (
    Plan,
    asks_for_spans,
    check_overlaps,
    most_prompts,
    place_of_example,
    refuse_too_few,
)
from pipelines.planning.resolve import at_hand, read_adapters
from pipelines.planning.room import (
    check_examples,
    check_names,
    check_opening,
    check_room,
    check_spans,
)
from pipelines.recipe.recipe import AUTO, ExpertSection, Recipe
from pipelines.recipe.stage import Stage
from pipelines.workspace.console import plain_console
from pipelines.workspace.machine import LARGE, measure_machine

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from pipelines.data.spans import SpannedRow, SpannedTurns
    from pipelines.workspace.context import RunContext

    Outcomes = Sequence[tuple[ExpertSection, Expert | Refusal | Missing]]
    Read = Callable[..., Sequence[Row]]

SAMPLE = 64
"""Rows of a source whose length is measured."""
MOST_ALIKE = 32
"""Most adapters with the same outcome and warnings that have a line; each refused one has its."""
CHARACTERS_PER_TOKEN = 4
"""Assumed if the tokenizer is not on this disk."""


def print_steps(
    context: RunContext,
    base: BaseSpec | None,
    built: BuiltBase | None,
    reason: str = "",
    until: Stage = Stage.publish,
    plan: Plan | None = None,
) -> bool:
    """Print the steps of a run, with estimates if the base's config is on this disk.

    Args:
        base: The resolved base; None if the Hub did not answer.
        built: None if the base is not on this disk yet.
        reason: Why there is no `base`.
        until: The last stage of the run.
        plan: None if it cannot be made without a download.

    Returns:
        Whether the run would reach its end, as far as can be known without a download.
    """
    reached = until.and_before()
    out = plain_console()
    context = replace(context, recipe=sources.discover(context.recipe))
    text = _describe_base(context, base) if base else _not_here(context.recipe.base, reason)
    out.print(f"base       {text}", soft_wrap=True)
    known = _shape(context)
    experts: dict[str, Expert] = {}
    faults: list[str] = []
    if Stage.check in reached:
        sizes = built.sizes if built else known[0].linears if known else {}
        outcomes = _look_at_adapters(context, base, sizes)
        _print_adapters(out, outcomes)
        experts = {one.name: outcome for one, outcome in outcomes if isinstance(outcome, Expert)}
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
    faults += _print_estimates(out, context, experts, known, left, read)
    if Stage.check in reached:
        faults += _faults_of_rows(context, base, read)
    for fault in faults:
        out.print(f"\nthe run would stop: {fault}", soft_wrap=True)
    return not faults


def _done(context: RunContext, plan: Plan) -> set[Stage]:
    """The stages whose result is in the ledger; they take no time again."""
    made = {Stage.stack: plan.fused.id, Stage.gates: plan.router.id}
    # a plan is made of a base that is there
    return {Stage.base, *(stage for stage, one in made.items() if context.holds(one))}


def _look_at_adapters(
    context: RunContext, base: BaseSpec | None, sizes: Mapping[str, tuple[int, int]]
) -> Outcomes:
    """Every adapter of the recipe, read if its files are on this disk."""
    unpinned = BaseSpec(context.recipe.base, "")  # nothing is compared with it
    steps = replace(
        at_hand(context, base or unpinned),
        resolve_adapter=_or_missing(sources.resolve_adapter),
        fetch_adapter=_or_missing(sources.adapter_at_hand),
    )
    return list(read_adapters(context, base if sizes else None, sizes, steps))


def _print_adapters(out: Console, outcomes: Outcomes) -> None:
    alike: Counter[tuple[str, ...]] = Counter()
    for section, outcome in outcomes:
        warnings = outcome.adapter.reasons if isinstance(outcome, Expert) else ()
        kind = (type(outcome).__name__, *(one.code for one in warnings))
        alike[kind] += not isinstance(outcome, Refusal)
        if alike[kind] <= MOST_ALIKE:
            said = [_describe_adapter(section, outcome), *(one.message for one in warnings)]
            out.print("expert    ", "\n           warning: ".join(said), soft_wrap=True)
    for (name, *codes), count in alike.items():
        if count > MOST_ALIKE:
            state = ", ".join(["accepted" if name == Expert.__name__ else "not here", *codes])
            out.print(f"           and {count - MOST_ALIKE:,} more experts: {state}")


def _without_left_out(context: RunContext, outcomes: Outcomes) -> RunContext:
    """The context without the experts that a run would leave out; unchanged if these are all."""
    left_out = {one.name for one, o in outcomes if isinstance(o, Refusal) and o.left_out}
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
        on = listed([*recipe.task_names], MOST_NAMED) or "no task"
        out.print(f"benchmark  {systems} on {on}, {recipe.benchmark.limit} rows at most")


def _faults_of_adapters(outcomes: Outcomes) -> list[str]:
    """Why a run would end with these adapters; empty if it would not."""
    refused = [(one, outcome) for one, outcome in outcomes if isinstance(outcome, Refusal)]
    faults = [f"{one.name} is refused" for one, outcome in refused if not outcome.left_out]
    absent = [  # no run can fetch a local folder
        outcome.reason
        for one, outcome in outcomes
        if isinstance(outcome, Missing) and one.adapter.startswith(PATH)
    ]
    if absent:
        others = f" (and {len(absent) - 1} more adapters)" if len(absent) > 1 else ""
        faults.append(f"{absent[0]}{others}")
    if len(refused) == len(outcomes):
        faults.append("no adapter can be used")
    taken = {one.name: outcome.adapter for one, outcome in outcomes if isinstance(outcome, Expert)}
    try:
        check_stackable(taken, sys.maxsize)
    except IncompatibleAdaptersError as error:
        faults.append(str(error))
    return faults


def _is_here(source: str | None) -> bool:
    """Whether a source of rows is on this disk."""
    return bool(source) and source != AUTO and not source.startswith("hf:")


def _faults_of_rows(context: RunContext, base: BaseSpec | None, read: Read) -> list[str]:
    """Why a run would refuse the rows that are on this disk; empty if it would not.

    Args:
        base: The lengths of rows are checked if its tokenizer is on this disk.
    """
    recipe, folder, settings = context.recipe, context.folder, context.recipe.benchmark
    gates, routed = recipe.gates, recipe.router.kind == "gate"
    own = [one for one in recipe.experts if _is_here(one.test)]
    further = tuple(task for task in settings.tasks if not task.rows.startswith("hf:"))
    here = {one.name for one in own} | {task.called for task in further}
    every = {e.name for e in recipe.experts if e.test} | {t.called for t in settings.tasks}
    mixed: dict[str, Any] = {
        kind: tuple(s for s in getattr(settings, kind) if here >= (set(s.tasks) or every))
        for kind in ("composite", "conversation")
    }
    known = settings.model_copy(update={"tasks": further, **mixed})
    try:
        examples = {
            one.name: read(one.examples, folder, gates.examples_per_expert)
            for one in recipe.experts
            if routed and _is_here(one.examples)
        }
        pool: Sequence[Row] = ()
        if routed and _is_here(gates.pool):
            most = most_prompts(recipe, len(recipe.experts))
            pool = read(gates.pool, folder, most, answered=False)
        named = [one.name for one in recipe.experts if one.examples or gates.pool]
        spans = read_spans(gates.spans, folder, named) if asks_for_spans(recipe) else ()
        tasks = make_tasks(own, known, folder, read)
        tests = {name: task.rows for name, task in tasks.items() if task.rows}
        check_overlaps(recipe, folder, examples, spans, tests, prompts_of(pool, examples))
        refuse_too_few(recipe, examples, spans)
        check_names(tasks.values())
        _check_lengths(context, base, tasks, examples, spans)
    except (ExamplesError, BenchmarkError) as error:
        return [str(error)]
    return []


def _check_lengths(
    context: RunContext,
    base: BaseSpec | None,
    tasks: Mapping[str, Task],
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
) -> None:
    """Refuse rows that are too long for the base or not possible in its chat template.

    Checks nothing if the base's tokenizer is not on this disk.
    """
    folder = context.base_folder(base) if base else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return
    recipe = context.recipe
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    check_room(tasks.values(), config, tokenizer)
    if recipe.benchmark.template == "plain":
        tokenizer.chat_template = None
    check_examples(examples, partial(place_of_example, recipe, context.folder), config, tokenizer)
    check_spans(spans, tokenizer)
    check_opening(recipe.router.options((), fitted=bool(examples)), tokenizer)


def _describe_base(context: RunContext, base: BaseSpec) -> str:
    if COMMIT.fullmatch(base.base_revision) is None:
        return context.recipe.base
    if context.base_folder(base).is_dir():
        state = "here already"
    else:
        hub = sources.hub_of(context.recipe, base.base_model)
        try:
            state = f"{repositories.base_bytes(base, hub=hub) / 1e6:,.1f} MB to download"
        except HubError as error:
            _raise_if_answered(error)
            state = "to download; the Hub was not reached"
    return f"{base.base_model} at {base.base_revision[:12]}, {state}"


def _describe_adapter(section: ExpertSection, outcome: Expert | Refusal | Missing) -> str:
    if isinstance(outcome, Missing):
        if outcome.ref is None or _begins_with(outcome.reason, section.adapter):
            return f"{section.name}: {_not_here(section.adapter, outcome.reason)}"
        state = outcome.reason
    elif isinstance(outcome, Refusal):
        state = f"refused: {outcome.error}"
    else:
        ranks = [module.r for module in outcome.adapter.spec.modules]
        low, high = min(ranks), max(ranks)
        state = f"accepted, rank {low if low == high else f'{low} to {high}'}"
    ref = outcome.ref
    if ref and COMMIT.fullmatch(ref.revision):
        where = "/".join(filter(None, (ref.repo_id, ref.subfolder)))
        here = "here already, " if isinstance(outcome, Expert) else ""
        return f"{section.name}: {where} at {ref.revision[:12]}, {here}{state}"
    return f"{section.name}: {section.adapter}, {state}"


def _not_here(name: str, reason: str) -> str:
    """The text for a base or adapter that is not on this disk; it has the name once."""
    return f"not here: {reason}" if _begins_with(reason, name) else f"{name}, not here: {reason}"


def _begins_with(sentence: str, name: str) -> bool:
    """Whether a sentence begins with a name, as the messages on Hub repositories do."""
    return sentence.startswith(name.removeprefix(PATH).partition("@")[0])


def _or_missing(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, but a source that cannot be found now is `NotHereError`: missing, and no fault."""

    def step_or_missing(*arguments: object) -> object:
        try:
            return step(*arguments)
        except (SourceError, HubError) as error:
            _raise_if_answered(error)
            raise sources.NotHereError(str(error)) from error

    return step_or_missing


def _raise_if_answered(error: SourceError | HubError) -> None:
    """Raise an error that is an answer of the Hub; return if the Hub did not answer."""
    if isinstance(error, HubError) and not (error.retry or isinstance(error, HubOfflineError)):
        raise error


def _print_estimates(
    out: Console,
    context: RunContext,
    accepted: Mapping[str, Expert],
    known: tuple[Shape, PreTrainedTokenizerBase | None] | None,
    stages: Collection[str],
    read: Read,
) -> list[str]:
    """Print the needs of these stages; returns a fault if the disk has too little free space."""
    recipe = context.recipe
    if known is None:
        out.print(
            "\nMemory and time cannot be estimated: the base's config is not here yet."
            " `hf download` can get it alone, or `--until base` the base.",
            soft_wrap=True,
        )
        return []
    shape, tokenizer = known
    experts, num_assumed = _experts(recipe, shape, accepted)
    examples, tests, pool = _all_rows(context, tokenizer, read)
    machine = measure_machine(shape.dtype)
    needs_on = partial(
        estimate, recipe, shape, experts=experts, examples=examples, tests=tests, pool=pool
    )
    needs = [need for need in needs_on(machine=machine) if need.stage in stages]
    out.print(f"\nEstimated, to a factor of two or so, for this machine ({machine.describe()}):")
    for need in needs:
        _print_need(out, need)
    out.print(f"  in all {duration(sum(need.seconds for need in needs))}, without downloads")
    if shape.dtype.itemsize == 2 and machine.is_cpu:
        on_large = [need for need in needs_on(machine=LARGE) if need.stage in stages]
        shown = ", ".join(f"{need.stage} {duration(need.seconds)}" for need in on_large)
        out.print(f"  on {LARGE.name}: {shown}", soft_wrap=True)
    if short := [need.stage for need in needs if need.memory_bytes > machine.memory_bytes]:
        out.print(
            f"  more memory than the {machine.memory_bytes / 1e9:,.1f} GB of this machine is needed"
            f" for: {', '.join(short)}"
        )
    every = [*examples.values(), *tests.values()]
    if num_assumed and Stage.stack in stages:
        out.print(
            f"  {num_assumed} of {experts.count} adapters are not here: taken as rank"
            f" {ASSUMED_RANK} on every linear layer"
        )
    wanted, free = sum(need.disk_bytes for need in needs), free_bytes(context.home)
    out.print(f"  disk: {wanted / 1e9:,.1f} GB, of {free / 1e9:,.1f} GB that are free there")
    absent = sum(not rows.known for rows in every)
    if absent and Stage.gates in stages:
        out.print(
            f"  {absent} of {len(every)} sources of rows are not here: taken as full, and as"
            f" {Rows.prompt_tokens:.0f} tokens a prompt and {Rows.answer_tokens:.0f} an answer"
        )
    if wanted > free:
        return [f"{context.home}: {wanted / 1e9:,.1f} GB are needed there; free some space"]
    return []


def _all_rows(
    context: RunContext, tokenizer: PreTrainedTokenizerBase | None, read: Read
) -> tuple[dict[str, Rows], dict[str, Rows], Rows | None]:
    """The examples by expert, the tests by task, and the pool, if there is one."""
    recipe, settings = context.recipe, context.recipe.benchmark

    def rows(source: str | None, limit: int, *, answered: bool = True) -> Rows:
        if not _is_here(source):  # also a task of lm-eval, with rows of its own
            return Rows(limit)
        try:
            source_rows = read(source, context.folder, limit, answered=answered)
        except ExamplesError:
            return Rows(limit)
        return _measured(source_rows, tokenizer)

    limit, pool = recipe.gates.examples_per_expert, None
    examples = {e.name: rows(e.examples, limit) for e in recipe.experts if e.examples}
    if recipe.router.kind == "gate" and recipe.gates.pool:
        most = most_prompts(recipe, len(recipe.experts))
        pool = rows(recipe.gates.pool, most, answered=False)
        from_pool = replace(pool, count=limit, answer_tokens=ASSUMED_ANSWER_TOKENS)
        examples |= {e.name: from_pool for e in recipe.experts if not e.examples}
    tests = {e.name: rows(e.test, settings.limit) for e in recipe.experts if e.test}
    tests |= {t.called: rows(t.rows, t.limit or settings.limit) for t in settings.tasks}
    return examples, tests, pool


def _print_need(out: Console, need: Need) -> None:
    out.print(
        f"  {need.stage:9}  memory {need.memory_bytes / 1e9:7,.1f} GB"
        f"   disk {need.disk_bytes / 1e9:7,.1f} GB   time {duration(need.seconds):>8}"
    )
    if need.note:
        out.print(f"{'':13}{need.note}")
    for part, seconds in need.parts.items():
        out.print(f"{'':45}{part}, {duration(seconds)}")


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that a folder is on; the folder need not exist."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _shape(context: RunContext) -> tuple[Shape, PreTrainedTokenizerBase | None] | None:
    """The base's shape and tokenizer; None for files that are not on this disk."""
    source = context.recipe.base
    if source.startswith(GGUF):
        file = find_gguf(source)
        return shape_of(file.parent, file.name), None
    repo_id, _, revision = source.partition("@")
    folder = context.base_folder(BaseSpec(repo_id, revision))
    if COMMIT.fullmatch(revision) and not folder.is_dir() and not source.startswith(PATH):
        config = cached(repo_id, "config.json", revision)
        folder = config.parent if config else folder
    if not (folder / "config.json").is_file():
        return None
    whole = (folder / "tokenizer.json").is_file()
    return shape_of(folder), load_tokenizer(folder) if whole else None


def _experts(recipe: Recipe, shape: Shape, accepted: Mapping[str, Expert]) -> tuple[Experts, int]:
    """The ranks of all experts, and the number of experts with assumed ranks."""
    ranks: Counter[str] = Counter()
    assumed = assumed_ranks(shape)
    for expert in recipe.experts:
        own = assumed
        if expert.name in accepted:
            own = {module.path: module.r for module in accepted[expert.name].adapter.spec.modules}
        ranks.update({path: r for path, r in own.items() if path in shape.linears})
    num_assumed = sum(expert.name not in accepted for expert in recipe.experts)
    return Experts(len(recipe.experts), ranks), num_assumed


def _measured(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    """The number of rows, and the mean length of the first `SAMPLE` in tokens."""

    def length(text: str) -> float:
        if tokenizer is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(tokenizer(text).input_ids)

    sample = rows[:SAMPLE]
    return Rows(
        len(rows),
        sum(length(row.prompt) for row in sample) / len(sample),
        sum(length(row.response) for row in sample) / len(sample),
        sum(len(row.choices) for row in sample) / len(sample),
        known=True,
    )


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 7.5 h or 3.2 d."""
    if seconds < 1:
        return "< 1 s"
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds / 86_400:,.1f} d"
