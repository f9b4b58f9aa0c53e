"""The examples that gates are fitted to: of the recipe, of cards, or of a pool."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from meteora.artifacts import NULL, FusedSpec, PoolSpec, Unfitted, canonical_sha256
from meteora.untrusted.findings import counted
from pipelines.admission.card_examples import NoCardExamplesError, read_card_examples
from pipelines.admission.experts import Expert
from pipelines.data.claims import Claim, examples_of, read_claims
from pipelines.data.composites import compose, mixable
from pipelines.data.conversations import CONVERSATION_TURNS, default_system_prompts
from pipelines.data.row_sources import pin_source, read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.data.spans import SpannedRow, SpannedTurns
from pipelines.recipe.recipe import AUTO, Recipe
from pipelines.workspace.context import RunContext
from store.ledger import Ledger

MAX_PROMPTS = 8192
"""The most prompts of a pool and the known prompts together. The distances of all pairs are in
memory twice: 0.53 GB for so many."""
PROMPTS_PER_EXAMPLE = 2
"""Prompts of a pool to read for each example that experts may have; some go to no expert."""
LEAST_EXAMPLES = 2
"""Of an expert: one to fit its gate, one to check it."""


@dataclass(frozen=True)
class Examples:
    """The examples of a recipe's experts; each by expert."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    of_cards: dict[str, str] = field(default_factory=dict)
    """The sources that cards name."""
    of_hub: dict[str, str] = field(default_factory=dict)
    """The recipe's sources on the Hub, with their commits."""
    no_cards: dict[str, str] = field(default_factory=dict)
    """Why the card of an expert has no examples."""
    writers: dict[str, str] = field(default_factory=dict)
    """Those of `no_cards` that have to write prompts themselves."""


def read_examples(
    context: RunContext,
    experts: Sequence[Expert],
    tested: Collection[str],
    token_of: Callable[[str], str | None],
) -> Examples:
    """Read the examples of every expert.

    Args:
        tested: the questions of the recipe's own test rows; rows of a card's data set with these
            are left out

    Raises:
        NoCardExamplesError: a card names no usable examples, and the recipe has neither a pool nor
            another way to route to that expert. With plain text experts cannot write prompts: only
            a template marks the end of a prompt.
    """
    recipe, found = context.recipe, Examples()
    if recipe.router.kind != "gate":
        return found
    limit = recipe.gates.examples_per_expert
    sources = {section.name: section.examples for section in recipe.experts}
    for expert in experts:
        source = sources.get(expert.name, AUTO)  # an adapter that `discover` found has no section
        if source == AUTO:
            _read_card(context, expert, tested, token_of, found)
        elif source:
            if pinned := pin_source(source, token_of):
                source = found.of_hub[expert.name] = pinned
            found.rows[expert.name] = read_rows(source, context.folder, limit, token_of)
    return found


def _read_card(
    context: RunContext,
    expert: Expert,
    tested: Collection[str],
    token_of: Callable[[str], str | None],
    found: Examples,
) -> None:
    """Add the examples that an adapter's card names, or that it has to write some."""
    recipe = context.recipe
    limit, pool = recipe.gates.examples_per_expert, recipe.gates.pool
    try:
        most = limit
        while True:  # mostly none is tested, and no more are read than needed
            every, source = read_card_examples(expert.datasets, context.folder, most, token_of)
            rows = [row for row in every if row.question not in tested][:limit]
            is_all = len(every) < most or most >= limit + len(tested)  # rows may be repeated
            if len(rows) == limit or is_all:
                break
            most = min(2 * most, limit + len(tested))
        if len(rows) < min(LEAST_EXAMPLES, len(every)):
            raise NoCardExamplesError(
                f"{source}: all but {len(rows)} of its {len(every)} rows are test rows"
            )
    except NoCardExamplesError as error:
        found.no_cards[expert.name] = str(error)
        if recipe.benchmark.template != "plain" and not pool:
            found.writers[expert.name] = str(error)
        elif not pool and recipe.router.without_examples == "refuse":
            raise NoCardExamplesError(
                f"expert {expert.name}: no examples: {error}; name some, or a pool of prompts"
                " (gates.pool), or choose router.kind: prompt"
            ) from error
    else:
        found.rows[expert.name], found.of_cards[expert.name] = rows, source


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


