"""Measure a checkpoint without the recipe that made it, such as one with an expert more or less."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from meteora.artifacts import ArtifactId, MeteoraError, canonical_sha256, short
from meteora.base.sources import PATH, path_from
from meteora.checkpoint.manifest import CARD, MANIFEST, Manifest, read_manifest
from meteora.untrusted.findings import MOST_NAMED, did_you_mean, listed, shortened
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.admission.sources import token_of_rows
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.data.spans import SpannedRow, SpannedTurns, read_spans
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.planning.examples import asks_for_spans
from pipelines.planning.overlaps import check_overlaps
from pipelines.planning.plan import Plan, plan_benchmark
from pipelines.planning.recorded_tasks import recorded_tasks
from pipelines.planning.row_faults import Read, is_at_hand
from pipelines.recipe.benchmark import MIX, BenchmarkSection, TaskSection
from pipelines.recipe.faults import explain
from pipelines.recipe.recipe import (
    NAME,
    NAME_RULE,
    DeadlinesSection,
    ExpertSection,
    HubSection,
    Recipe,
    folder_of,
)
from pipelines.recipe.stage import Stage
from pipelines.reports import card
from pipelines.reports.html import write_page
from pipelines.reports.summary import Summary, summarise
from pipelines.stages.adopt import Adoption, adopt, plan_adoption, recorded_router
from pipelines.stages.checkpoint import stays_as_signed
from pipelines.stages.measure import measure_model
from pipelines.stages.open_model import stack_in
from pipelines.workspace.checkpoints import is_whole
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext, new_run_id
from pipelines.workspace.machine import choose_device, device_name
from pipelines.workspace.recorded_run import one_stage
from store.ledger import Ledger

COMPARE = ("base", "oracle")
"""Systems to compare with by default; their scores on recorded tasks are mostly recorded, too."""


class BenchmarkRequestError(MeteoraError):
    """A checkpoint cannot be measured with these tasks or settings."""


@dataclass(frozen=True)
class BenchmarkRequest:
    """A person's choices for a benchmark."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, or `name=source` with the source of their rows. Empty: all known tasks."""
    compare: tuple[str, ...] = ()
    """Systems to compare with. Empty: as in the recipe, else `COMPARE`."""
    recipe: Path | None = None
    """A recipe whose tests and section `benchmark` replace the recorded tasks."""
    token_for: tuple[str, ...] = ()
    """Owners of data sets, or `owner/name`, to whom the saved token is sent."""


def benchmark(
    ledger: Ledger, found: FoundCheckpoint, request: BenchmarkRequest
) -> tuple[Path, Plan, Summary]:
    """Measure a checkpoint, and record the scores as a run does; recorded scores are not repeated.

    A checkpoint that the ledger does not know is adopted first.

    Returns:
        The checkpoint's folder, under the home if it was adopted; the plan, and the scores.

    Raises:
        BenchmarkRequestError: There is no task, or none of a given name.
        ExamplesError: Rows are missing or malformed, or examples of the recipe.
        CheckpointError: The checkpoint is not sound.
    """
    manifest, adoption = read_manifest(found.folder), None
    router = recorded_router(ledger, found, manifest)
    if router is None:
        adoption = plan_adoption(ledger, found, manifest)
        manifest, router = adoption.manifest, adoption.router
    ledger.ingest()
    settings, tasks, whole = _choose_tasks(ledger, manifest, router.id, request)
    if not request.tasks:
        _note_untested([name for name in manifest.names if name not in tasks])
    base = manifest.base.spec
    plan = plan_benchmark(base, stack_in(manifest), router, tasks, settings)
    plan = replace(plan, whole=whole)
    at_hand = found.base_folder
    recipe = Recipe.model_construct(  # only the parts that the stages below read
        base=f"{PATH}{at_hand.absolute()}" if at_hand else base.base_model,
        benchmark=settings,
        hub=HubSection(token_for=request.token_for),
        deadlines=DeadlinesSection(),
    )
    work = RunContext(ledger, recipe, found.folder / MANIFEST, new_run_id())
    folder = work.checkpoint_folder(router.id) if adoption else found.folder
    is_here = adoption is None or is_whole(folder)
    summary = summarise(ledger, plan, at_hand) if is_here else None
    if summary is None:
        found = _measure(work, plan, found, adoption)
        summary = summarise(ledger, plan, found.base_folder)
        assert summary is not None  # noqa: S101  (all of it was measured)
    # the card of a recipe's checkpoint shows the scores that the recipe asks for
    if manifest.gates.keys() & {"grown_from", "adopted_from"} and whole:
        _write_card(folder, manifest, summary)
    return folder, plan, summary


