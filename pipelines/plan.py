"""What a recipe comes to: every spec, and so every id, before any work is done.

Nothing here loads a model or opens a database, which is why a finished run is known in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.artifacts import (
    NULL,
    ArtifactId,
    BenchmarkSpec,
    FusedSpec,
    RouterSpec,
    RoutingSpec,
    canonical_sha256,
)
from pipelines.background import background_rows
from pipelines.examples import Row, read_rows, refuse_overlap, rows_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from meteora.artifacts import BaseSpec
    from pipelines.experts import Expert
    from pipelines.recipe import ExpertSection, Recipe

EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class Measurement:
    """One number that the recipe asks for."""

    system: str
    """`fused`, `base`, `oracle`, or the kind of another router."""
    expert: str
    """Whose rows they are, and who answers where the system is `oracle`; empty for other tasks."""
    spec: BenchmarkSpec


@dataclass(frozen=True)
class Plan:
    """Every spec of a run. Equal recipes over equal sources give equal plans."""

    base: BaseSpec
    experts: tuple[Expert, ...]
    examples: Mapping[str, Sequence[Row]]
    """Rows to fit the gates to, by expert."""
    tests: Mapping[str, Sequence[Row]]
    """Rows to ask, by task."""
    fused: FusedSpec
    router: RouterSpec
    others: Mapping[str, RouterSpec]
    """Routers to compare with, by kind."""
    measurements: tuple[Measurement, ...]
    routing: RoutingSpec


def make_plan(recipe: Recipe, folder: Path, base: BaseSpec, experts: Sequence[Expert]) -> Plan:
    """All specs of a run, from what was resolved and read.

    Raises:
        ExamplesError: rows are missing or malformed, or a test row is also an example.
    """
    sections = {section.name: section for section in recipe.experts}
    names = [expert.name for expert in experts]
    examples = _examples(recipe, folder, [sections[name] for name in names])
    if recipe.router.null:
        examples[NULL] = background_rows()
    tests = {
        name: read_rows(test, folder, recipe.benchmark.limit)
        for name in names
        if (test := sections[name].test)
    }
    own_tasks = set(tests)
    for task in recipe.benchmark.tasks:
        tests[task.name] = read_rows(task.rows, folder, recipe.benchmark.limit)
    refuse_overlap(examples, tests)

    fused = FusedSpec(base.id, tuple(names), tuple(e.adapter.spec.id for e in experts))
    router = RouterSpec(
        fused.id,
        recipe.router.kind,
        recipe.router.top_k,
        recipe.router.temperature,
        method=recipe.gates.method if examples else "",
        examples_sha256=_examples_sha256(examples) if examples else "",
        seed=recipe.gates.seed if examples else 0,
        margin=recipe.router.margin,
        opening=recipe.router.opening if examples else "own",
        null=recipe.router.null,
        share=recipe.router.share if examples else "module",
    )
    others: dict[str, RouterSpec] = {
        kind: RouterSpec(fused.id, kind, recipe.router.top_k, recipe.router.temperature)
        for kind in recipe.benchmark.compare
        if kind not in {"base", "oracle"}
    }
    subjects: dict[str, ArtifactId] = {"fused": router.id, "base": base.id}
    subjects.update({kind: spec.id for kind, spec in others.items()})
    adapter_ids = dict(zip(names, fused.adapter_ids, strict=True))
    measurements = []
    for task, rows in tests.items():
        expert = task if task in own_tasks else ""
        for system in ("fused", *recipe.benchmark.compare):
            if system == "oracle" and not expert:
                continue  # no adapter is the right one for it
            spec = BenchmarkSpec(
                subject_id=adapter_ids[expert] if system == "oracle" else subjects[system],
                task=task,
                rows_sha256=rows_sha256(rows),
                metric=EXACT_MATCH,
                num_fewshot=0,
                max_new_tokens=recipe.benchmark.max_new_tokens,
                seed=0,
                base_id=base.id,
            )
            measurements.append(Measurement(system, expert, spec))
    owned = {task: rows for task, rows in tests.items() if task in own_tasks}
    return Plan(
        base=base,
        experts=tuple(experts),
        examples=examples,
        tests=tests,
        fused=fused,
        router=router,
        others=others,
        measurements=tuple(measurements),
        routing=RoutingSpec(router.id, _examples_sha256(owned)),
    )


def _examples(
    recipe: Recipe, folder: Path, sections: Sequence[ExpertSection]
) -> dict[str, list[Row]]:
    if recipe.router.kind != "gate":
        return {}
    limit = recipe.gates.examples_per_expert
    return {s.name: read_rows(s.examples, folder, limit) for s in sections if s.examples}


def _examples_sha256(examples: Mapping[str, Sequence[Row]]) -> str:
    return canonical_sha256(
        [[name, [row.to_dict() for row in rows]] for name, rows in examples.items()]
    )
