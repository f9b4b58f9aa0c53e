"""The memory, disk and time of each stage of a run, before anything is loaded or downloaded.

Memory follows from the shapes of the base (its config), of the experts (an adapter that is not on
this disk counts as rank 8 on every linear layer, as in the paper), and of the rows.

Time is work divided by speed. Work: for the prompt two operations per parameter and token; for each
generated token one pass over the weights, and a number of calls per layer; for gates the products
and factors at each input point. Answers count with their greatest length, and sources of rows as
full, so times are rather too long. Estimates are good to a factor of two or so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from meteora.base.shapes import Shape
from meteora.base.sources import GGUF
from meteora.model.generate import PROMPTS_PER_BATCH
from meteora.untrusted.findings import counted
from pipelines.data.background import MAX_NEW_TOKENS
from pipelines.evaluation.measurements import (
    BASE,
    EXPERTS,
    MERGES,
    ONE_EXPERT,
    ORACLE,
    SINGLE,
    SWAP,
    systems_of,
)
from pipelines.evaluation.routing_stats import QUESTIONS, num_composites
from pipelines.evaluation.tasks import num_prompts
from pipelines.planning.fit_estimate import (
    bytes_of_gates,
    bytes_while_fitting,
    fit_need,
    inputs_of,
    prompt_router_need,
)
from pipelines.planning.passes import (
    PROGRAM_BYTES,
    Experts,
    Need,
    Pace,
    Rows,
    rows_at_once,
    working_bytes,
)
from pipelines.recipe.benchmark import ConversationSection, metric_names
from pipelines.recipe.gates import JointSection
from pipelines.recipe.recipe import Recipe
from pipelines.scoring.metrics import METRICS
from pipelines.workspace.machine import Machine

ASKING_SECONDS = 0.5
"""Overhead of lm-eval for each task and system."""
MERGE_PASSES = 20
"""Passes over all experts' products B A in float32 for one merge, such as TIES."""
ASSUMED_RANK, ASSUMED_ITEMSIZE = 8, 4


@dataclass(frozen=True)
class Asking:
    """One task that one system answers."""

    system: str
    rows: Rows
    new_tokens: int
    """The greatest length of an answer; 0 if nothing is generated."""


def assumed_ranks(shape: Shape) -> dict[str, int]:
    """The ranks of an expert that is not on this disk: 8 on every linear layer but the head."""
    inside = [path for path in shape.linears if any(part.isdecimal() for part in path.split("."))]
    return dict.fromkeys(inside, ASSUMED_RANK)


def estimate(
    recipe: Recipe,
    shape: Shape,
    *,
    experts: Experts,
    machine: Machine,
    examples: Mapping[str, Rows],
    tests: Mapping[str, Rows],
    pool: Rows | None = None,
    opening_tokens: float = 0.0,
) -> list[Need]:
    """The needs of each stage, in order.

    Args:
        opening_tokens: of the chat template, before the first question of each sequence that gates
            are fitted to; a benchmark reads them once for all prompts of a batch
        examples: the rows that gates are fitted to, by expert; an expert that takes its rows from
            the pool counts with the most that it may take
        tests: the test rows, by task
        pool: the prompts to divide among the experts, if any
    """
    shape = replace(shape, quantise=recipe.quantise or "")
    pace = Pace(shape, experts, machine)
    hash_seconds = 1 / machine.hash_bytes_per_second
    by_module = [ASSUMED_ITEMSIZE * r * sum(shape.linears[p]) for p, r in experts.ranks.items()]
    expert_bytes = sum(by_module)
    largest = max(size[0] * size[1] for size in shape.linears.values())
    held = held_bytes(recipe, expert_bytes)
    loaded = PROGRAM_BYTES + shape.loaded_bytes + held
    loaded += bytes_of_gates(inputs_of(pace), experts.count, recipe.router.share)[0]
    stacked = max(by_module, default=0)
    base_memory = PROGRAM_BYTES + (shape.num_bytes if recipe.base.startswith(GGUF) else 0)
    needs = [
        Need(
            "base", base_memory + 8 * largest, shape.num_bytes, shape.num_bytes * hash_seconds * 2
        ),
        Need("check", PROGRAM_BYTES, 0, expert_bytes * hash_seconds),
        Need("stack", PROGRAM_BYTES + 2 * stacked, expert_bytes, 3 * expert_bytes * hash_seconds),
    ]
    if recipe.router.kind == "gate":
        need = fit_need(
            recipe,
            pace,
            list(examples.values()),
            opening_tokens,
            loaded=loaded,
            held=held,
            expert_bytes=expert_bytes,
        )
        is_joint = isinstance(recipe.gates, JointSection)
        scratch = bytes_while_fitting(
            inputs_of(pace), experts.count, recipe.router.share, is_joint=is_joint
        )
        need = replace(need, scratch_bytes=scratch)
        if pool is not None:
            dividing = _dividing_seconds(recipe, pace, pool)
            parts = {"dividing the pool": dividing, "fitting": need.seconds}
            need = replace(need, seconds=dividing + need.seconds, parts=parts)
        needs.append(need)
    elif recipe.router.kind == "prompt":
        needs.append(prompt_router_need(pace, loaded))
    needs.append(_benchmark(recipe, pace, loaded, tests))
    return needs


