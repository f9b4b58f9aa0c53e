"""The plan of a run: every spec, and so every id, before any work is done.

Nothing here loads a model or opens a database, so a finished run is recognised within a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from meteora.artifacts.routers import OPENING_SHARE
from pipelines.admission.card_examples import NoCardExamplesError, read_card_examples
from pipelines.admission.sources import token_of_rows
from pipelines.data.background import background_rows
from pipelines.data.claims import Claim, examples_of, nobodys, prompts_of
from pipelines.data.composites import compose, mixable
from pipelines.data.conversations import CONVERSATION_TURNS, SYSTEM_PROMPTS
from pipelines.data.row_sources import pin_source, read_rows, row_place
from pipelines.data.rows import ExamplesError, Row, refuse_overlap
from pipelines.data.spans import SpannedRow, SpannedTurns, prompt_parts, read_spans
from pipelines.evaluation.measurements import (
    Measurement,
    Subjects,
    find_comparisons,
    find_measurements,
    find_speed,
    find_subjects,
)
from pipelines.evaluation.tasks import Task, make_tasks
from pipelines.recipe.gates import CalibrateSection, JointSection, numbers_of
from pipelines.recipe.recipe import AUTO, Recipe

if TYPE_CHECKING:
    from pipelines.admission.experts import Expert
    from pipelines.recipe.benchmark import BenchmarkSection


MAX_PROMPTS = 8192
"""The most prompts of a pool and the known prompts together. The distances of all pairs are in
memory twice: 0.53 GB for so many."""
PROMPTS_PER_EXAMPLE = 2
"""Prompts of a pool to read for each example that experts may have; some go to no expert."""
LEAST_EXAMPLES = 2
"""Of an expert: one to fit its gate, one to check it."""


@dataclass(frozen=True)
class Plan(Subjects):
    """Every spec of a run. Equal recipes over equal sources give equal plans."""

    experts: tuple[Expert, ...]
    examples: Mapping[str, Sequence[Row]]
    """Rows to fit the gates to, by expert."""
    spans: tuple[SpannedRow | SpannedTurns, ...]
    """Examples whose parts or turns belong to different experts."""
    tests: Mapping[str, Sequence[Row]]
    """Rows to test on, by task. Composites and tasks of lm-eval have no rows here."""
    tasks: Mapping[str, Task]
    """Every task of the benchmark, by name."""
    measurements: tuple[Measurement, ...]
    comparisons: tuple[ComparisonSpec, ...]
    routing: RoutingSpec
    speed: SpeedSpec | None
    card_examples: Mapping[str, str] = field(default_factory=dict)
    """The source of examples that an expert's card names, by expert."""
    hub_examples: Mapping[str, str] = field(default_factory=dict)
    """The source with its commit, by expert, of examples that the recipe takes from the Hub."""
    pool: PoolSpec | None = None
    """Prompts without labels, for the experts without examples."""
    is_dealt: bool = True
    """Whether the pool, if any, is divided among the experts. If not, the plan is made again after
    that: the specs after the stack depend on the examples."""
    to_deal: tuple[str, ...] = ()
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
        return self.whole and any(name in self.tests for name in self.fused.names)

    @property
    def judges(self) -> dict[str, Mapping[str, str]]:
        """The metric of each task's questions, by composite or conversation and by task."""
        return {name: task.part_metrics for name, task in self.tasks.items() if task.mixed}

    @property
    def nobodys(self) -> list[Row]:
        """Rows of tasks without an expert, if the base is a choice of the router."""
        return _nobodys(self.router, self.tasks)


