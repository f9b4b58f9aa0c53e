"""The plan of a run: every spec, and so every id, before any work is done.

Nothing here loads a model or updates the index, so a finished run is recognised within a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

from meteora.artifacts import (
    NULL,
    BaseSpec,
    ComparisonSpec,
    FusedSpec,
    JointSettings,
    PoolSpec,
    RouterSpec,
    RoutingSpec,
    SpeedSpec,
    canonical_sha256,
)
from meteora.artifacts.routers import ANSWER_START_SHARE
from pipelines.admission.experts import Expert
from pipelines.admission.sources import token_of_rows
from pipelines.data.background import background_rows
from pipelines.data.claims import rows_without_expert
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import Row
from pipelines.data.spans import SpannedRow, SpannedTurns, read_spans
from pipelines.evaluation.measurements import (
    Measurement,
    Subjects,
    find_comparisons,
    find_measurements,
    find_speed,
    find_subjects,
)
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.planning.examples import (
    asks_for_spans,
    find_pool,
    known_prompts,
    prompt_shapes,
    read_examples,
    recorded_claims,
    refuse_too_few,
    template_of,
    with_claims,
)
from pipelines.planning.overlaps import check_overlaps
from pipelines.recipe.benchmark import BenchmarkSection
from pipelines.recipe.gates import CalibrateSection, JointSection, numbers_of
from pipelines.recipe.recipe import Recipe
from pipelines.workspace.context import RunContext


@dataclass(frozen=True)
class Plan(Subjects):
    """Every spec of a run. Equal recipes over equal sources give equal plans."""

    experts: tuple[Expert, ...]
    examples: Mapping[str, Sequence[Row]]
    """Rows to fit the gates to, by expert."""
    spans: tuple[SpannedRow | SpannedTurns, ...]
    """Examples whose parts or turns belong to different experts."""
    tasks: Mapping[str, Task]
    """Every task of the benchmark, by name."""
    measurements: tuple[Measurement, ...]
    comparisons: tuple[ComparisonSpec, ...]
    routing: RoutingSpec
    speed: SpeedSpec | None
    card_examples: Mapping[str, str] = field(default_factory=dict)
    """The source of examples that an expert's card names, by expert."""
    no_card_examples: Mapping[str, str] = field(default_factory=dict)
    """Why an expert's card has no examples, by expert with `examples: auto`."""
    hub_examples: Mapping[str, str] = field(default_factory=dict)
    """The source with its commit, by expert, of examples that the recipe takes from the Hub."""
    pool: PoolSpec | None = None
    """Prompts without labels, for the experts without examples."""
    is_pool_divided: bool = True
    """Whether the pool, if any, is divided among the experts. If not, the plan is made again after
    that: the specs after the stack depend on the examples."""
    pool_prompts: tuple[str, ...] = ()
    """The pool's prompts, if it is not divided yet; none if experts will write them."""
    known_prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Prompts of the experts with examples, by expert; they help to divide the pool."""
    whole: bool = True
    """Whether the benchmark has every known task of the experts."""

    @property
    def watches_routing(self) -> bool:
        """Whether the routes of held-out tokens are counted.

        Not for the rows of only some experts: they would replace the counts for all.
        """
        return self.whole and bool(self.own_tests)

    @property
    def own_tests(self) -> dict[str, Sequence[Row]]:
        """The rows of each expert's own task, in the order of the experts."""
        own = {task.expert: task.rows for task in self.tasks.values() if task.expert}
        return {name: own[name] for name in self.fused.names if name in own}

    @property
    def judges(self) -> dict[str, Mapping[str, str]]:
        """The metric of each task's questions, by composite or conversation and by task."""
        return {name: task.part_metrics for name, task in self.tasks.items() if task.mixed}

    @property
    def rows_without_expert(self) -> list[Row]:
        """Rows of tasks without an expert, if the base is a choice of the router."""
        return _rows_without_expert(self.router, self.tasks)


