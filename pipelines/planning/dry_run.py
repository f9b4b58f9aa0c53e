"""What a run would do, for `--dry-run`: names are resolved, nothing is downloaded or written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meteora.adapters import reader
from meteora.artifacts import COMMIT, BaseSpec
from meteora.base.loading import Shape, load_tokenizer, shape_of
from meteora.base.sources import GGUF, PATH, SourceError, find_gguf
from meteora.untrusted.findings import AdapterError
from pipelines.admission import sources
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError
from pipelines.hub import repositories
from pipelines.hub.errors import HubError, HubOfflineError, UnusableRepositoryError
from pipelines.hub.snapshot import cached_config
from pipelines.planning.estimate import ASSUMED_RANK, Experts, Rows, assumed_experts, estimate
from pipelines.workspace.console import plain_console
from pipelines.workspace.machine import LARGE, measure_machine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from pipelines.planning.plan import Plan
    from pipelines.recipe.recipe import ExpertSection, Recipe
    from pipelines.workspace.context import RunContext

SAMPLE = 64
"""Rows of a source whose length is looked at."""
CHARACTERS_PER_TOKEN = 4
"""Where the tokenizer is not here."""


def steps(work: RunContext, planned: Plan | None) -> None:
    """Print what a run would do; `planned` is the plan of a finished one."""
    out = plain_console()
    if planned is not None:
        out.print(f"{work.name}: everything is in the ledger already")
        return
    recipe = sources.discover(work.recipe)
    out.print(f"base       {_base(work)}", soft_wrap=True)
    found: dict[str, Path] = {}
    for expert in recipe.experts:
        out.print(f"expert     {_adapter(work, recipe, expert, found)}", soft_wrap=True)
    out.print(f"router     {recipe.router.kind}, top_k {recipe.router.top_k}")
    if recipe.router.kind == "gate":
        out.print(
            f"gates      {recipe.gates.method},"
            f" {recipe.gates.examples_per_expert} examples an expert at most"
        )
    systems = ", ".join(("fused", *recipe.benchmark.compare))
    tasks = [e.name for e in recipe.experts if e.test] + [t.name for t in recipe.benchmark.tasks]
    tasks += [f"composite-{section.n}" for section in recipe.benchmark.composite]
    on = ", ".join(tasks) or "no task"
    out.print(f"benchmark  {systems} on {on}, {recipe.benchmark.limit} rows at most")
    if recipe.publish is not None:
        seen = "private" if recipe.publish.private else "public"
        out.print(f"publish    {recipe.publish.repo}, {seen}", soft_wrap=True)
    _estimates(out, work, recipe, found)


def _base(work: RunContext) -> str:
    try:
        spec = sources.resolve_base(work.recipe, work.folder)
    except SourceError as error:
        return f"{work.recipe.base}, not here: {error}"
    except HubError as error:
        if not _unanswered(error):
            raise
        return f"{work.recipe.base}, not here: {error}"
    if COMMIT.fullmatch(spec.base_revision) is None:
        return work.recipe.base
    if work.base_folder(spec).is_dir():
        state = "here already"
    else:
        try:
            num_bytes = repositories.base_bytes(
                spec, hub=sources.hub_of(work.recipe, spec.base_model)
            )
            state = f"{num_bytes / 1e6:,.1f} MB to download"
        except HubError as error:
            if not _unanswered(error):
                raise
            state = "to download; the Hub was not reached"
    return f"{spec.base_model} at {spec.base_revision[:12]}, {state}"


def _unanswered(error: HubError) -> bool:
    """Whether it only says that nobody could be asked."""
    return error.retry or isinstance(error, HubOfflineError)


def _adapter(
    work: RunContext, recipe: Recipe, expert: ExpertSection, found: dict[str, Path]
) -> str:
    """A line on an expert's adapter; its folder goes into `found` where it is here."""
    try:
        ref = sources.resolve_adapter(recipe, expert, work.folder)
    except SourceError:
        return f"{expert.name}: {expert.adapter}, not here"
    except HubError as error:
        if not _unanswered(error):
            raise
        return f"{expert.name}: {expert.adapter}, not here: {error}"
    local = COMMIT.fullmatch(ref.revision) is None
    where = "/".join(filter(None, (ref.repo_id, ref.subfolder)))
    try:
        found[expert.name] = sources.adapter_at_hand(
            recipe, expert, ref, work.folder, work.adapters_folder
        )
        state = "here already"
    except (sources.NotHereError, HubOfflineError) as missing:
        state = str(missing)
    except (AdapterError, UnusableRepositoryError) as error:
        state = f"refused: {error}"
    return (
        f"{expert.name}: {expert.adapter if local else f'{where} at {ref.revision[:12]}, {state}'}"
    )