def make_plan(
    recipe: Recipe,
    folder: Path,
    base: BaseSpec,
    experts: Sequence[Expert],
    claims_of: Callable[[PoolSpec], Sequence[Claim] | None] = lambda _pool: None,
) -> Plan:
    """Every spec of a run.

    Args:
        folder: The folder that the recipe's paths are relative to.
        experts: In the order of the stack.
        claims_of: Returns the experts' claims on a pool's prompts; None if it is not divided yet.

    Raises:
        ExamplesError: rows are missing or malformed, a test row is also an example, or an expert
            has too few examples.
    """
    sections = {section.name: section for section in recipe.experts}
    names = [expert.name for expert in experts]
    chosen = [sections[name] for name in names if name in sections]  # a found adapter has no tests
    token_of = token_of_rows(recipe.hub.token_for, allow_http=recipe.hub.allow_http)
    tasks = make_tasks(chosen, recipe.benchmark, folder, partial(read_rows, token_of=token_of))
    tests = {name: task.rows for name, task in tasks.items() if task.rows}
    examples, of_cards, of_hub, writers = _examples(recipe, folder, experts, token_of)
    fused = stack_of(base, experts)
    known = known_prompts(examples, fused.names)
    pool, prompts = _pool(recipe, folder, fused, examples, known, writers, token_of)
    claims = claims_of(pool) if pool else None
    is_dealt = pool is None or claims is not None
    if pool and claims is not None:
        if writers:  # an expert can write a test question by chance
            tested = {row.question for rows in tests.values() for row in rows}
            claims = [one for one in claims if Row(one.prompt, "").question not in tested]
        examples = _with_claims(recipe, names, examples, claims, writers)
    if recipe.router.null and recipe.router.kind == "gate":
        outside = nobodys(claims or ())[: recipe.gates.examples_per_expert]
        examples[NULL] = [*background_rows(), *outside]
    with_own = [name for name in names if name in examples] if is_dealt else names
    spans = read_spans(recipe.gates.spans, folder, with_own) if asks_for_spans(recipe) else []
    check_overlaps(recipe, folder, examples, spans, tests, prompts)
    refuse_too_few(recipe, examples, spans)
    router = _router(recipe, fused, examples, spans, pool)
    return replace(
        plan_benchmark(base, fused, router, tasks, recipe.benchmark),
        experts=tuple(experts),
        examples=examples,
        spans=tuple(spans),
        pool=pool,
        is_dealt=is_dealt,
        to_deal=() if is_dealt else prompts,
        known_prompts=known if pool else {},
        card_examples=of_cards,
        hub_examples=of_hub,
    )


def most_prompts(recipe: Recipe, num_experts: int) -> int:
    """The most rows to read of a recipe's pool."""
    wanted = PROMPTS_PER_EXAMPLE * recipe.gates.examples_per_expert * num_experts
    return min(MAX_PROMPTS, wanted)


def known_prompts(
    examples: Mapping[str, Sequence[Row]], names: Sequence[str]
) -> dict[str, list[str]]:
    """Prompts of the experts with examples, equally many of each; half of `MAX_PROMPTS` at most."""
    own = {name: examples[name] for name in names if name in examples}
    each = MAX_PROMPTS // 2 // max(1, len(own))
    return {name: [row.prompt for row in rows[:each]] for name, rows in own.items()}


def _pool(
    recipe: Recipe,
    folder: Path,
    fused: FusedSpec,
    examples: Mapping[str, Sequence[Row]],
    known: Mapping[str, Sequence[str]],
    writers: Mapping[str, str],
    token_of: Callable[[str], str | None],
) -> tuple[PoolSpec | None, tuple[str, ...]]:
    """The pool, if any expert needs it, and its prompts; none if experts will write them.

    Args:
        writers: Experts that write their prompts, if the recipe names no pool.
    """
    source, limit = recipe.gates.pool, recipe.gates.examples_per_expert
    if recipe.router.kind != "gate" or set(fused.names) <= examples.keys():
        return None, ()
    beside = canonical_sha256(known) if known else ""
    how = (limit, recipe.gates.seed, _template(recipe), beside)
    if writers:
        return PoolSpec(fused.id, "", *how, writers=tuple(writers)), ()
    if not source:
        return None, ()
    most = most_prompts(recipe, len(fused.names))
    rows = read_rows(source, folder, most, token_of, answered=False)
    prompts = prompts_of(rows, examples)[: MAX_PROMPTS - sum(map(len, known.values()))]
    if len(prompts) < 2:
        raise ExamplesError(
            f"gates.pool, {source}: {len(prompts)} prompts that are no examples already; a pool"
            " needs many of each expert's task"
        )
    return PoolSpec(fused.id, canonical_sha256(prompts), *how), tuple(prompts)