def _note_untested(names: list[str]) -> None:
    """Say which experts have no test rows."""
    if names:
        have = "has" if len(names) == 1 else "have"
        rows = f"--tasks {names[0]}=jsonl:FILE"
        say(f"{listed(names, MOST_NAMED)} {have} no test rows; give some with {rows}", "note")


def _measure(
    work: RunContext, plan: Plan, found: FoundCheckpoint, adoption: Adoption | None
) -> FoundCheckpoint:
    """Take the missing measurements, as a run of its own; one run at a time for a checkpoint.

    Returns the measured checkpoint: the copy under the home if it was adopted.
    """
    name = f"benchmark of {short(plan.router.id)}"
    sha256 = canonical_sha256([one.spec.id for one in plan.measurements])
    device = device_name(choose_device(found.device), found.dtype)
    with one_stage(work, name, sha256, device, Stage.benchmark):
        here = adopt(work, adoption) if adoption else found
        measure_model(work, plan, lambda: nullcontext(here.load()), here.dtype)
    return here


def _choose_tasks(
    ledger: Ledger, manifest: Manifest, router_id: str, request: BenchmarkRequest
) -> tuple[BenchmarkSection, dict[str, Task], bool]:
    """The settings, the chosen tasks, and whether these are all known tasks."""
    given = _given_rows(request)
    chosen = [one for one in request.tasks if "=" not in one]
    recorded: dict[str, Task] = {}
    own: dict[str, ExpertSection] = {}
    hub = HubSection()
    if request.recipe is None:
        folder, compare = Path.cwd(), COMPARE
        recorded = _recorded(ledger, manifest, router_id, manifest.names)
        settings = _settings_of(recorded)
        if given:
            _note_template(recorded, settings)
    else:
        recipe, folder = Recipe.load(request.recipe), folder_of(request.recipe)
        settings, compare, hub = recipe.benchmark, recipe.benchmark.compare, recipe.hub
        own = {one.name: one for one in recipe.experts if one.name in manifest.names}
    further = {task.called: task for task in settings.tasks}
    for name, source in given.items():
        if name in manifest.names:
            asked = own.get(name) or _section_of(name, recorded.get(name))
            own[name] = asked.model_copy(update={"test": _absolute(source)})
        else:
            further[name] = _with_rows(further.get(name), name, _absolute(source))
    changes = {"compare": request.compare or compare, "tasks": tuple(further.values())}
    try:
        settings = BenchmarkSection.model_validate(dict(settings) | changes)
    except ValidationError as error:
        fault = explain(error, BenchmarkSection, "--compare")
        advice = "" if request.recipe else " (--recipe FILE names a recipe that has some)"
        raise BenchmarkRequestError(f"{fault}{advice}") from None
    hub = hub.model_copy(update={"token_for": (*hub.token_for, *request.token_for)})
    read = partial(read_rows, token_of=token_of_rows(hub))
    tasks = recorded | make_tasks(list(own.values()), settings, folder, read)
    if request.recipe is not None:
        asked = recipe.model_copy(update={"experts": tuple(own.values()), "benchmark": settings})
        _refuse_examples(RunContext(ledger, asked, request.recipe, ""), tasks, read)
    _refuse_unknown(chosen, tasks)
    if not tasks:
        raise BenchmarkRequestError(
            f"no task of its experts is in the ledger under {ledger.home}; give rows as"
            " --tasks NAME=jsonl:FILE, or a recipe that has some with --recipe"
        )
    names = {*chosen, *given} if chosen else {*tasks}
    to_measure = {name: task for name, task in tasks.items() if name in names}
    # a recipe may leave out tasks of other experts
    others = {*manifest.names} - tasks.keys() if request.recipe else set()
    left_out = _recorded(ledger, manifest, router_id, others)
    return settings, to_measure, len(to_measure) == len(tasks) and not left_out


def _refuse_unknown(chosen: Sequence[str], tasks: Collection[str]) -> None:
    """Refuse the name of a task that is not known, and whose rows are not given."""
    for name in chosen:
        if name not in tasks and MIX.fullmatch(name):
            raise BenchmarkRequestError(
                f"{name} is made of the rows of several tasks; name a recipe that asks it with"
                " --recipe FILE"
            )
        if name not in tasks:
            raise BenchmarkRequestError(
                f"there is no task {name!r}{did_you_mean(name, tasks)}; give its rows as"
                f" --tasks {name}=jsonl:FILE (there are: {listed([*tasks], MOST_NAMED) or 'none'})"
            )


