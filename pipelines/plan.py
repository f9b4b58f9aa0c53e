"""What a recipe comes to: every spec, and so every id, before any work is done.

Nothing here loads a model or opens a database, which is why a finished run is known in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora import adapters
from meteora.artifacts import (
    AdapterRef,
    ArtifactId,
    BaseSpec,
    BenchmarkSpec,
    FusedSpec,
    RouterSpec,
    RoutingSpec,
    canonical_sha256,
)
from meteora.sources import GGUF, PATH, file_sha256, find_gguf, weights_sha256
from pipelines import hub
from pipelines.examples import Row, read_rows, refuse_overlap, rows_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from meteora.adapters import Adapter
    from meteora.artifacts import BuiltBase
    from pipelines.recipe import ExpertSection, Recipe

EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class Expert:
    """An expert that was found, read and accepted."""

    name: str
    ref: AdapterRef
    adapter: Adapter
    licence: str
    """As its card or repository says; empty where nothing is said."""


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


def resolve_base(recipe: Recipe, folder: Path) -> BaseSpec:
    """The base at one revision; the weights are hashed where they are local."""
    source = recipe.base
    if source.startswith(GGUF):
        return BaseSpec(source, f"sha256:{file_sha256(find_gguf(source))}")
    if source.startswith(PATH):
        local = folder / source.removeprefix(PATH)
        return BaseSpec(PATH + local.name, f"sha256:{weights_sha256(local)}")
    ref = hub.resolve(source)
    return BaseSpec(ref.repo_id, ref.revision)


def resolve_adapter(expert: ExpertSection, folder: Path) -> AdapterRef:
    """Where an expert's adapter lies, pinned."""
    if expert.adapter.startswith(PATH):
        local = local_folder(expert, folder)
        return AdapterRef(PATH + local.name, f"sha256:{weights_sha256(local)}", expert.subfolder)
    return hub.resolve(expert.adapter, subfolder=expert.subfolder)


def fetch_adapter(expert: ExpertSection, ref: AdapterRef, folder: Path, cache: Path) -> Path:
    """The folder that holds an adapter's files; downloaded at its commit where it is remote."""
    if expert.adapter.startswith(PATH):
        return local_folder(expert, folder)
    return hub.download(ref, cache)


def local_folder(expert: ExpertSection, folder: Path) -> Path:
    return folder / expert.adapter.removeprefix(PATH) / expert.subfolder


def read_expert(
    expert: ExpertSection, ref: AdapterRef, adapter_folder: Path, recipe: Recipe, built: BuiltBase
) -> Expert:
    """Read what was fetched; raises `AdapterError` with its reasons where it is not sound."""
    found = adapters.read(adapter_folder, modules_to_save=recipe.policy.modules_to_save)
    fitted = adapters.fit_to_base(found, built.sizes)
    return Expert(expert.name, ref, fitted, hub.licence_of(adapter_folder))


def make_plan(recipe: Recipe, folder: Path, base: BaseSpec, experts: Sequence[Expert]) -> Plan:
    """All specs of a run, from what was resolved and read.

    Raises:
        ExamplesError: rows are missing or malformed, or a test row is also an example.
    """
    sections = {section.name: section for section in recipe.experts}
    names = [expert.name for expert in experts]
    examples = _examples(recipe, folder, [sections[name] for name in names])
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
