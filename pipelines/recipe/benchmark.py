"""The section `benchmark` of a recipe: the measurements, and the systems to compare with."""

import re
from collections import Counter
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from meteora.artifacts import Control, Unfitted

MetricName = Literal[
    "exact_match", "numeric_match", "sentence_bleu", "rouge1", "rouge2", "rougeL", "verified",
    "acc", "acc_norm",
]  # fmt: skip
Template = Literal["auto", "chat", "plain"]
System = Literal["base", Control, Unfitted, "random", "linear", "ties", "dare_ties", "experts"]
OF_CONVERSATIONS = ("single", "swap", "alora")
"""Systems that answer conversations only."""
LEADERBOARD = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+")
MIX = re.compile(r"(composite|conversation)-\d.*")
"""The names of composites and conversations, which no other task may have."""


class Section(BaseModel):
    """A section of a recipe: frozen, with no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_there(cls, body: object) -> object:
        """A section or a list whose lines are all commented out is null."""
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None or k not in cls.model_fields}


class TaskSection(Section):
    """A further task: with rows of its own, or one of lm-eval."""

    name: str = ""
    """Its name in tables. Default for a task of lm-eval: lm-eval's name."""
    rows: str = ""
    """The source of its rows, such as `jsonl:<file>` or `hf:<owner>/<name>`."""
    lm_eval: str = ""
    """The name of a task of lm-eval, in place of rows."""
    folder: str = ""
    """The folder with the YAML of a task that does not come with lm-eval."""
    metric: str | tuple[str, ...] = ""
    """One or more; tables show the first. Default: exact_match; acc for tasks of lm-eval."""
    template: Template | None = None
    """`auto`, `chat` or `plain` prompts. Default: as in `benchmark`."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Greatest length of an answer. Default: as in `benchmark`; tasks of lm-eval have their own."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Greatest number of rows. Default: as in `benchmark`."""
    num_fewshot: Annotated[int, Field(ge=0, le=64)] = 0
    """Solved examples in each prompt of a task of lm-eval."""
    leaderboard: str = ""
    """The Hub's name for this benchmark: owner/dataset/task, as in its `eval.yaml`."""

    @field_validator("leaderboard")
    @classmethod
    def _leaderboard_is_a_task(cls, value: str) -> str:
        if value and not LEADERBOARD.fullmatch(value):
            raise ValueError(f"{value!r} is not owner/dataset/task")
        return value

    @property
    def called(self) -> str:
        """The name in tables and records."""
        return self.name or self.lm_eval

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if bool(self.rows) == bool(self.lm_eval):
            raise ValueError("a task has either `rows` or `lm_eval`")
        if self.rows and not self.name:
            raise ValueError("a task of rows needs a `name`")
        if self.rows and self.num_fewshot:
            raise ValueError("`num_fewshot` is for tasks of `lm_eval`; rows are asked zero-shot")
        if self.rows and self.folder:
            raise ValueError("`folder` is for tasks of `lm_eval`; take it out")
        if self.rows:
            known_metrics(self.metric)
        return self


def written_out(sections: object) -> object:
    """Replace each plain number in a list of sections by `{n: number}`."""
    if not isinstance(sections, tuple | list):
        return sections
    return tuple({"n": n} if isinstance(n, int) else n for n in sections)


class CompositeSection(Section):
    """Prompts that join questions of several tasks."""

    n: Annotated[int, Field(ge=2, le=99)]
    """The number of questions in a prompt."""
    tasks: tuple[str, ...] = ()
    """The tasks whose rows are taken. Default: all tasks with rows."""
    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The number of prompts. Default: `limit` of the benchmark, or fewer if rows of the smallest
    task would be asked again: intervals take a row that is asked again for another one."""
    num_fewshot: Annotated[int, Field(ge=0, le=16)] = 0
    """Solved prompts of the same kind in each prompt, of other rows; the paper has two."""

    @property
    def called(self) -> str:
        """The name in tables and records."""
        return f"composite-{self.n}" + (f"-{self.num_fewshot}shot" if self.num_fewshot else "")


class ConversationSection(Section):
    """Conversations whose subject changes at each turn, made of questions of several tasks."""

    n: Annotated[int, Field(ge=2, le=99)]
    """The number of turns in a conversation."""
    tasks: tuple[str, ...] = ()
    """The tasks whose rows are taken. Default: all tasks with rows."""
    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The number of conversations. Default: as many as have 200 turns together, or fewer if rows
    of the smallest task would be asked again, as for composites."""

    @property
    def called(self) -> str:
        """The name in tables and records."""
        return f"conversation-{self.n}"


