"""The memory, disk and time of a fit of gates.

Work: the tokens that pass the model, and the products and factors at each input point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meteora.base.shapes import Shape
from meteora.fitting.calibrate import MAX_TOKEN_BYTES
from meteora.fitting.covariance import BLOCK, ITERATIONS
from meteora.fitting.layerwise import MAX_HIDDEN_BYTES, MAX_OUTPUT_BYTES
from meteora.fitting.logistic import MAX_LOGITS, ONE_ROUND, ROUNDS
from meteora.fitting.sequences import MAX_ROWS, TOKENS_PER_BATCH
from meteora.fitting.statistics import MAX_DIRECTIONS, MAX_WRITTEN
from meteora.model.opening_offsets import EXAMPLES
from pipelines.data.labels import QUESTIONS_IN_COMPOSITES
from pipelines.planning.examples import prompt_shapes
from pipelines.planning.passes import (
    CHARACTERS_PER_TOKEN,
    EFFICIENCY,
    PROGRAM_BYTES,
    Experts,
    Need,
    Pace,
    Rows,
)
from pipelines.recipe.gates import CalibrateSection, JointSection
from pipelines.recipe.recipe import Recipe
from pipelines.workspace.machine import is_too_large

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
BACKGROUND_TOKENS = 3_000
"""The tokens of the texts that `router.kind: prompt` compares prompts with, in the template."""


def reads_by_layer(recipe: Recipe, num_bytes: float, memory_bytes: float) -> bool:
    """Whether gates are fitted with one layer of the base in memory at a time.

    Args:
        num_bytes: of the base, and of the experts on the device
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


def inputs_of(pace: Pace) -> dict[str, int]:
    """The width of the input of each routed module, by its path."""
    return {path: pace.shape.linears[path][0] for path in pace.experts.ranks}


def _widths(inputs: Mapping[str, int], share: str) -> list[int]:
    """The width of each input point that gets a gate.

    Modules of one parent and width share a point, except for what comes after attention.
    """
    parts = [(*path.rpartition(".")[::2], width) for path, width in inputs.items()]
    points = dict.fromkeys((parent, name in AFTER_ATTENTION, n) for parent, name, n in parts)
    layers: dict[int, list[int]] = {}
    for parent, _, width in points:
        index = next((int(part) for part in parent.split(".") if part.isdecimal()), 0)
        layers.setdefault(index, []).append(width)
    own = {"layer": 0, "token": len(layers) // 3}.get(share, len(layers))
    widths = []
    for place, index in enumerate(sorted(layers)):
        if place < own:  # a gate for each point
            widths += layers[index]
        elif place == own or share == "layer":  # the first point reads the hidden states
            widths.append(min(layers[index]))
    return widths


def bytes_of_gates(inputs: Mapping[str, int], num_experts: int, share: str) -> tuple[float, float]:
    """The largest file sizes of gates, and of the statistics that they are fitted to, in bytes.

    Args:
        share: as in `RouterOptions`
    """
    points = _widths(inputs, share)
    kept = (2 * min(n, MAX_WRITTEN) * n + 4 * (num_experts + 1) * n for n in points)
    # a gate for each module is more than gates for points with the offsets of modules
    return 4.0 * num_experts * sum(inputs.values()), float(sum(kept))


def bytes_while_fitting(
    inputs: Mapping[str, int], num_experts: int, share: str, *, is_joint: bool
) -> float:
    """The most disk space, in bytes, for gates until they are recorded."""
    gates, kept = bytes_of_gates(inputs, num_experts + 2, share)  # with the mean, and the base
    if is_joint:
        return gates * 4  # the saved state: parameters with two moments; and the gates
    # a file for each fitted point, with twice the directions, and one for all
    return gates * 2 + kept * 3


def fit_need(
    recipe: Recipe,
    pace: Pace,
    examples: Sequence[Rows],
    opening_tokens: float,
    *,
    loaded: float,
    held: float,
    expert_bytes: float,
) -> Need:
    """The needs of a fit of gates, without those of dividing a pool.

    Args:
        loaded: bytes of the program, the base, its experts on the device, and the gates
        held: bytes of the experts on the device
    """
    shape, machine, share = pace.shape, pace.machine, recipe.router.share
    work = _fitting_work(recipe, examples, opening_tokens)
    gates, kept = bytes_of_gates(inputs_of(pace), pace.experts.count, share)
    disk = gates + (kept if work.kept else 0)
    if not reads_by_layer(recipe, shape.num_bytes + held, machine.memory_bytes):
        in_file = held < expert_bytes  # then the fitted layer loads all its experts from a file
        return _gates(pace, loaded + in_file * expert_bytes / shape.num_layers, disk, work, share)
    one_layer = PROGRAM_BYTES + _bytes_by_layer(shape, expert_bytes) + gates
    need = _gates(pace, one_layer, disk, work, share)
    readings = READINGS + pace.experts.count + 1
    return replace(
        need,
        seconds=need.seconds + readings * shape.num_bytes / machine.hash_bytes_per_second,
        note="the base is read from the disk one layer at a time",
    )


def prompt_router_need(pace: Pace, loaded: float) -> Need:
    """The needs of making a router that chooses by whole prompts, without examples."""
    inputs = inputs_of(pace)
    rows = 2.0 * sum(rank * inputs[path] for path, rank in pace.experts.ranks.items())
    return _gates(pace, loaded, rows, FittingWork(BACKGROUND_TOKENS))


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


def _fitting_work(recipe: Recipe, examples: Sequence[Rows], opening_tokens: float) -> FittingWork:
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


def _gates(pace: Pace, loaded: float, disk: float, work: FittingWork, share: str = "point") -> Need:
    shape, experts, tokens = pace.shape, pace.experts, work.tokens
    itemsize = shape.dtype.itemsize
    widths = _widths(inputs_of(pace), share)
    widest = max(widths, default=shape.hidden_size)
    size = min(widest, MAX_ROWS)
    hidden = min(tokens * shape.hidden_size * itemsize, MAX_HIDDEN_BYTES)
    batch = TOKENS_PER_BATCH * (4 * shape.intermediate_size + 8 * shape.hidden_size) * itemsize
    spread = 48 * size * size + 8 * MAX_ROWS * widest
    outputs = tokens * itemsize * sum(shape.linears[p][1] for p in experts.ranks) / shape.num_layers
    kept_outputs = min(outputs, MAX_OUTPUT_BYTES)
    sweeps = SWEEPS + SWEEPS_AGAIN * (outputs - kept_outputs) / max(outputs, 1.0)
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
