"""The memory, disk and time of each stage of a run, before anything is loaded or downloaded.

Memory follows from the shapes of the base (its config), of the experts (an adapter that is not on
this disk counts as rank 8 on every linear layer, as in the paper), and of the rows.

Time is work divided by speed. Work: for the prompt two operations per parameter and token; for each
generated token one pass over the weights, and a number of calls per layer; for gates the products
and factors at each input point. Speed: the rates that `machine` measures now, times `EFFICIENCY`.
Answers count with their greatest length, and sources of rows as full, so times are rather too long.
Estimates are good to a factor of two or so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meteora.base.loading import Shape
from meteora.fitting.calibrate import MAX_TOKEN_BYTES
from meteora.fitting.covariance import BLOCK, ITERATIONS
from meteora.fitting.layerwise import MAX_HIDDEN_BYTES, MAX_OUTPUT_BYTES
from meteora.fitting.logistic import MAX_LOGITS, ONE_ROUND, ROUNDS
from meteora.fitting.sequences import MAX_ROWS, TOKENS_PER_BATCH
from meteora.fitting.statistics import MAX_DIRECTIONS, MAX_WRITTEN
from meteora.model.generate import PROMPTS_PER_BATCH
from meteora.model.opening_offsets import EXAMPLES
from meteora.untrusted.findings import counted
from pipelines.data.labels import MAX_NEW_TOKENS, QUESTIONS_IN_COMPOSITES
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
from pipelines.evaluation.tasks import TURNS
from pipelines.planning.batch_size import rows_at_once, working_bytes
from pipelines.planning.plan import prompt_shapes
from pipelines.recipe.benchmark import ConversationSection, metric_names
from pipelines.recipe.gates import CalibrateSection, JointSection
from pipelines.recipe.recipe import Recipe
from pipelines.scoring.metrics import METRICS
from pipelines.workspace.machine import Machine, is_too_large

PROGRAM_BYTES = 600e6
"""Memory of Python with the model libraries loaded."""
EFFICIENCY = 0.6
"""Share of the measured rates that a whole model reaches; it also copies and normalises."""
CALLS_A_LAYER = 150
CALLS_A_ROUTED_MODULE = 12
ASKING_SECONDS = 0.5
"""Overhead of lm-eval for each task and system."""
SWEEPS, SWEEPS_AGAIN = 1.1, 1.2
"""Passes through the model while gates are fitted, with padding, and the extra passes if the
outputs of no module can be kept: then each point of a layer is computed again."""
FACTOR = 4
"""The time of an operation of a triangular factor, in float64, in those of products in float32."""
SHRINKAGES_TRIED = 4
"""Of `SHRINKAGES`, at most points; each takes a Cholesky factor."""
UNSURE = 0.2
"""Share of the tokens in a round of the refinement: a gate is sure of nearly all others."""
READS, READS_A_STEP = 12, 2.5
"""How often the fit of a point reads its tokens to copy them, and to judge and scale gates; and how
often an iteration of L-BFGS reads those of its round, twice for each loss with its gradient."""
AFTER_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense")
"""Modules that read what attention returns, which may be as wide as what q, k and v read."""
LOGITS_AT_ONCE = 6
"""Tensors [tokens, experts] in memory while a gate is refined; int64 labels count twice."""
READINGS = 5
"""Times that a fit one layer at a time reads the base: to load it, for two trial passes, for the
offsets, and for the sweep. A trial pass of each expert comes on top."""
PASSES_A_STEP = 3
"""Passes for a training step with mixed experts: one forward, about two for the backward."""
MERGE_PASSES = 20
"""Passes over all experts' products B A in float32 for one merge, such as TIES."""
ASSUMED_RANK, ASSUMED_ITEMSIZE = 8, 4
ASSUMED_PROMPT_TOKENS, ASSUMED_ANSWER_TOKENS = 256, 64
CHARACTERS_PER_TOKEN = 4
"""Of system prompts, and of rows if the tokenizer is not on this disk."""


@dataclass(frozen=True)
class Rows:
    """The number of rows of a source, and their mean length."""

    count: int
    prompt_tokens: float = ASSUMED_PROMPT_TOKENS
    answer_tokens: float = ASSUMED_ANSWER_TOKENS
    choices: float = 0.0
    known: bool = False
    """Whether they are on this disk and were measured."""


@dataclass(frozen=True)
class Asking:
    """One task that one system answers."""

    system: str
    rows: Rows
    new_tokens: int
    """The greatest length of an answer; 0 if nothing is generated."""