class SpeedSection(Section):
    """The settings with which a model is timed against its base."""

    prompt_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Length of each prompt."""
    new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Length of each answer."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Prompts that are answered together."""
    rounds: Annotated[int, Field(ge=6, le=1000)] = 7
    """The number of times that model and base are timed, in turns; of fewer than 6 there is no 95 %
    interval."""


class BenchmarkSection(Section):
    """The measurements, and the systems to compare with."""

    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Greatest number of rows of a task."""
    tasks: tuple[TaskSection, ...] = ()
    """Tasks in addition to the experts' own."""
    composite: tuple[CompositeSection, ...] = ()
    """Also written as plain numbers: `composite: [3, 5]`."""
    conversation: tuple[ConversationSection, ...] = ()
    """Also written as plain numbers: `conversation: [3, 10]`."""
    compare: tuple[System, ...] = ("base", "oracle", "uniform", "arrow")
    """The systems that answer the same rows."""
    template: Template = "auto"
    """`auto`: the chat template if the tokenizer has one. Choose as the adapters were trained. With
    `plain`, gates are fitted to plain text, too."""
    system_prompt: Annotated[str, Field(max_length=20_000)] | None = None
    """Before every question; an empty text means none. Default: that of the chat template."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Greatest length of an answer; for composites, of the answer to each question."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = 16
    """Prompts that are answered together; fewer take less memory. `auto`: for each task as many as
    the memory of the device holds, 64 at most."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0  # numpy takes no other
    """Seed of composites, conversations, the random router, and DARE."""
    speed: SpeedSection | None = None
    """How to time the model against its base. Without this section it is not timed."""

    @property
    def mixes(self) -> tuple[CompositeSection | ConversationSection, ...]:
        """All sections of composites and conversations, which join rows of several tasks."""
        return (*self.composite, *self.conversation)

    _short = field_validator("composite", "conversation", mode="before")(written_out)

    @model_validator(mode="after")
    def _sizes_differ(self) -> Self:
        for kind, unit, sections in (
            ("composites", "questions", self.composite),
            ("kinds of conversations", "turns", self.conversation),
        ):
            counts = Counter(section.called for section in sections)
            for section in sections:
                if counts[section.called] > 1:
                    raise ValueError(f"two {kind} of {section.n} {unit}; one of a size is enough")
        return self

    @model_validator(mode="after")
    def _controls_have_a_task(self) -> Self:
        if "one_expert" in self.compare and not self.mixes:
            raise ValueError(
                "`one_expert` answers only composites and conversations, and there are none; add"
                " `composite: [3]` or `conversation: [3]`, or compare with `oracle`"
            )
        alone = [system for system in OF_CONVERSATIONS if system in self.compare]
        if alone and not self.conversation:
            raise ValueError(
                f"`{alone[0]}` answers only conversations, and there are none; add"
                " `conversation: [3]`, or take it out of `compare`"
            )
        return self

    @model_validator(mode="after")
    def _roles_need_a_template(self) -> Self:
        plain = self.template == "plain" or any(task.template == "plain" for task in self.tasks)
        if self.system_prompt is not None and plain:
            raise ValueError(
                "`system_prompt` needs a chat template, and `template: plain` asks without; take"
                " one of them out"
            )
        if self.conversation and self.template == "plain":
            raise ValueError(
                "`conversation` needs the roles of a chat template, and `template: plain` asks"
                " without; take one of them out"
            )
        return self


def metric_names(metric: str | tuple[str, ...]) -> tuple[str, ...]:
    """The metrics that a section names; empty if it leaves them to the default."""
    return tuple(filter(None, (metric,))) if isinstance(metric, str) else metric


def known_metrics(metric: str | tuple[str, ...]) -> None:
    """Raise `ValueError` if one of the metrics does not exist."""
    if unknown := [one for one in metric_names(metric) if one not in get_args(MetricName)]:
        raise ValueError(
            f"there is no metric {unknown[0]!r}; there are {', '.join(get_args(MetricName))}"
        )