def _with_claims(
    recipe: Recipe,
    names: Sequence[str],
    examples: Mapping[str, Sequence[Row]],
    claims: Sequence[Claim],
    writers: Mapping[str, str],
) -> dict[str, list[Row]]:
    """The examples by expert, for experts without any those that they claim in the pool.

    Args:
        writers: Experts that wrote the pool's prompts, each with the reason.

    Raises:
        ExamplesError: An expert claims too few, and the recipe has no other way to route to it.
    """
    claimed = examples_of(claims)
    enough = {name: rows for name, rows in claimed.items() if len(rows) >= LEAST_EXAMPLES}
    known = {**enough, **examples}
    rows_of = {name: list(known[name]) for name in names if name in known}
    if recipe.router.without_examples == "refuse" or not rows_of:
        for name in names:
            if name in writers and name not in rows_of:
                raise NoCardExamplesError(
                    f"expert {name}: no examples: {writers[name]}; and of the prompts that it"
                    f" writes itself {len(claimed.get(name, ()))} are surely of its task; name"
                    " some, or a pool of prompts (gates.pool), or choose router.kind: prompt"
                )
            if name not in rows_of:
                raise ExamplesError(
                    f"expert {name}: of the {len(claims):,} prompts of gates.pool"
                    f" {len(claimed.get(name, ()))} are surely its own, and a gate needs"
                    f" {LEAST_EXAMPLES} or more; add prompts of its task, give it examples, or"
                    " choose router.kind: prompt, which needs none"
                )
    return rows_of


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
    if nobodys := _nobodys(router, tasks):
        owned[NULL] = nobodys
    return Plan(
        **vars(subjects),
        experts=(),
        examples={},
        spans=(),
        tests={name: task.rows for name, task in tasks.items() if task.rows},
        tasks=tasks,
        measurements=measurements,
        comparisons=find_comparisons(tasks, subjects, measurements),
        routing=RoutingSpec(router.id, _examples_sha256(owned)),
        speed=find_speed(subjects, settings),
    )


def _nobodys(router: RouterSpec, tasks: Mapping[str, Task]) -> list[Row]:
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
            template=_template(recipe),
        )
    pool_id = pool.id if pool else ""
    if not examples:
        return RouterSpec.of(fused.id, options, pool_id=pool_id)
    stand_ins = tuple(name for name in fused.names if name not in examples)
    options = recipe.router.options(stand_ins, fitted=True)
    gates, (conversations, system_prompts) = recipe.gates, prompt_shapes(recipe)
    calibrated = gates.method == "calibrate"
    opening_share = OPENING_SHARE if gates.composites else 0.0
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
        template=_template(recipe),
        opening_share=opening_share,
        openings_apart=bool(gates.composites),
        refined=calibrated,
        crossed=calibrated and bool(gates.composites),
        offsets=options.opening == "shared",
        loss_opening_share=0.0 if calibrated else opening_share,
        pool_id=pool_id,
    )


def _template(recipe: Recipe) -> str:
    """The template of prompts for the gates: the benchmark's."""
    return "plain" if recipe.benchmark.template == "plain" else "auto"


def check_overlaps(
    recipe: Recipe,
    folder: Path,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    tests: Mapping[str, Sequence[Row]],
    prompts: Sequence[str] = (),
) -> None:
    """Refuse test rows that gates would be fitted to; an `ExamplesError` names the place of both.

    Args:
        prompts: The prompts of the recipe's pool.
    """
    sources = {section.name: section.test for section in recipe.experts}
    sources |= {task.called: task.rows for task in recipe.benchmark.tasks}
    test_place = partial(_place, sources, folder)
    refuse_overlap(examples, tests, partial(place_of_example, recipe, folder), test_place)
    spans_place = f"in {recipe.gates.spans}"
    refuse_overlap(prompt_parts(spans), tests, lambda *_: spans_place, test_place)
    pool = {"": [Row(prompt, "") for prompt in prompts]}
    pool_place = f"in {recipe.gates.pool}"
    refuse_overlap(pool, tests, lambda *_: pool_place, test_place, kind="a prompt of gates.pool")


def refuse_too_few(
    recipe: Recipe,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
) -> None:
    """Refuse too few examples of an expert for its gate, or of all experts for the composites.

    With composites one example is enough for a gate: it occurs in several of them.

    Raises:
        ExamplesError: There are too few.
    """
    of_spans = Counter(name for row in spans for name in row.owners)
    for name, rows in examples.items():
        count = len(rows) + of_spans[name]
        if count < LEAST_EXAMPLES and not recipe.gates.composites:
            raise ExamplesError(
                f"expert {name} has {count} of the {LEAST_EXAMPLES} examples that a gate needs at"
                " least, one to fit and one to check: give it more"
            )
    own = {name: rows for name, rows in examples.items() if name != NULL}
    for mixed in recipe.gates.composites if own else ():
        rows_of = mixable(own)
        try:
            compose(rows_of, mixed.n, 1, recipe.gates.seed, mixed.num_fewshot)
        except ExamplesError as error:
            raise ExamplesError(f"gates.composites, n: {mixed.n}: {error}") from error


