"""The cost of passes through a base with its experts: their time, and the memory of answers.

Speed: the rates that `machine` measures now, times `EFFICIENCY`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meteora.base.shapes import Shape
from pipelines.recipe.benchmark import BenchmarkSection
from pipelines.workspace.machine import Machine

PROGRAM_BYTES = 600e6
"""Memory of Python with the model libraries loaded."""
EFFICIENCY = 0.6
"""Share of the measured rates that a whole model reaches; it also copies and normalises."""
CALLS_A_LAYER = 150
CALLS_A_ROUTED_MODULE = 12
ASSUMED_PROMPT_TOKENS, ASSUMED_ANSWER_TOKENS = 256, 64
CHARACTERS_PER_TOKEN = 4
"""Of system prompts, and of rows if the tokenizer is not on this disk."""
AT_ONCE = (64, 32, 16, 8, 4, 2)
"""Prompts that `batch_size: auto` tries to answer together."""
FILLED = 0.9
"""Share of the memory that `batch_size: auto` fills; drivers need some of the rest."""


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
    scratch_bytes: float = 0.0
    """The most that it takes on the disk until its results are in the store."""


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


def working_bytes(shape: Shape, num_rows: int, num_tokens: float) -> float:
    """The memory of answers to prompts, beside the model: caches, states and logits.

    Args:
        num_tokens: of the longest prompt with its answer
    """
    itemsize = shape.dtype.itemsize
    a_token = shape.cache_bytes_per_token
    a_token += (4 * shape.hidden_size + 2 * shape.intermediate_size) * itemsize
    return num_rows * (num_tokens * a_token + 4 * shape.vocab_size)


def rows_at_once(
    settings: BenchmarkSection,
    shape: Shape,
    num_tokens: float,
    *,
    held_bytes: float,
    memory_bytes: float,
) -> int:
    """The number of prompts to answer together.

    Args:
        num_tokens: of the longest prompt with its answer
        held_bytes: of the model
    """
    if settings.batch_size != "auto":
        return settings.batch_size
    free = FILLED * memory_bytes - held_bytes
    return next((n for n in AT_ONCE if working_bytes(shape, n, num_tokens) <= free), 1)