@dataclass(frozen=True)
class Need:
    """The needs of one stage."""

    stage: str
    memory_bytes: float
    """The peak on the device that computes."""
    disk_bytes: float
    """The size of its results in the store."""
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """The seconds of its parts, by name, if several take long."""
    note: str = ""
    """Printed below the numbers, for an unusual way of work."""


@dataclass(frozen=True)
class Experts:
    """All experts together, by the modules that they change."""

    count: int
    ranks: Mapping[str, int]
    """The sum of all experts' ranks, by module path."""


@dataclass(frozen=True)
class Pace:
    """The speed of a base with its experts on a machine."""

    shape: Shape
    experts: Experts
    machine: Machine

    def calls(self, *, routed: bool) -> int:
        """The number of operations that one pass starts; the same for any batch size."""
        modules = len(self.experts.ranks) if routed else 0
        return CALLS_A_LAYER * self.shape.num_layers + CALLS_A_ROUTED_MODULE * modules

    def reading(self, tokens: float, *, routed: bool, logits: bool = False) -> float:
        """Seconds to read so many tokens; without `logits` the head skips nearly all of them."""
        shape = self.shape
        table = shape.vocab_size * shape.hidden_size
        inside = max(shape.layer_parameters, shape.num_parameters - shape.head_parameters - table)
        work = 2 * tokens * (inside * (1.2 if routed else 1.0) + table * logits)
        return work / (EFFICIENCY * self.machine.flops_per_second)

    def writing(self, rows: int, tokens: int, *, routed: bool) -> float:
        """Seconds to generate `tokens` tokens for each row of a batch, one after the other."""
        weights = self.shape.loaded_bytes / (EFFICIENCY * self.machine.read_bytes_per_second)
        work = 2 * self.shape.num_parameters * rows / (EFFICIENCY * self.machine.flops_per_second)
        return tokens * (max(weights, work) + self.calls(routed=routed) * self.machine.call_seconds)


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
    widths = {path: shape.linears[path][0] for path in experts.ranks}
    gate_bytes, kept_bytes = bytes_of_gates(widths, experts.count)
    held = held_bytes(recipe, expert_bytes)
    loaded = PROGRAM_BYTES + shape.loaded_bytes + held + gate_bytes
    stacked = max(by_module, default=0)
    base_memory = PROGRAM_BYTES + (shape.num_bytes if recipe.base.startswith("gguf:") else 0)
    needs = [
        Need(
            "base", base_memory + 8 * largest, shape.num_bytes, shape.num_bytes * hash_seconds * 2
        ),
        Need("check", PROGRAM_BYTES, 0, expert_bytes * hash_seconds),
        Need("stack", PROGRAM_BYTES + 2 * stacked, expert_bytes, 3 * expert_bytes * hash_seconds),
    ]
    gates = recipe.router.kind == "gate"
    if gates:
        work = _fitting_work(recipe, list(examples.values()), opening_tokens)
        disk = gate_bytes + (kept_bytes if work.kept else 0)
        if reads_by_layer(recipe, shape.num_bytes + held, machine.memory_bytes):
            one_layer = PROGRAM_BYTES + _bytes_by_layer(shape, expert_bytes) + gate_bytes
            need = _gates(pace, one_layer, disk, work)
            readings = READINGS + experts.count + 1
            need = replace(
                need,
                seconds=need.seconds + readings * shape.num_bytes * hash_seconds,
                note="the base is read from the disk one layer at a time",
            )
        else:
            in_file = held < expert_bytes  # then the fitted layer loads all its experts from a file
            fitted = loaded + in_file * expert_bytes / shape.num_layers
            need = _gates(pace, fitted, disk, work)
        if pool is not None:
            dividing = _dividing_seconds(recipe, pace, pool)
            parts = {"dividing the pool": dividing, "fitting": need.seconds}
            need = replace(need, seconds=dividing + need.seconds, parts=parts)
        needs.append(need)
    elif recipe.router.kind == "prompt":
        rows = 2.0 * sum(rank * shape.linears[p][0] for p, rank in experts.ranks.items())
        needs.append(_gates(pace, loaded, rows, FittingWork(BACKGROUND_TOKENS)))
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