def find_pool(
    context: RunContext,
    fused: FusedSpec,
    examples: Mapping[str, Sequence[Row]],
    known: Mapping[str, Sequence[str]],
    writers: Mapping[str, str],
    token_of: Callable[[str], str | None],
) -> tuple[PoolSpec | None, tuple[str, ...]]:
    """The pool, if any expert needs it, and its prompts; none if experts will write them."""
    recipe = context.recipe
    source, limit = recipe.gates.pool, recipe.gates.examples_per_expert
    if recipe.router.kind != "gate" or set(fused.names) <= examples.keys():
        return None, ()
    beside = canonical_sha256(known) if known else ""
    how = (limit, recipe.gates.seed, template_of(recipe), beside)
    if writers:
        return PoolSpec(fused.id, "", *how, writers=tuple(writers)), ()
    if not source:
        return None, ()
    most = most_prompts(recipe, len(fused.names))
    rows = read_rows(source, context.folder, most, token_of, answered=False)
    prompts = pool_prompts(source, rows, examples)
    prompts = prompts[: MAX_PROMPTS - sum(map(len, known.values()))]
    return PoolSpec(fused.id, canonical_sha256(prompts), *how), tuple(prompts)


def recorded_claims(ledger: Ledger, pool: PoolSpec) -> list[Claim] | None:
    """The experts' claims on a pool's prompts, from the store; None if it is not divided yet."""
    sha256 = ledger.weights_of(pool.id)
    if sha256 is None or sha256 not in ledger.blobs:
        return None
    return read_claims(ledger.blobs.path_of(sha256).read_text(encoding="utf-8"))


def pool_prompts(
    source: str, rows: Sequence[Row], examples: Mapping[str, Sequence[Row]]
) -> list[str]:
    """The different prompts of a pool that are no examples already.

    Raises:
        ExamplesError: There are fewer than two.
    """
    known = {row.sha256 for own in examples.values() for row in own}
    prompts: dict[str, str] = {}
    for row in rows:
        if row.sha256 not in known:
            prompts.setdefault(row.sha256, row.prompt)
    if len(prompts) < 2:
        raise ExamplesError(
            f"gates.pool, {source}: beside the examples it has {counted(len(prompts), 'prompt')}; a"
            " pool needs many of each expert's task"
        )
    return [*prompts.values()]


def with_claims(
    recipe: Recipe,
    names: Sequence[str],
    examples: Mapping[str, Sequence[Row]],
    claims: Sequence[Claim],
    writers: Mapping[str, str],
) -> dict[str, list[Row]]:
    """The examples by expert, for experts without any those that they claim in the pool.

    Raises:
        ExamplesError: An expert claims too few, and the recipe has no other way to route to it.
    """
    claimed = examples_of(claims)
    enough = {name: rows for name, rows in claimed.items() if len(rows) >= LEAST_EXAMPLES}
    known = {**enough, **examples}
    rows_of = {name: list(known[name]) for name in names if name in known}
    left = [name for name in names if name not in rows_of]
    if left and (recipe.router.without_examples == "refuse" or not rows_of):
        name, count = left[0], len(claimed.get(left[0], ()))
        if name in writers:
            raise NoCardExamplesError(
                f"expert {name}: no examples: {writers[name]}; and of the prompts that it writes"
                f" itself {count} are surely of its task; name some, or a pool of prompts"
                " (gates.pool), or choose router.kind: prompt"
            )
        raise ExamplesError(
            f"expert {name}: of the {len(claims):,} prompts of gates.pool {count} are surely its"
            f" own, and a gate needs {LEAST_EXAMPLES} or more; add prompts of its task, give it"
            " examples, or choose router.kind: prompt, which needs none"
        )
    return rows_of


def refuse_too_few(
    recipe: Recipe,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    *,
    whole: bool,
) -> None:
    """Refuse gates without examples, or with too few for one of them or for the composites.

    With composites one example is enough for a gate: it occurs in several of them.

    Args:
        whole: Whether these are the examples of all experts. Composites of fewer experts take more
            examples of each, and are not looked at.

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
    if recipe.router.kind == "gate" and whole and not own:
        raise ExamplesError(
            "no expert that is left has examples, and a gate is fitted to some; give one of them"
            f" examples, or choose a router that needs none ({', '.join(get_args(Unfitted))})"
        )
    for mixed in recipe.gates.composites if own and whole else ():
        rows_of = mixable(own)
        try:
            compose(rows_of, mixed.n, 1, recipe.gates.seed, mixed.num_fewshot)
        except ExamplesError as error:
            raise ExamplesError(f"gates.composites, n: {mixed.n}: {error}") from error


def asks_for_spans(recipe: Recipe) -> bool:
    """Whether gates are fitted to examples with several owners, of `gates.spans`."""
    return recipe.router.kind == "gate" and bool(recipe.gates.spans)


def template_of(recipe: Recipe) -> str:
    """The template of prompts for the gates: the benchmark's."""
    return "plain" if recipe.benchmark.template == "plain" else "auto"


def prompt_shapes(recipe: Recipe, num_examples: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
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
        systems = default_system_prompts(num_examples, turns) if everywhere else ()
    return turns, systems