def _estimates(out: Console, work: RunContext, recipe: Recipe, found: Mapping[str, Path]) -> None:
    known = _shape(work)
    if known is None:
        out.print(
            "\nMemory and time cannot be estimated: the base's config is not here yet."
            " `hf download` can get it alone, or `--until base` the base.",
            soft_wrap=True,
        )
        return
    shape, tokenizer = known
    experts, num_assumed = _experts(recipe, shape, found)
    limit = recipe.gates.examples_per_expert
    settings = recipe.benchmark
    examples = {
        e.name: _rows(e.examples, limit, work, tokenizer) for e in recipe.experts if e.examples
    }
    tests = {
        e.name: _rows(e.test, settings.limit, work, tokenizer) for e in recipe.experts if e.test
    }
    for task in settings.tasks:
        count = task.limit or settings.limit
        tests[task.called] = _rows(task.rows, count, work, tokenizer) if task.rows else Rows(count)
    machine = measure_machine(shape.dtype)
    asked: dict[str, Any] = {"experts": experts, "examples": examples, "tests": tests}
    needs = estimate(recipe, shape, machine=machine, **asked)
    out.print(f"\nEstimated, to a factor of two or so, for this machine ({machine.describe()}):")
    for need in needs:
        out.print(
            f"  {need.stage:9}  memory {need.memory_bytes / 1e9:7,.1f} GB"
            f"   disk {need.disk_bytes / 1e9:7,.1f} GB   time {duration(need.seconds):>8}"
        )
    out.print(f"  in all {duration(sum(need.seconds for need in needs))}, without downloads")
    if shape.dtype.itemsize == 2 and machine.name.startswith("cpu"):
        there = estimate(recipe, shape, machine=LARGE, **asked)
        shown = ", ".join(f"{need.stage} {duration(need.seconds)}" for need in there)
        out.print(f"  on {LARGE.name}: {shown}", soft_wrap=True)
    if short := [need.stage for need in needs if need.memory_bytes > machine.memory_bytes]:
        out.print(
            f"  more memory than the {machine.memory_bytes / 1e9:,.1f} GB of this machine is needed"
            f" for: {', '.join(short)}"
        )
    every = [*examples.values(), *tests.values()]
    if num_assumed:
        out.print(
            f"  {num_assumed} of {experts.count} adapters are not here: taken as rank"
            f" {ASSUMED_RANK} on every linear layer"
        )
    if absent := sum(not rows.known for rows in every):
        out.print(
            f"  {absent} of {len(every)} sources of rows are not here: taken as full, and as"
            f" {Rows.prompt_tokens:.0f} tokens a prompt and {Rows.answer_tokens:.0f} an answer"
        )


def _shape(work: RunContext) -> tuple[Shape, PreTrainedTokenizerBase | None] | None:
    """The base's shape and tokenizer, as far as they are on this machine."""
    source = work.recipe.base
    folder: Path | None = None
    if source.startswith(PATH):
        folder = work.folder / source.removeprefix(PATH)
    elif not source.startswith(GGUF):
        repo_id, _, revision = source.partition("@")
        kept = work.base_folder(BaseSpec(repo_id, revision))
        config = cached_config(repo_id, revision) if COMMIT.fullmatch(revision) else None
        folder = kept if kept.is_dir() else config and config.parent
    else:
        file = find_gguf(source)
        return shape_of(file.parent, file.name), None
    if folder is None or not (folder / "config.json").is_file():
        return None
    whole = (folder / "tokenizer.json").is_file()
    return shape_of(folder), load_tokenizer(folder) if whole else None


def _experts(recipe: Recipe, shape: Shape, found: Mapping[str, Path]) -> tuple[Experts, int]:
    """All experts by their ranks, and how many of them had to be assumed."""
    ranks: dict[str, int] = {}
    num_assumed = 0
    for expert in recipe.experts:
        own: Mapping[str, int]
        try:
            read = reader.read(found[expert.name], modules_to_save=recipe.policy.modules_to_save)
            own = {module.path: module.r for module in read.spec.modules}
        except (KeyError, AdapterError):
            own, num_assumed = assumed_experts(shape, 1).ranks, num_assumed + 1
        for path, r in own.items():
            if path in shape.linears:
                ranks[path] = ranks.get(path, 0) + r
    return Experts(len(recipe.experts), ranks), num_assumed


def _rows(
    source: str, limit: int, work: RunContext, tokenizer: PreTrainedTokenizerBase | None
) -> Rows:
    """What a source gives; from the Hub nothing is read."""
    if source.startswith("hf:"):
        return Rows(limit)
    try:
        rows = read_rows(source, work.folder, limit)
    except ExamplesError:
        return Rows(limit)

    def length(text: str) -> float:
        if tokenizer is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(tokenizer(text).input_ids)

    seen = rows[:SAMPLE]
    return Rows(
        len(rows),
        sum(length(row.prompt) for row in seen) / len(seen),
        sum(length(row.response) for row in seen) / len(seen),
        sum(len(row.choices) for row in seen) / len(seen),
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