def make_plan(context: RunContext, base: BaseSpec, experts: Sequence[Expert]) -> Plan:
    """Every spec of a run.

    Raises:
        ExamplesError: rows are missing or malformed, a test row is also an example, or an expert
            has too few examples.
    """
    recipe, folder = context.recipe, context.folder
    sections = {section.name: section for section in recipe.experts}
    names = [expert.name for expert in experts]
    chosen = [sections[name] for name in names if name in sections]  # a found adapter has no tests
    token_of = token_of_rows(recipe.hub)
    tasks = make_tasks(chosen, recipe.benchmark, folder, partial(read_rows, token_of=token_of))
    tests = {name: task.rows for name, task in tasks.items() if task.rows}
    tested = {row.question for rows in tests.values() for row in rows}
    own = read_examples(context, experts, tested, token_of)
    examples, writers = own.rows, own.writers
    fused = stack_of(base, experts)
    known = known_prompts(examples, fused.names)
    pool, prompts = find_pool(context, fused, examples, known, writers, token_of)
    claims = recorded_claims(context.ledger, pool) if pool else None
    is_pool_divided = pool is None or claims is not None
    if pool and claims is not None:
        if writers:  # an expert can write a test question by chance
            claims = [one for one in claims if Row(one.prompt, "").question not in tested]
        examples = with_claims(recipe, names, examples, claims, writers)
    if recipe.router.null and recipe.router.kind == "gate":
        outside = rows_without_expert(claims or ())[: recipe.gates.examples_per_expert]
        examples[NULL] = [*background_rows(), *outside]
    with_own = [name for name in names if name in examples] if is_pool_divided else names
    spans = read_spans(recipe.gates.spans, folder, with_own) if asks_for_spans(recipe) else []
    check_overlaps(context, examples, spans, tests, prompts)
    refuse_too_few(recipe, examples, spans, whole=is_pool_divided)
    router = _router(recipe, fused, examples, spans, pool)
    return replace(
        plan_benchmark(base, fused, router, tasks, recipe.benchmark),
        experts=tuple(experts),
        examples=examples,
        spans=tuple(spans),
        pool=pool,
        is_pool_divided=is_pool_divided,
        pool_prompts=() if is_pool_divided else prompts,
        known_prompts=known if pool else {},
        card_examples=own.of_cards,
        no_card_examples=own.no_cards,
        hub_examples=own.of_hub,
    )


def plan_benchmark(
    base: BaseSpec,
    fused: FusedSpec,
    router: RouterSpec,
    tasks: Mapping[str, Task],
    settings: BenchmarkSection,
) -> Plan:
    """The plan to measure a checkpoint; it has no experts, examples or spans."""
    subjects = find_subjects(base, fused, router, settings)
    measurements = find_measurements(tasks, subjects, settings)
    owned = {name: task.rows for name, task in tasks.items() if task.expert}
    if others := _rows_without_expert(router, tasks):
        owned[NULL] = others
    return Plan(
        **vars(subjects),
        experts=(),
        examples={},
        spans=(),
        tasks=tasks,
        measurements=measurements,
        comparisons=find_comparisons(tasks, subjects, measurements),
        routing=RoutingSpec(router.id, _examples_sha256(owned)),
        speed=find_speed(subjects, settings),
    )


def _rows_without_expert(router: RouterSpec, tasks: Mapping[str, Task]) -> list[Row]:
    """Rows of tasks without an expert, if the base is a choice of the router."""
    if not router.null:
        return []
    return [row for task in tasks.values() if not task.expert for row in task.rows]


def _router(
    recipe: Recipe,
    fused: FusedSpec,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    pool: PoolSpec | None,
) -> RouterSpec:
    """The spec of the router. One of kind `prompt` depends on the background texts."""
    options = recipe.router.options((), fitted=False)
    if recipe.router.kind == "prompt":
        return RouterSpec.of(
            fused.id,
            options,
            method="background",
            examples_sha256=_examples_sha256({NULL: background_rows()}),
            template=template_of(recipe),
        )
    pool_id = pool.id if pool else ""
    if not examples:
        return RouterSpec.of(fused.id, options, pool_id=pool_id)
    stand_ins = tuple(name for name in fused.names if name not in examples)
    options = recipe.router.options(stand_ins, fitted=True)
    gates = recipe.gates
    num_examples = sum(len(examples.get(name, ())) for name in fused.names)
    conversations, system_prompts = prompt_shapes(recipe, num_examples)
    calibrated = gates.method == "calibrate"
    opening_share = ANSWER_START_SHARE if gates.composites else 0.0
    return RouterSpec.of(
        fused.id,
        options,
        method=gates.method,
        examples_sha256=_examples_sha256(examples, spans),
        seed=gates.seed,
        joint=joint_settings(gates),
        **numbers_of(gates.composites),
        conversations=conversations,
        system_prompts=system_prompts,
        template=template_of(recipe),
        opening_share=opening_share,
        openings_apart=bool(gates.composites),
        refined=calibrated,
        crossed=calibrated and bool(gates.composites),
        offsets=options.opening == "shared",
        lead_unseen=calibrated and options.null,
        loss_opening_share=0.0 if calibrated else opening_share,
        pool_id=pool_id,
    )


def stack_of(base: BaseSpec, experts: Sequence[Expert]) -> FusedSpec:
    ids = tuple(expert.adapter.spec.id for expert in experts)
    return FusedSpec(base.id, tuple(expert.name for expert in experts), ids)


def joint_settings(section: CalibrateSection | JointSection) -> JointSettings | None:
    """The settings of joint training that change its result; None for other methods."""
    if not isinstance(section, JointSection):
        return None
    return JointSettings(**section.model_dump(include={f.name for f in fields(JointSettings)}))


def _examples_sha256(
    examples: Mapping[str, Sequence[Row]], spans: Sequence[SpannedRow | SpannedTurns] = ()
) -> str:
    by_name = [[name, [row.to_dict() for row in rows]] for name, rows in examples.items()]
    return canonical_sha256(by_name + [row.to_dict() for row in spans])
