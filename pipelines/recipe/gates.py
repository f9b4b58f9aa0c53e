"""The section `gates` of a recipe: the fit of the gates."""

from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import parse_qs

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from pipelines.recipe.benchmark import Section, written_out

Count = Annotated[int, Field(ge=1, le=1_000_000)]


def refuse_test_rows(source: str) -> str:
    """Refuse examples that are the test rows of a data set of the Hub; else return the source.

    Raises:
        ValueError: it names no split, and `test` is the default.
    """
    kind, _, rest = source.partition(":")
    query = rest.partition("?")[2]
    if kind == "hf" and "split" not in parse_qs(query):
        raise ValueError(
            f"{source} names no split, so its test rows would be read, and examples may not be"
            f" those: add {'&' if query else '?'}split=train"
        )
    return source


Examples = Annotated[str, AfterValidator(refuse_test_rows)]
"""A source of rows that are not for tests."""


class MixedSection(Section):
    """Prompts with examples of several experts: gates learn to switch inside them."""

    n: Annotated[int, Field(ge=2, le=50)]
    """The number of examples in a prompt."""
    num_fewshot: Annotated[int, Field(ge=0, le=16)] = 0
    """Solved prompts of the same kind in each prompt, of other examples; the paper has two."""


Composites = Annotated[tuple[MixedSection, ...], Field(max_length=8), BeforeValidator(written_out)]


def numbers_of(composites: Sequence[MixedSection]) -> dict[str, tuple[int, ...]]:
    """Two fields of a `RouterSpec` about mixed prompts."""
    solved = tuple(section.num_fewshot for section in composites)
    return {
        "composites": tuple(section.n for section in composites),
        "solved": solved if any(solved) else (),
    }


class _Common(Section):
    """The keys of both methods: the data that gates are fitted to."""

    method: str
    examples_per_expert: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    """Greatest number of examples of an expert."""
    composites: Composites = ()
    """Mixed prompts that gates are fitted to. Also written as plain numbers: `[2, 3]`."""
    conversations: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=50)], ...], Field(max_length=8)] | None
    ) = None
    """Numbers of turns of the conversations that gates are fitted to. Default: 1 to 4 with
    `opening: shared` or `share: turn`, else none."""
    system_prompts: (
        Annotated[tuple[Annotated[str, Field(max_length=20_000)], ...], Field(max_length=64)] | None
    ) = None
    """System prompts for every second conversation. Default: with `opening: shared` or
    `share: turn` 24 that ship with the program, else none."""
    spans: Annotated[str, Field(max_length=4096)] = ""
    """`jsonl:<file>` of examples whose parts belong to different experts."""
    pool: Annotated[Examples, Field(max_length=4096)] = ""
    """`jsonl:<file>` of {"prompt"}, without labels. Experts without examples get the prompts on
    which their updates are unusually large."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of the mixed prompts and of the order of training."""


class CalibrateSection(_Common):
    """Gates from one forward sweep: the closed form, refined by logistic regression."""

    method: Literal["calibrate"] = "calibrate"
    """`calibrate`: one forward sweep. `joint`: gradient descent."""
    by_layer: bool | None = None
    """Read the base from the disk one layer at a time, for the same gates. Default: if base and
    experts take more than 0.6 of the memory."""


class JointSection(_Common):
    """Gates by gradient descent, as in the paper; defaults as in its code, except for `steps`."""

    method: Literal["joint"]
    """`calibrate`: one forward sweep. `joint`: gradient descent."""
    start: Literal["calibrate", "zeros"] = "calibrate"
    """Start from gates in closed form, or zeros. The paper trains 15,000 steps from small random
    weights."""
    steps: Count = 1000
    """Optimiser steps."""
    batch_size: Count = 32
    """Sequences in one forward pass."""
    accumulate: Count = 1
    """Batches in one step. More of them save memory, with the result of a larger batch."""
    learning_rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 5e-4
    """The peak of the learning rate, which then falls along a cosine."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.005
    """Share of the steps in which the learning rate rises."""
    gate_loss_weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 50.0
    """Weight of the gate loss, a mean over all gates. One gate gets a hundredth of it or less, so
    at 50 the labels and the language model's loss count about the same for a gate. With `top_k: 1`
    only the labels train the gates, at any weight."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 0.3
    """A gradient with a larger norm is scaled down to this one."""
    checkpoint_every: Count = 100
    """Steps between two training checkpoints, from which a stopped run continues."""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that share each batch, through Accelerate. Default: one for each GPU."""
    sharded: bool = False
    """Divide the base among the processes, if it is too large for one GPU. Each process reads it
    from its files one layer at a time, and keeps its part."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: slower, less memory. No effect with `top_k: 1`."""


def _method(section: object) -> object:
    asked = section.get("method") if isinstance(section, dict) else getattr(section, "method", None)
    return "calibrate" if asked is None else asked


GatesSection = Annotated[
    Annotated[CalibrateSection, Tag("calibrate")] | Annotated[JointSection, Tag("joint")],
    Discriminator(
        _method,
        custom_error_type="unknown_method",
        custom_error_message="method: Input should be 'calibrate' or 'joint'",
    ),
]