def _refuse_examples(context: RunContext, tasks: Mapping[str, Task], read: Read) -> None:
    """Refuse rows that are examples of the recipe, as far as these can be read on this disk."""
    recipe, folder = context.recipe, context.folder
    examples: dict[str, Sequence[Row]] = {}
    for one in recipe.experts:
        if one.examples and is_at_hand(one.examples):
            with suppress(ExamplesError):  # they may lie on the machine of the fit alone
                examples[one.name] = read(one.examples, folder, recipe.gates.examples_per_expert)
    spans: Sequence[SpannedRow | SpannedTurns] = ()
    with suppress(ExamplesError):
        if asks_for_spans(recipe):
            spans = read_spans(recipe.gates.spans, folder, [one.name for one in recipe.experts])
    check_overlaps(context, examples, spans, {name: one.rows for name, one in tasks.items()}, ())


def _recorded(
    ledger: Ledger, manifest: Manifest, router_id: str, names: Collection[str]
) -> dict[str, Task]:
    """The recorded tasks of some experts of a checkpoint."""
    adapters = {e.name: ArtifactId(e.adapter_id) for e in manifest.experts if e.name in names}
    return recorded_tasks(ledger, stack_in(manifest).base_id, adapters, router_id)


def _given_rows(request: BenchmarkRequest) -> dict[str, str]:
    """The sources in `--tasks NAME=SOURCE`, by name."""
    given = {}
    for one in request.tasks:
        name, equals, source = one.partition("=")
        if not equals:
            continue
        if not source or MIX.fullmatch(name) or not NAME.fullmatch(name):
            raise BenchmarkRequestError(
                f"--tasks {one}: rows are given as NAME=SOURCE, such as sums=jsonl:sums.jsonl; a"
                f" name {NAME_RULE}, and is none of a composite or a conversation"
            )
        if name in given:
            raise BenchmarkRequestError(
                f"--tasks has rows for {name} twice, {given[name]} and {source}; take one out, or"
                " give it another name"
            )
        given[name] = source
    return given


def _with_rows(task: TaskSection | None, name: str, rows: str) -> TaskSection:
    """A further task with new rows, asked as the recipe's task of that name if it has rows."""
    if task is None or task.lm_eval:
        return TaskSection(name=name, rows=rows)
    return task.model_copy(update={"rows": rows})


def _section_of(name: str, task: Task | None) -> ExpertSection:
    """An expert's section with the metrics and the length of its recorded task, if there is one."""
    section = ExpertSection(name=name, adapter="")
    if task is None:
        return section
    changes = {"metric": task.metrics, "max_new_tokens": task.max_new_tokens}
    return section.model_copy(update=changes)


def _settings_of(recorded: dict[str, Task]) -> BenchmarkSection:
    """The settings of recorded tasks, for further ones; defaults if there are none.

    A further task may have longer answers than any of them: it gets the default's length at least.
    """
    defaults = BenchmarkSection(compare=COMPARE)
    if not recorded:
        return defaults
    lengths = [defaults.max_new_tokens, *(task.max_new_tokens for task in recorded.values())]
    first = next(iter(recorded.values()))
    return BenchmarkSection.model_validate(
        {
            "compare": COMPARE,
            "template": first.template,
            "system_prompt": first.system_prompt,
            "max_new_tokens": max(lengths),
            "limit": max(len(task.rows) for task in recorded.values()),
        }
    )


def _note_template(recorded: dict[str, Task], settings: BenchmarkSection) -> None:
    """Say how new rows are asked if recorded tasks do not agree on it."""
    ways = {(task.template, task.system_prompt) for task in recorded.values()}
    if len(ways) > 1:
        prompt = settings.system_prompt
        under = "the default system prompt" if prompt is None else f"system_prompt {prompt!r}"
        say(
            f"the recorded tasks have {len(ways)} templates or system prompts; new rows are asked"
            f" as {next(iter(recorded))} was, with template {settings.template} and"
            f" {shortened(under)}; choose others in a recipe, with --recipe",
            "note",
        )


def _absolute(source: str) -> str:
    """A source of rows whose path is relative to the working folder, for use in any folder."""
    kind, _, path = source.partition(":")
    return f"{kind}:{path_from(Path.cwd(), path)}" if kind in {"jsonl", "bigbench"} else source


def _write_card(folder: Path, manifest: Manifest, summary: Summary) -> None:
    """Write the card of a checkpoint again, now with scores.

    One that is signed keeps its card, as does a download in the Hub's cache, which is all links.
    """
    if not ((folder / CARD).is_symlink() or stays_as_signed(folder)):
        write_page(folder / CARD, card.write_card(manifest, summary, " + ".join(manifest.names)))
