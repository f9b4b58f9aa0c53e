"""What a run would do, for `--dry-run`: names are resolved, nothing is downloaded or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.artifacts import COMMIT
from pipelines import hub, sources
from pipelines.hub_errors import UnusableRepositoryError
from pipelines.show import plain_console

if TYPE_CHECKING:
    from pipelines.plan import Plan
    from pipelines.recipe import ExpertSection, Recipe
    from pipelines.workplace import Workplace


def steps(work: Workplace, planned: Plan | None) -> None:
    """Print what a run would do; `planned` is the plan of a finished one."""
    out = plain_console()
    if planned is not None:
        out.print(f"{work.name}: everything is in the ledger already")
        return
    recipe = sources.discover(work.recipe)
    out.print(f"base       {_base(work)}", soft_wrap=True)
    for expert in recipe.experts:
        out.print(f"expert     {expert.name}: {_adapter(work, recipe, expert)}", soft_wrap=True)
    out.print(f"router     {recipe.router.kind}, top_k {recipe.router.top_k}")
    if recipe.router.kind == "gate":
        out.print(
            f"gates      {recipe.gates.method},"
            f" {recipe.gates.examples_per_expert} examples an expert at most"
        )
    systems = ", ".join(("fused", *recipe.benchmark.compare))
    tasks = [e.name for e in recipe.experts if e.test] + [t.name for t in recipe.benchmark.tasks]
    on = ", ".join(tasks) or "no task"
    out.print(f"benchmark  {systems} on {on}, {recipe.benchmark.limit} rows at most")


def _base(work: Workplace) -> str:
    spec = sources.resolve_base(work.recipe, work.folder)
    if COMMIT.fullmatch(spec.base_revision) is None:
        return work.recipe.base
    if work.base_folder(spec).is_dir():
        state = "here already"
    else:
        num_bytes = hub.base_bytes(spec, hub=sources.hub_of(work.recipe, spec.base_model))
        state = f"{num_bytes / 1e6:,.1f} MB to download"
    return f"{spec.base_model} at {spec.base_revision[:12]}, {state}"


def _adapter(work: Workplace, recipe: Recipe, expert: ExpertSection) -> str:
    ref = sources.resolve_adapter(recipe, expert, work.folder)
    if COMMIT.fullmatch(ref.revision) is None:
        return expert.adapter
    where = "/".join(filter(None, (ref.repo_id, ref.subfolder)))
    try:
        sources.adapter_at_hand(recipe, expert, ref, work.folder, work.adapters_folder)
        state = "here already"
    except sources.NotHereError as missing:
        state = str(missing)
    except UnusableRepositoryError as error:
        state = f"refused: {error}"
    return f"{where} at {ref.revision[:12]}, {state}"
