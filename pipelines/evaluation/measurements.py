"""Every score, comparison and timing that a recipe asks for, by system and task."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.artifacts import (
    ArtifactId,
    BaseSpec,
    BenchmarkSpec,
    ComparisonSpec,
    FusedSpec,
    MergeSpec,
    RouterSpec,
    ScorePair,
    SpeedSpec,
)
from pipelines.recipe.benchmark import OF_CONVERSATIONS, BenchmarkSection

if TYPE_CHECKING:
    from pipelines.evaluation.tasks import Task

FUSED, BASE, ORACLE, EXPERTS = "fused", "base", "oracle", "experts"
"""Systems, by their names in a recipe; `experts` is each adapter alone, on every task."""
ONE_EXPERT = "one_expert"
"""One expert for all tokens: in composites the first question's, in conversations the best one."""
SINGLE, SWAP, ALORA = "single", "swap", "alora"
"""Controls for conversations alone; see `conversations`."""
ORACLES = (ORACLE, ONE_EXPERT, SINGLE, SWAP, ALORA)
"""Controls that know which question each token belongs to; see `oracle_routing`."""
MERGES: Mapping[str, tuple[float, float]] = {
    "linear": (0.0, 1.0),
    "ties": (1.0, 0.2),
    "dare_ties": (1.0, 0.2),
}
"""Weight and density by method, as in PEFT's documentation; weight 0 means an equal share."""


@dataclass(frozen=True)
class Measurement:
    """One score that the recipe asks for."""

    system: str
    """`fused`, `base`, one of `ORACLES`, `expert:<name>`, the kind of a router or of a merge."""
    adapter: str
    """The expert that is forced for every token; empty if none is."""
    spec: BenchmarkSpec


def control_of(system: str, task: Task) -> str:
    """The system's name if it is a control and the task has conversations; empty otherwise."""
    return system if task.dialogues and system in ORACLES else ""


@dataclass(frozen=True)
class Subjects:
    """Every artifact that is measured, by the system's name in a recipe."""

    base: BaseSpec
    fused: FusedSpec
    router: RouterSpec
    others: Mapping[str, RouterSpec]
    """Routers to compare with, by kind."""
    merges: Mapping[str, MergeSpec]
    """Merges to compare with, by method."""

    def id_of(self, system: str) -> ArtifactId:
        """The id of a compared system's artifact; `KeyError` for an expert alone."""
        fixed = {FUSED: self.router.id, BASE: self.base.id}
        return fixed.get(system) or {**self.others, **self.merges}[system].id


def find_subjects(
    base: BaseSpec, fused: FusedSpec, router: RouterSpec, settings: BenchmarkSection
) -> Subjects:
    """The specs of all systems that the recipe compares."""
    others, merges = {}, {}
    for system in settings.compare:
        if system in MERGES:
            weight, density = MERGES[system]
            weight = weight or 1 / len(fused.names)
            seed = settings.seed if system == "dare_ties" else 0
            merges[system] = MergeSpec(fused.id, system, weight, density, seed)
        elif system not in {BASE, EXPERTS} and (system not in ORACLES or settings.mixes):
            seed = settings.seed if system == "random" else 0
            others[system] = RouterSpec(
                fused.id,
                system,
                router.top_k,
                router.temperature,
                seed=seed,
                # older scores of `oracle` route the opening to the mean: this gives it another id
                opening="prompt" if system == ORACLE else "own",
            )
    return Subjects(base, fused, router, others, merges)


def find_measurements(
    tasks: Mapping[str, Task], subjects: Subjects, settings: BenchmarkSection
) -> tuple[Measurement, ...]:
    """Every score, in the order of tasks, then systems, then metrics."""
    alone = dict(zip(subjects.fused.names, subjects.fused.adapter_ids, strict=True))
    measurements = []
    for task in tasks.values():
        for system in systems_of(
            settings, alone, task.expert, task.part_metrics, in_turns=bool(task.dialogues)
        ):
            adapter = task.expert if system == ORACLE else system.partition(":")[2]
            subject_id = alone[adapter] if adapter else subjects.id_of(system)
            for metric in task.metrics:
                spec = BenchmarkSpec(
                    subject_id=subject_id,
                    task=task.name,
                    rows_sha256=task.rows_sha256,
                    metric=metric,
                    num_fewshot=task.num_fewshot,
                    max_new_tokens=task.max_new_tokens,
                    seed=0,
                    base_id=subjects.base.id,
                    template=task.template,
                    system_prompt=task.system_prompt,
                )
                measurements.append(Measurement(system, adapter, spec))
    return tuple(measurements)


def systems_of(
    settings: BenchmarkSection,
    experts: Collection[str],
    own: str = "",
    parts: Collection[str] = (),
    *,
    in_turns: bool = False,
) -> Iterator[str]:
    """The systems that answer a task, by name: the fused model, and those of `compare`.

    Args:
        experts: all of the model
        own: the expert that the task belongs to, if any
        parts: the tasks whose questions are joined; empty for other tasks
        in_turns: whether they are turns of a conversation
    """
    for system in (FUSED, *settings.compare):
        if system == EXPERTS:
            if not parts:  # no adapter alone is trained for mixed tasks
                yield from (f"expert:{name}" for name in experts)
        elif system not in ORACLES:
            yield system
        elif parts:  # only if each question has a right expert
            if (in_turns or system not in OF_CONVERSATIONS) and {*experts} >= {*parts}:
                yield system
        elif own and system == ORACLE:
            yield system


def find_comparisons(
    tasks: Mapping[str, Task], subjects: Subjects, measurements: tuple[Measurement, ...]
) -> tuple[ComparisonSpec, ...]:
    """The fused model against every other system, over all tasks with scores of both.

    Only the first metric of each task is compared.
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
    """The timing that the recipe asks for, if it asks for one."""
    section = settings.speed
    if section is None:
        return None
    return SpeedSpec(subjects.router.id, subjects.base.id, **section.model_dump())
