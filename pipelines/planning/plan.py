"""The plan of a run: every spec, and so every id, before any work is done.

Nothing here loads a model or opens a database, so that a finished run is found out in a second.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from meteora.artifacts import (
    NULL,
    ComparisonSpec,
    FusedSpec,
    JointSettings,
    MergeSpec,
    RouterSpec,
    RoutingSpec,
    SpeedSpec,
    canonical_sha256,
)
from meteora.artifacts.routers import OPENING_SHARE
from pipelines.admission.sources import token_of_rows
from pipelines.data.background import background_rows
from pipelines.data.conversations import CONVERSATION_TURNS, SYSTEM_PROMPTS
from pipelines.data.row_sources import place_of, read_rows
from pipelines.data.rows import Row, refuse_overlap
from pipelines.data.spans import SpannedRow, SpannedTurns, prompt_parts, read_spans
from pipelines.evaluation.measurements import (
    Measurement,
    find_comparisons,
    find_measurements,
    find_speed,
    find_subjects,
)
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.recipe.gates import CalibrateSection, JointSection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from meteora.artifacts import BaseSpec
    from pipelines.admission.experts import Expert
    from pipelines.recipe.benchmark import BenchmarkSection
    from pipelines.recipe.recipe import ExpertSection, Recipe


@dataclass(frozen=True)
class Plan:
    """Every spec of a run. Equal recipes over equal sources give equal plans."""

    base: BaseSpec
    experts: tuple[Expert, ...]
    examples: Mapping[str, Sequence[Row]]
    """Rows to fit the gates to, by expert."""
    spans: tuple[SpannedRow | SpannedTurns, ...]
    """Examples whose parts or turns belong to different experts."""
    tests: Mapping[str, Sequence[Row]]
    """Rows to test on, by task. Composites and tasks of lm-eval have no rows here."""
    tasks: Mapping[str, Task]
    """Every task of the benchmark, by name."""
    fused: FusedSpec
    router: RouterSpec
    others: Mapping[str, RouterSpec]
    """Routers to compare with, by kind."""
    merges: Mapping[str, MergeSpec]
    """Merges to compare with, by method."""
    measurements: tuple[Measurement, ...]
    comparisons: tuple[ComparisonSpec, ...]
    routing: RoutingSpec
    speed: SpeedSpec | None


def make_plan(recipe: Recipe, folder: Path, base: BaseSpec, experts: Sequence[Expert]) -> Plan:
    """Every spec of a run.

    Args:
        folder: What the recipe's paths are relative to.
        experts: In the order of the stack.

    Raises:
        ExamplesError: rows are missing or malformed, or a test row is also an example.
    """
    sections = {section.name: section for section in recipe.experts}
    names = [expert.name for expert in experts]
    chosen = [sections[name] for name in names]
    examples = _examples(recipe, folder, chosen)
    if recipe.router.null:
        examples[NULL] = background_rows()
    with_own = [name for name in names if name in examples]
    spans = read_spans(recipe.gates.spans, folder, with_own) if _asks_for_spans(recipe) else []
    tasks = make_tasks(
        chosen,
        recipe.benchmark,
        folder,
        token_of_rows(recipe.hub.token_for, allow_http=recipe.hub.allow_http),
    )
    tests = {name: task.rows for name, task in tasks.items() if task.rows}
    check_overlaps(recipe, folder, examples, spans, tests)

    fused = stack_of(base, experts)
    stand_ins = tuple(name for name in names if examples and name not in examples)
    composites = recipe.gates.composites if examples else ()
    conversations, system_prompts = prompt_shapes(recipe) if examples else ((), ())
    router = RouterSpec.of(
        fused.id,
        recipe.router.options(stand_ins, fitted=bool(examples)),
        method=recipe.gates.method if examples else "",
        examples_sha256=_examples_sha256(examples, spans) if examples else "",
        seed=recipe.gates.seed if examples else 0,
        joint=joint_settings(recipe.gates) if examples else None,
        composites=composites,
        conversations=conversations,
        system_prompts=system_prompts,
        template="plain" if examples and recipe.benchmark.template == "plain" else "auto",
        opening_share=OPENING_SHARE if composites else 0.0,
        openings_apart=bool(composites),
        refined=bool(examples) and recipe.gates.method == "calibrate",
        loss_opening_share=OPENING_SHARE if composites and recipe.gates.method == "joint" else 0.0,
    )
    return replace(
        plan_benchmark(base, fused, router, tasks, recipe.benchmark),
        experts=tuple(experts),
        examples=examples,
        spans=tuple(spans),
    )


def plan_benchmark(
    base: BaseSpec,
    fused: FusedSpec,
    router: RouterSpec,
    tasks: Mapping[str, Task],
    settings: BenchmarkSection,
) -> Plan:
    """The plan to measure a checkpoint, without what it was made of."""
    subjects = find_subjects(base, fused, router, settings)
    measurements = find_measurements(tasks, subjects, settings)
    owned = {name: task.rows for name, task in tasks.items() if task.expert}
    return Plan(
        base=base,
        experts=(),
        examples={},
        spans=(),
        tests={name: task.rows for name, task in tasks.items() if task.rows},
        tasks=tasks,
        fused=fused,
        router=router,
        others=subjects.others,
        merges=subjects.merges,
        measurements=measurements,
        comparisons=find_comparisons(tasks, subjects, measurements),
        routing=RoutingSpec(router.id, _examples_sha256(owned)),
        speed=find_speed(subjects, settings),
    )


def check_overlaps(
    recipe: Recipe,
    folder: Path,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    tests: Mapping[str, Sequence[Row]],
) -> None:
    """Refuse test rows that gates would be fitted to; an `ExamplesError` says where both stand."""
    asked = {section.name: section.test for section in recipe.experts}
    asked |= {task.called: task.rows for task in recipe.benchmark.tasks}
    fitted = {section.name: section.examples for section in recipe.experts}
    test_place = partial(_place, asked, folder)
    refuse_overlap(examples, tests, partial(_place, fitted, folder), test_place)
    spans_place = f"in {recipe.gates.spans}"
    refuse_overlap(prompt_parts(spans), tests, lambda *_: spans_place, test_place)


def _place(sources: Mapping[str, str | None], folder: Path, name: str, number: int) -> str:
    """Where a row stands: file and line, or source and number."""
    source = sources.get(name)
    return place_of(source, folder, number) if source else f"row {number + 1}"


def stack_of(base: BaseSpec, experts: Sequence[Expert]) -> FusedSpec:
    """The spec of a stack of experts on a base."""
    ids = tuple(expert.adapter.spec.id for expert in experts)
    return FusedSpec(base.id, tuple(expert.name for expert in experts), ids)


def prompt_shapes(recipe: Recipe) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The turns of the conversations and the system prompts that gates are fitted to.

    Plain text has neither.
    """
    if recipe.benchmark.template == "plain":
        return (), ()
    gates, shared = recipe.gates, recipe.router.opening == "shared"
    turns, systems = gates.conversations, gates.system_prompts
    if turns is None:
        turns = CONVERSATION_TURNS if shared else ()
    if systems is None:
        systems = SYSTEM_PROMPTS if shared else ()
    return turns, systems


def joint_settings(section: CalibrateSection | JointSection) -> JointSettings | None:
    """The settings of joint training that decide its result; None for other methods."""
    if not isinstance(section, JointSection):
        return None
    return JointSettings(**section.model_dump(include={f.name for f in fields(JointSettings)}))


def _examples(
    recipe: Recipe, folder: Path, sections: Sequence[ExpertSection]
) -> dict[str, list[Row]]:
    if recipe.router.kind != "gate":
        return {}
    limit = recipe.gates.examples_per_expert
    token_of = token_of_rows(recipe.hub.token_for, allow_http=recipe.hub.allow_http)
    return {s.name: read_rows(s.examples, folder, limit, token_of) for s in sections if s.examples}


def _asks_for_spans(recipe: Recipe) -> bool:
    return recipe.router.kind == "gate" and bool(recipe.gates.spans)


def _examples_sha256(
    examples: Mapping[str, Sequence[Row]], spans: Sequence[SpannedRow | SpannedTurns] = ()
) -> str:
    asked = [[name, [row.to_dict() for row in rows]] for name, rows in examples.items()]
    return canonical_sha256(asked + [row.to_dict() for row in spans])
