"""Who is asked what: every score, comparison and timing that a recipe comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.artifacts import (
    ArtifactId,
    BenchmarkSpec,
    ComparisonSpec,
    FusedSpec,
    MergeSpec,
    RouterSpec,
    ScorePair,
    SpeedSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from meteora.artifacts import BaseSpec
    from pipelines.evaluation.tasks import Task
    from pipelines.recipe.benchmark import BenchmarkSection

FUSED, BASE, ORACLE, EXPERTS = "fused", "base", "oracle", "experts"
ONE_EXPERT = "one_expert"
TOLD = (ORACLE, ONE_EXPERT)
"""Told whose question each token of a composite belongs to: all of it, or the first."""
MERGES: Mapping[str, tuple[float, float]] = {
    "linear": (0.0, 1.0),
    "ties": (1.0, 0.2),
    "dare_ties": (1.0, 0.2),
}
"""Weight and density by method, as PEFT's documentation uses them; 0 stands for an equal share."""


@dataclass(frozen=True)
class Measurement:
    """One number that the recipe asks for."""

    system: str
    """`fused`, `base`, `oracle`, `expert:<name>`, or the kind of another router or of a merge."""
    expert: str
    """Whose rows they are, and who answers where the system is `oracle`; empty for other tasks."""
    spec: BenchmarkSpec

    @property
    def adapter(self) -> str:
        """The one expert that answers alone; empty for other systems."""
        if self.system == ORACLE:
            return self.expert
        return self.system.partition(":")[2]


@dataclass(frozen=True)
class Subjects:
    """Everything that is measured, by the name that a recipe gives it."""

    base: BaseSpec
    fused: FusedSpec
    router: RouterSpec
    others: Mapping[str, RouterSpec]
    """Routers to compare with, by kind."""
    merges: Mapping[str, MergeSpec]
    """Merges to compare with, by method."""

    def id_of(self, system: str) -> ArtifactId:
        fixed = {FUSED: self.router.id, BASE: self.base.id}
        return fixed.get(system) or {**self.others, **self.merges}[system].id


def find_subjects(
    base: BaseSpec, fused: FusedSpec, router: RouterSpec, settings: BenchmarkSection
) -> Subjects:
    others, merges = {}, {}
    for system in settings.compare:
        if system in MERGES:
            weight, density = MERGES[system]
            weight = weight or 1 / len(fused.names)
            seed = settings.seed if system == "dare_ties" else 0
            merges[system] = MergeSpec(fused.id, system, weight, density, seed)
        elif system not in {BASE, EXPERTS} and (system not in TOLD or settings.composite):
            seed = settings.seed if system == "random" else 0
            others[system] = RouterSpec(
                fused.id, system, router.top_k, router.temperature, seed=seed
            )
    return Subjects(base, fused, router, others, merges)


def find_measurements(
    tasks: Mapping[str, Task], subjects: Subjects, settings: BenchmarkSection
) -> tuple[Measurement, ...]:
    """Every score, task by task; several metrics of one task follow each other."""
    alone = dict(zip(subjects.fused.names, subjects.fused.adapter_ids, strict=True))
    found = []
    for task in tasks.values():
        for system in (FUSED, *settings.compare):
            for name, subject_id in _who(system, task, subjects, alone):
                found += [
                    Measurement(name, task.expert, spec)
                    for spec in _specs(task, subject_id, subjects.base.id)
                ]
    return tuple(found)


def _who(
    system: str, task: Task, subjects: Subjects, alone: Mapping[str, ArtifactId]
) -> Iterator[tuple[str, ArtifactId]]:
    """The names and ids of those who answer a task as one system of a recipe."""
    if system == EXPERTS:
        if not task.composites:  # no adapter alone is meant for them
            for name, adapter_id in alone.items():
                yield f"expert:{name}", adapter_id
    elif system in TOLD:  # for tasks of no expert, no adapter is the right one
        if task.composites and alone.keys() >= task.part_metrics.keys():
            yield system, subjects.id_of(system)
        elif task.expert and system == ORACLE:
            yield system, alone[task.expert]
    else:
        yield system, subjects.id_of(system)


def _specs(task: Task, subject_id: ArtifactId, base_id: ArtifactId) -> Iterator[BenchmarkSpec]:
    for metric in task.metrics:
        yield BenchmarkSpec(
            subject_id=subject_id,
            task=task.name,
            rows_sha256=task.rows_sha256,
            metric=metric,
            num_fewshot=0,
            max_new_tokens=task.max_new_tokens,
            seed=0,
            base_id=base_id,
            template=task.template,
        )


def find_comparisons(
    tasks: Mapping[str, Task], subjects: Subjects, measurements: tuple[Measurement, ...]
) -> tuple[ComparisonSpec, ...]:
    """The fused model against every other system, each over all tasks that both were asked.

    Of a task with several metrics the first is compared.
    """
    ids: dict[str, dict[str, ArtifactId]] = {}
    for one in measurements:
        if one.spec.metric == tasks[one.spec.task].metrics[0]:
            ids.setdefault(one.system, {})[one.spec.task] = one.spec.id
    ours = ids.get(FUSED, {})
    return tuple(
        ComparisonSpec(
            subjects.router.id,
            FUSED,
            other,
            tuple(ScorePair(ours[task], theirs[task]) for task in ours if task in theirs),
        )
        for other, theirs in ids.items()
        if other != FUSED and not other.startswith("expert:")
    )


def find_speed(subjects: Subjects, settings: BenchmarkSection) -> SpeedSpec | None:
    asked = settings.speed
    if asked is None:
        return None
    return SpeedSpec(
        subjects.router.id,
        subjects.base.id,
        asked.prompt_tokens,
        asked.new_tokens,
        asked.batch_size,
        asked.rounds,
    )