def reads_by_layer(recipe: Recipe, num_bytes: float, memory_bytes: float) -> bool:
    """Whether gates are fitted with one layer of the base in memory at a time.

    Args:
        num_bytes: of the base, and of the experts on the device
        memory_bytes: of the device
    """
    if not isinstance(recipe.gates, CalibrateSection) or recipe.quantise:
        return False
    if recipe.gates.by_layer is not None:
        return recipe.gates.by_layer
    return is_too_large(num_bytes, memory_bytes)


def _bytes_by_layer(shape: Shape, expert_bytes: float) -> float:
    """The bytes of one layer with its experts, and of weights in no layer; without the head."""
    itemsize = shape.dtype.itemsize
    inside, head = shape.layer_parameters * itemsize, shape.head_parameters * itemsize
    return shape.num_bytes - inside - head + (inside + expert_bytes) / shape.num_layers


def _widths(inputs: Mapping[str, int]) -> list[int]:
    """The width of each input point.

    Modules of one parent and width share a point, except for what comes after attention.
    """
    parts = [(*path.rpartition(".")[::2], width) for path, width in inputs.items()]
    points = dict.fromkeys((parent, name in AFTER_ATTENTION, n) for parent, name, n in parts)
    return [width for *_, width in points]


def bytes_of_gates(inputs: Mapping[str, int], num_experts: int) -> tuple[float, float]:
    """The largest file sizes of gates, and of the statistics that they are fitted to, in bytes.

    Args:
        inputs: the width of the input of each routed module, by its path
    """
    kept = (2 * min(n, MAX_WRITTEN) * n + 4 * (num_experts + 1) * n for n in _widths(inputs))
    return 4.0 * num_experts * sum(inputs.values()), float(sum(kept))


@dataclass(frozen=True)
class FittingWork:
    """The tokens that pass the model while gates are made."""

    tokens: float
    """Tokens of the sweep."""
    passes: float = 0.0
    """Tokens of further passes, forward or backward."""
    kept: bool = True
    """Whether statistics are kept."""
    graph_tokens: float = 0.0
    """Tokens of a backward pass through the whole model, padding included."""
    top_k: int = 1
    """Experts of a token in that pass."""
    recomputed: bool = False
    """Whether that pass keeps the input of each layer alone (gradient checkpointing)."""


BACKGROUND_TOKENS = 3_000
"""The tokens of the texts that `router.kind: prompt` compares prompts with, in the template."""


def _fitting_work(
    recipe: Recipe, examples: Sequence[Rows], opening_tokens: float = 0.0
) -> FittingWork:
    lengths = [rows.prompt_tokens + rows.answer_tokens for rows in examples]
    num_examples = sum(rows.count for rows in examples)
    num_sequences = num_examples
    tokens = sum(rows.count * length for rows, length in zip(examples, lengths, strict=True))
    for mixed in recipe.gates.composites:
        num_sequences += QUESTIONS_IN_COMPOSITES * len(lengths) / mixed.n
        tokens += QUESTIONS_IN_COMPOSITES * sum(lengths) * (1 + mixed.num_fewshot)
    turns, systems = prompt_shapes(recipe, num_examples)
    if turns:  # every example is one turn of a conversation
        num_sequences *= len(turns) / sum(turns)
    above = [len(system) / CHARACTERS_PER_TOKEN for system in systems] or [0.0]
    # every other one has a system prompt
    before = opening_tokens + sum(above) / len(above) / 2
    tokens += num_sequences * before
    both = 2 * EXAMPLES if recipe.router.options((), fitted=True).opening == "shared" else 0
    longest = opening_tokens + max(above) + max(lengths, default=0.0)
    # products are of tokens alone; what else a model computes is of their padding, too
    for_offsets = both * sum(longest - EFFICIENCY * (longest - before - n) for n in lengths)
    if not isinstance(recipe.gates, JointSection):
        return FittingWork(tokens, for_offsets)
    settings = recipe.gates
    learned = settings.steps * settings.batch_size * settings.accumulate
    each = tokens / max(1, num_sequences)
    swept = tokens if settings.start == "calibrate" else 2 * each * len(lengths)
    if recipe.router.top_k == 1:  # no gradient goes through the model
        return FittingWork(swept, learned * each + for_offsets, kept=False)
    longest = max(lengths, default=0.0) * max(turns or (1,)) + max(above)
    return FittingWork(
        swept,
        PASSES_A_STEP * learned * each + for_offsets,
        kept=False,
        graph_tokens=settings.batch_size / (settings.processes or 1) * longest,
        top_k=recipe.router.top_k,
        recomputed=settings.gradient_checkpointing,
    )


