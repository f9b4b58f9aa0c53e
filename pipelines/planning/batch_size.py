"""How many prompts are answered together, by the memory that their answers need."""

from meteora.base.loading import Shape
from pipelines.recipe.benchmark import BenchmarkSection

AT_ONCE = (64, 32, 16, 8, 4, 2)
"""Prompts that `batch_size: auto` tries to answer together."""
FILLED = 0.9
"""Share of the memory that `batch_size: auto` fills; drivers need some of the rest."""


def working_bytes(shape: Shape, num_rows: int, num_tokens: float) -> float:
    """The memory of answers to prompts, beside the model: caches, states and logits.

    Args:
        num_tokens: of the longest prompt, with its answer
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
        num_tokens: of the longest prompt, with its answer
        held_bytes: of the model
        memory_bytes: of the device
    """
    if settings.batch_size != "auto":
        return settings.batch_size
    free = FILLED * memory_bytes - held_bytes
    return next((n for n in AT_ONCE if working_bytes(shape, n, num_tokens) <= free), 1)
