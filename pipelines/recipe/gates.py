"""The section of a recipe that says how gates are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pipelines.recipe.benchmark import Section

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Composites = Annotated[tuple[Annotated[int, Field(ge=2, le=50)], ...], Field(max_length=8)]
"""How many tasks a prompt holds: gates learn to switch inside prompts of each of these lengths."""

Spans = Annotated[str, Field(max_length=4096)]
"""`jsonl:<file>` of examples whose parts belong to different experts; see `data.spans`."""


class CalibrateSection(Section):
    """Gates in closed form, from one forward sweep."""

    method: Literal["calibrate"] = "calibrate"
    examples_per_expert: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    composites: Composites = ()
    spans: Spans = ""
    seed: int = 0


class JointSection(Section):
    """Gates by gradient descent, as in the paper; the defaults are its code's, but for `steps`."""

    method: Literal["joint"]
    examples_per_expert: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    composites: Composites = ()
    spans: Spans = ""
    seed: int = 0
    start: Literal["calibrate", "zeros"] = "calibrate"
    """From gates in closed form, or from zeros; the paper takes 15,000 steps from small weights."""
    steps: Count = 1000
    batch_size: Count = 32
    """Sequences that go through the model at once."""
    accumulate: Count = 1
    """Batches a step: more of them do with less memory what a larger batch does."""
    learning_rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 5e-4
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.005
    gate_loss_weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 50.0
    """Of a mean over all gates, of which each owns a hundredth or less: at 50 the experts' labels
    and the language model's loss have a like say in one gate. With `top_k: 1` the labels alone
    teach, whatever it is."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 0.3
    checkpoint_every: Count = 100
    """Steps after which a stopped run need not go back further."""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """That share every batch, as Accelerate joins them; without it one a GPU of this machine."""
    sharded: bool = False
    """Divide the base among them, where it is too large for one GPU."""
    gradient_checkpointing: bool = False
    """Compute layers again on the way back: slower, with less memory. No use with `top_k: 1`."""


def _method(section: object) -> object:
    if isinstance(section, dict):
        return section.get("method", "calibrate")
    return getattr(section, "method", None)


METHODS = ("calibrate", "joint")
GatesSection = Annotated[
    Annotated[CalibrateSection, Tag("calibrate")] | Annotated[JointSection, Tag("joint")],
    Discriminator(
        _method,
        custom_error_type="unknown_method",
        custom_error_message=f"method: Input should be {' or '.join(map(repr, METHODS))}",
    ),
]