def place_of_example(recipe: Recipe, folder: Path, name: str, number: int) -> str:
    """The place of an expert's example: file and line, or source and number."""
    sources = {one.name: one.examples for one in recipe.experts if one.examples != AUTO}
    return _place(sources, folder, name, number)


def _place(sources: Mapping[str, str | None], folder: Path, name: str, number: int) -> str:
    """The place of a row: file and line, or source and number."""
    source = sources.get(name)
    return row_place(source, folder, number) if source else f"row {number + 1}"


def stack_of(base: BaseSpec, experts: Sequence[Expert]) -> FusedSpec:
    """The spec of a stack of experts on a base."""
    ids = tuple(expert.adapter.spec.id for expert in experts)
    return FusedSpec(base.id, tuple(expert.name for expert in experts), ids)


def prompt_shapes(recipe: Recipe) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The numbers of turns of the conversations that gates are fitted to, and the system prompts.

    Plain text has neither.
    """
    if recipe.benchmark.template == "plain":
        return (), ()
    gates, router = recipe.gates, recipe.router
    everywhere = router.opening == "shared" or router.share == "turn"
    turns, systems = gates.conversations, gates.system_prompts
    if turns is None:
        turns = CONVERSATION_TURNS if everywhere else ()
    if systems is None:
        systems = SYSTEM_PROMPTS if everywhere else ()
    return turns, systems


def joint_settings(section: CalibrateSection | JointSection) -> JointSettings | None:
    """The settings of joint training that change its result; None for other methods."""
    if not isinstance(section, JointSection):
        return None
    return JointSettings(**section.model_dump(include={f.name for f in fields(JointSettings)}))


def _examples(
    recipe: Recipe,
    folder: Path,
    experts: Sequence[Expert],
    token_of: Callable[[str], str | None],
) -> tuple[dict[str, list[Row]], dict[str, str], dict[str, str], dict[str, str]]:
    """Read the examples of every expert.

    Returns:
        Each by expert: the examples, the sources that cards name, the pinned sources on the Hub,
        and, for experts that must write prompts themselves, why their card has no examples.

    Raises:
        NoCardExamplesError: a card names no usable examples, and the recipe has neither a pool nor
            another way to route to that expert. With plain text experts cannot write prompts: only
            a template marks the end of a prompt.
    """
    if recipe.router.kind != "gate":
        return {}, {}, {}, {}
    limit = recipe.gates.examples_per_expert
    sources = {section.name: section.examples for section in recipe.experts}
    examples: dict[str, list[Row]] = {}
    of_cards: dict[str, str] = {}
    of_hub: dict[str, str] = {}
    writers: dict[str, str] = {}
    for expert in experts:
        source = sources.get(expert.name, AUTO)  # an adapter that `discover` found has no section
        if source == AUTO:
            try:
                rows, source = read_card_examples(expert.datasets, folder, limit, token_of)
            except NoCardExamplesError as error:
                if recipe.benchmark.template != "plain" and not recipe.gates.pool:
                    writers[expert.name] = str(error)
                    continue
                if recipe.gates.pool or recipe.router.without_examples != "refuse":
                    continue
                raise NoCardExamplesError(
                    f"expert {expert.name}: no examples: {error}; name some, or a pool of prompts"
                    " (gates.pool), or choose router.kind: prompt"
                ) from error
            examples[expert.name], of_cards[expert.name] = rows, source
        elif source:
            if pinned := pin_source(source, token_of):
                source = of_hub[expert.name] = pinned
            examples[expert.name] = read_rows(source, folder, limit, token_of)
    return examples, of_cards, of_hub, writers


def asks_for_spans(recipe: Recipe) -> bool:
    """Whether gates are fitted to examples with several owners, of `gates.spans`."""
    return recipe.router.kind == "gate" and bool(recipe.gates.spans)


def _examples_sha256(
    examples: Mapping[str, Sequence[Row]], spans: Sequence[SpannedRow | SpannedTurns] = ()
) -> str:
    by_name = [[name, [row.to_dict() for row in rows]] for name, rows in examples.items()]
    return canonical_sha256(by_name + [row.to_dict() for row in spans])