def _graph_bytes(shape: Shape, experts: Experts, work: FittingWork) -> float:
    """The memory of a backward pass: what each layer keeps for it, logits and their gradients."""
    sizes = [shape.linears[path] for path in experts.ranks]
    routed = sum(work.top_k * num_in + num_out for num_in, num_out in sizes) / shape.num_layers
    layer = (8 * shape.hidden_size + 4 * shape.intermediate_size + routed) * shape.dtype.itemsize
    states = shape.hidden_size * shape.dtype.itemsize
    layers = shape.num_layers * (states if work.recomputed else layer) + layer
    return work.graph_tokens * (layers + (8 + shape.dtype.itemsize) * shape.vocab_size)


def _gates(pace: Pace, loaded: float, disk: float, work: FittingWork) -> Need:
    shape, experts, tokens = pace.shape, pace.experts, work.tokens
    itemsize = shape.dtype.itemsize
    widths = _widths({path: shape.linears[path][0] for path in experts.ranks})
    widest = max(widths, default=shape.hidden_size)
    size = min(widest, MAX_ROWS)
    hidden = min(tokens * shape.hidden_size * itemsize, MAX_HIDDEN_BYTES)
    batch = TOKENS_PER_BATCH * (4 * shape.intermediate_size + 8 * shape.hidden_size) * itemsize
    spread = 48 * size * size + 8 * MAX_ROWS * widest
    outputs = tokens * itemsize * sum(shape.linears[p][1] for p in experts.ranks) / shape.num_layers
    kept_outputs = min(outputs, MAX_OUTPUT_BYTES)
    sweeps = SWEEPS + SWEEPS_AGAIN * (1 - kept_outputs / outputs)
    seconds = pace.reading(sweeps * tokens, routed=True)
    seconds += pace.reading(work.passes, routed=True, logits=work.graph_tokens > 0)
    seconds += sum(_point_seconds(pace, width, tokens) for width in widths)
    copies = 2 * min(4 * tokens * widest, MAX_TOKEN_BYTES)  # all, and whitened those of a round
    copies += LOGITS_AT_ONCE * 4 * min(tokens * experts.count, MAX_LOGITS)
    memory = loaded + batch + spread + copies
    if pace.machine.is_cpu:  # a sweep keeps its states between points in the CPU's memory
        memory += hidden + kept_outputs
    memory = max(memory, loaded + _graph_bytes(shape, experts, work))
    return Need("gates", memory, disk, seconds)


def _point_seconds(pace: Pace, width: int, tokens: float) -> float:
    """The time to fit the gate of one input point to its tokens."""
    rows, found = min(tokens, MAX_ROWS), MAX_DIRECTIONS
    if width <= rows:  # a triangle of second moments, block by block
        size, flops = width, tokens * width * min(2 * width, width + BLOCK)
        flops += 2 * (ITERATIONS + 1) * found * width**2
    else:  # products of rows in float64, which take twice as long
        size, flops = rows, 2 * rows * width * min(2 * rows, rows + BLOCK)
        flops += 2 * 4 * (ITERATIONS + 1) * found * width * rows
    flops += FACTOR * (SHRINKAGES_TRIED * size**3 / 3 + 6 * ITERATIONS * found**2 * width)
    kept = min(tokens, MAX_TOKEN_BYTES / 4 / width)
    taken = min(UNSURE * kept, MAX_LOGITS / pace.experts.count)
    flops += len(ROUNDS + ONE_ROUND) * 4 * taken * width * MAX_DIRECTIONS  # to whiten them
    rate = EFFICIENCY * pace.machine.flops_per_second
    read = width * (READS_A_STEP * sum(ROUNDS + ONE_ROUND) * taken + READS * kept)
    products = 2 * pace.experts.count * read / rate
    return flops / rate + max(products, 4 * read / pace.machine.read_bytes_per_second)


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
        for system in systems_of(settings, experts, parts=parts, in_turns=in_turns):
            if in_turns:
                times = len(parts) if system == ONE_EXPERT else 1
                yield from _conversation(system, section, mean, longest) * times
            else:
                solved = section.num_fewshot * (mean + answer)
                rows = Rows(section.count or settings.limit, section.n * (mean + solved))
                yield Asking(system, rows, section.n * longest)


def _conversation(
    system: str, section: ConversationSection, question_tokens: float, new_tokens: int
) -> list[Asking]:
    """The work of a system in conversations: one entry, or one for each turn without a cache."""
    n, count = section.n, section.count or -(-TURNS // section.n)
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
