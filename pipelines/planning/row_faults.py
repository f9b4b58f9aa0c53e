"""Why a run would refuse the rows that are on this disk, as `--dry-run` says."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from meteora.artifacts import BaseSpec
from pipelines.data.rows import ExamplesError, Row
from pipelines.data.spans import read_spans
from pipelines.evaluation.harness import BenchmarkError
from pipelines.evaluation.tasks import make_tasks
from pipelines.planning.examples import asks_for_spans, most_prompts, pool_prompts, refuse_too_few
from pipelines.planning.overlaps import check_overlaps, place_of_example
from pipelines.planning.room import check_names, check_rows
from pipelines.recipe.recipe import AUTO
from pipelines.workspace.context import RunContext

Read = Callable[..., Sequence[Row]]
"""`read_rows`; may keep what it read."""

HUB = "hf:"
"""The beginning of sources of rows that are on the Hub."""


def is_at_hand(source: str | None) -> bool:
    """Whether a source of examples, or of rows, is on this disk."""
    return bool(source) and source != AUTO and not source.startswith(HUB)


def faults_of_rows(context: RunContext, base: BaseSpec | None, read: Read) -> list[str]:
    """Why a run would refuse the rows that are on this disk; empty if it would not.

    Their lengths are checked if the base's tokenizer is on this disk, too.
    """
    recipe, folder, settings = context.recipe, context.folder, context.recipe.benchmark
    gates, routed = recipe.gates, recipe.router.kind == "gate"
    own = [one for one in recipe.experts if one.test and not one.test.startswith(HUB)]
    further = tuple(task for task in settings.tasks if not task.rows.startswith(HUB))
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
            if routed and is_at_hand(one.examples)
        }
        prompts: Sequence[str] = ()
        if routed and is_at_hand(gates.pool):
            most = most_prompts(recipe, len(recipe.experts))
            rows = read(gates.pool, folder, most, answered=False)
            prompts = pool_prompts(gates.pool, rows, examples)
        named = [one.name for one in recipe.experts if one.examples or gates.pool]
        spans = read_spans(gates.spans, folder, named) if asks_for_spans(recipe) else ()
        tasks = make_tasks(own, known, folder, read)
        tests = {name: task.rows for name, task in tasks.items() if task.rows}
        check_overlaps(context, examples, spans, tests, prompts)
        whole = not gates.pool and len(examples) == sum(bool(e.examples) for e in recipe.experts)
        refuse_too_few(recipe, examples, spans, whole=whole)
        check_names(tasks.values())
        base_folder = context.base_folder(base) if base else None
        if base_folder and (base_folder / "tokenizer.json").is_file():
            check_rows(
                base_folder,
                tasks.values(),
                examples,
                spans,
                partial(place_of_example, context),
                recipe.router.options((), fitted=True),
                plain=settings.template == "plain",
                systems=settings.compare,
                speed=settings.speed,
            )
    except (ExamplesError, BenchmarkError) as error:
        return [str(error)]
    return []
