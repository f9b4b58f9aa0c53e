"""The part of a recipe that says what is measured, and against what."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MetricName = Literal[
    "exact_match", "numeric_match", "sentence_bleu", "rouge1", "rouge2", "rougeL", "verified",
    "acc", "acc_norm",
]  # fmt: skip
Template = Literal["auto", "chat", "plain"]
System = Literal[
    "base", "oracle", "one_expert", "uniform", "arrow", "norm", "random", "linear", "ties",
    "dare_ties", "experts",
]  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TaskSection(Section):
    """A further task: rows, or one that lm-eval knows."""

    name: str = ""
    rows: str = ""
    lm_eval: str = ""
    folder: str = ""
    """Where lm-eval finds the YAML of a task that it does not bring."""
    metric: str | tuple[str, ...] = ""
    """One or more; tables show the first. Without it exact_match, and acc for lm-eval's own."""
    template: Template | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    leaderboard: Annotated[str, Field(pattern=r"^$|^[\w.-]+/[\w.-]+/[\w.-]+$")] = ""
    """The Hub's benchmark that this is: owner/dataset/task, as the `eval.yaml` there calls it."""

    @property
    def called(self) -> str:
        return self.name or self.lm_eval

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if bool(self.rows) == bool(self.lm_eval):
            raise ValueError("a task has either `rows` or `lm_eval`")
        if self.rows and not self.name:
            raise ValueError("a task of rows needs a `name`")
        if self.rows:
            known_metrics(self.metric)
        return self


class CompositeSection(Section):
    """Prompts of several tasks at once."""

    n: Annotated[int, Field(ge=2, le=99)]
    """Questions in a prompt."""
    tasks: tuple[str, ...] = ()
    """Whose rows; without it all tasks that have rows."""
    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Prompts; without it as many as rows of a task."""


class SpeedSection(Section):
    """How a model is timed against its base."""

    prompt_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 32
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    rounds: Annotated[int, Field(ge=3, le=1000)] = 7


class BenchmarkSection(Section):
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Rows a task."""
    tasks: tuple[TaskSection, ...] = ()
    composite: tuple[CompositeSection, ...] = ()
    """Also written as plain numbers: `composite: [3, 5]`."""
    compare: tuple[System, ...] = ("base", "oracle", "uniform", "arrow")
    template: Template = "auto"
    """`auto` is the chat template where the tokenizer has one; as the adapters were trained."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    """An answer is cut there; one to a composite at as many a question."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    seed: int = 0
    """Deals composites, the random router and what DARE drops."""
    speed: SpeedSection | None = None

    @field_validator("composite", mode="before")
    @classmethod
    def _numbers_are_short_for_sections(cls, value: object) -> object:
        if not isinstance(value, tuple):
            return value
        return tuple({"n": n} if isinstance(n, int) else n for n in value)

    @model_validator(mode="after")
    def _composites_differ(self) -> Self:
        sizes = [section.n for section in self.composite]
        if twice := {n for n in sizes if sizes.count(n) > 1}:
            raise ValueError(f"two composites of {twice.pop()} questions; one of a size is enough")
        if "one_expert" in self.compare and not sizes:
            raise ValueError(
                "`one_expert` answers composites alone, and there are none; add `composite: [3]`,"
                " or compare with `oracle`"
            )
        return self


def known_metrics(metric: str | tuple[str, ...]) -> None:
    names = (metric,) if isinstance(metric, str) else metric
    if unknown := [name for name in names if name and name not in get_args(MetricName)]:
        raise ValueError(
            f"there is no metric {unknown[0]!r}; there are {', '.join(get_args(MetricName))}"
        )