def _dividing_seconds(recipe: Recipe, pace: Pace, pool: Rows) -> float:
    """The time of `data.pool.divide`."""
    num_examples = min(pool.count, recipe.gates.examples_per_expert * pace.experts.count)
    tokens = (pool.count + num_examples) * pool.prompt_tokens
    batch = pace.writing(PROMPTS_PER_BATCH, MAX_NEW_TOKENS, routed=True)
    return pace.reading(tokens, routed=True) + -(-num_examples // PROMPTS_PER_BATCH) * batch


def held_bytes(recipe: Recipe, expert_bytes: float) -> float:
    """The most bytes of the experts that lie on the device at once."""
    budget = recipe.expert_cache_bytes
    return expert_bytes if budget is None else min(budget, expert_bytes)


def _benchmark(recipe: Recipe, pace: Pace, loaded: float, tests: Mapping[str, Rows]) -> Need:
    settings, shape, experts, machine = recipe.benchmark, pace.shape, pace.experts, pace.machine
    sizes = [shape.linears[p][0] * shape.linears[p][1] for p in experts.ranks]
    seconds, peak, numbers = 0.0, 0.0, set()
    for asking in _askings(recipe, tests):
        rows = asking.rows
        tokens = rows.prompt_tokens + max(asking.new_tokens, rows.answer_tokens)
        held = sum(sizes) * shape.dtype.itemsize if asking.system in MERGES else 0
        number = rows_at_once(
            settings, shape, tokens, held_bytes=loaded + held, memory_bytes=machine.memory_bytes
        )
        seconds += _asking_seconds(pace, asking, number)
        peak = max(peak, held + working_bytes(shape, min(number, rows.count), tokens))
        numbers.add(number)
    parts = {"asking": seconds}
    if merges := [system for system in settings.compare if system in MERGES]:
        making = 3 * 4 * experts.count * max(sizes, default=0)
        peak = max(peak, sum(sizes) * shape.dtype.itemsize + making)
        passes = len(merges) * MERGE_PASSES * 4 * experts.count * sum(sizes)
        parts["merging"] = passes / machine.read_bytes_per_second
    owned = [tests[e.name] for e in recipe.experts if e.name in tests]
    watched = sum(rows.count * (rows.prompt_tokens + rows.answer_tokens) for rows in owned)
    parts["measuring routing"] = pace.reading(watched, routed=True)
    if len(owned) > 1:  # composite prompts, one at a time, each with answers of several tasks
        num_rows = sum(rows.count for rows in owned)
        number = num_composites(num_rows)
        tokens = number * min(QUESTIONS, len(owned)) * watched / max(1, num_rows)
        calls = number * pace.calls(routed=True)
        parts["measuring switches"] = (
            pace.reading(tokens, routed=True) + calls * machine.call_seconds
        )
    if (speed := settings.speed) is not None:
        written = pace.writing(speed.batch_size, speed.new_tokens, routed=True)
        read = pace.reading(speed.batch_size * speed.prompt_tokens, routed=True)
        parts["timing"] = 2 * (speed.rounds + 1) * (written + read)
    note = ""
    if settings.batch_size == "auto" and numbers:
        shown = "" if len(numbers) == 1 else f"{min(numbers)} to "
        note = f"{shown}{counted(max(numbers), 'prompt')} at a time, by this memory"
    return Need("benchmark", loaded + peak, 0, sum(parts.values()), parts, note)


def _askings(recipe: Recipe, tests: Mapping[str, Rows]) -> Iterator[Asking]:
    """Every task for every system that answers it."""
    settings, experts = recipe.benchmark, [expert.name for expert in recipe.experts]
    tasks = {task.called: task for task in settings.tasks}
    sections = tasks | {expert.name: expert for expert in recipe.experts}
    limits = {n: sections[n].max_new_tokens or settings.max_new_tokens for n in tests}
    for name, rows in tests.items():
        metrics = metric_names(sections[name].metric)
        writes = not metrics or any(m not in METRICS or not METRICS[m].of_choices for m in metrics)
        for system in systems_of(settings, experts, name if name in experts else ""):
            if system != ORACLE or EXPERTS not in settings.compare:  # it is one of the experts, too
                yield Asking(system, rows, limits[name] if writes else 0)
    for section in settings.mixes:
        names = section.tasks or recipe.mixable_names
        parts = {name: tests[name] for name in names if name in tests}
        if not parts:
            continue
        mean = sum(rows.prompt_tokens for rows in parts.values()) / len(parts)
        answer = sum(rows.answer_tokens for rows in parts.values()) / len(parts)
        longest = max(limits[name] for name in parts)
        in_turns = isinstance(section, ConversationSection)
        count = num_prompts(section, settings, [rows.count for rows in parts.values()])
        for system in systems_of(settings, experts, parts=parts, in_turns=in_turns):
            if in_turns:
                times = len(parts) if system == ONE_EXPERT else 1
                yield from _conversation(system, count, section.n, mean, longest) * times
            else:
                solved = section.num_fewshot * (mean + answer)
                rows = Rows(count, section.n * (mean + solved))
                yield Asking(system, rows, section.n * longest)


def _conversation(
    system: str, count: int, n: int, question_tokens: float, new_tokens: int
) -> list[Asking]:
    """The work of a system in `count` conversations of `n` turns.

    It is one entry, or one for each turn without a cache.
    """
    if system == SINGLE:
        return [Asking(system, Rows(n * count, question_tokens), new_tokens)]
    if system == SWAP:  # each turn computes the history again
        lengths = [(turn + 1) * question_tokens + turn * new_tokens for turn in range(n)]
        return [Asking(system, Rows(count, length), new_tokens) for length in lengths]
    return [Asking(system, Rows(count, n * question_tokens), n * new_tokens)]


def _asking_seconds(pace: Pace, asking: Asking, batch_size: int) -> float:
    rows, routed = asking.rows, asking.system not in {BASE, *MERGES}
    seconds = ASKING_SECONDS
    if asking.new_tokens:
        seconds += pace.reading(rows.count * rows.prompt_tokens, routed=routed)
        batches = -(-rows.count // batch_size)
        most = min(batch_size, rows.count)
        return seconds + batches * pace.writing(most, asking.new_tokens, routed=routed)
    weighed = rows.choices * rows.count * (rows.prompt_tokens + rows.answer_tokens)
    return seconds + pace.reading(weighed, routed=routed, logits=True)
