"""The nouns of measuring: scores, comparisons, speed and routing. `artifacts` hands them on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from meteora.artifacts.identity import ArtifactId, Noun, Spec


@dataclass(frozen=True)
class BenchmarkSpec(Spec):
    """One subject measured on one task under stated circumstances."""

    kind: ClassVar[str] = "benchmark"

    subject_id: ArtifactId
    """A base, an adapter (alone), a merge, or a router (the fused model)."""
    task: str
    rows_sha256: str
    """Of the canonical JSON of the rows that are asked, in order; for a task that the harness
    brings, of its name and the number of rows."""
    metric: str
    num_fewshot: int
    max_new_tokens: int
    """An answer that is not finished by then is cut."""
    seed: int
    base_id: ArtifactId
    """The base that the subject ran on: an adapter alone says nothing without it."""
    template: str = "auto"
    """`chat`, `plain`, or `auto`: the chat template where the tokenizer has one."""

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.subject_id,)


@dataclass(frozen=True)
class ScorePart(Noun):
    """A score on one kind of its questions, such as a sub-task of composites."""

    name: str
    value: float
    num_samples: int
    num_attempted: int
    """Questions that were answered at all."""


@dataclass(frozen=True)
class Score(Noun):
    """A number with its circumstances."""

    spec: BenchmarkSpec
    value: float
    stderr: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    num_samples: int
    outputs_sha256: str
    """The blob that holds each row's prompt, reference, output and score."""
    harness: str
    """Such as `lm-eval 0.4.13`."""
    wall_seconds: float
    higher_is_better: bool = True
    interval: str = "wilson"
    """How `low` and `high` were found: `wilson` or `bootstrap`."""
    templated: bool | None = None
    """Whether prompts were put into the tokenizer's chat template; None where not recorded."""
    num_empty: int = 0
    """Answers without a character: they count, as wrong."""
    num_truncated: int = 0
    """Answers that were cut at `max_new_tokens`."""
    mean_prompt_tokens: float | None = None
    max_prompt_tokens: int | None = None
    parts: tuple[ScorePart, ...] = ()
    device: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "stderr", "low", "high", "wall_seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{self.spec.task}: {name} is {getattr(self, name)}")


@dataclass(frozen=True)
class ScorePair(Noun):
    """Two scores on the same rows."""

    score_id: ArtifactId
    other_id: ArtifactId


@dataclass(frozen=True)
class ComparisonSpec(Spec):
    """One subject against another, over several tasks."""

    kind: ClassVar[str] = "comparison"

    subject_id: ArtifactId
    system: str
    """What the recipe calls the subject: `fused`."""
    other: str
    """What it calls the other: `base`, `oracle`, `arrow` …"""
    pairs: tuple[ScorePair, ...]
    """One a task: the family over which p-values are corrected."""
    seed: int = 0
    """Of the resampling."""

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.subject_id,)


@dataclass(frozen=True)
class Difference(Noun):
    """How far two subjects are apart on the same rows of one task."""

    task: str
    metric: str
    score_id: ArtifactId
    other_id: ArtifactId
    difference: float
    """Mean over the rows, the other's value subtracted."""
    low: float
    """Lower end of its 95 % interval (bootstrap over rows)."""
    high: float
    p_value: float
    """Two-sided, of the paired test."""
    p_holm: float
    """The same, corrected over the comparison's tasks (Holm 1979)."""
    test: str
    """`mcnemar` where every row is right or wrong, `sign-flip` otherwise; both exact or seeded."""
    num_samples: int

    @property
    def significant(self) -> bool:
        """Whether one may be called better than the other at 5 %."""
        return self.p_holm < 0.05


@dataclass(frozen=True)
class ComparisonBuild(Noun):
    spec: ComparisonSpec
    differences: tuple[Difference, ...]
    mean_difference: float
    """Mean over the tasks."""
    low: float
    """Lower end of its 95 % interval (bootstrap over rows within each task)."""
    high: float


@dataclass(frozen=True)
class SpeedSpec(Spec):
    """A routed model timed against its own base, in turns, on one machine."""

    kind: ClassVar[str] = "speed"

    subject_id: ArtifactId
    base_id: ArtifactId
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int
    """Each round times both."""

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.subject_id,)


@dataclass(frozen=True)
class Rate(Noun):
    """How fast one phase of answering is: medians over the rounds."""

    phase: str
    """`prefill` (the prompt) or `decode` (one token after the other)."""
    base_tokens_per_second: float
    fused_tokens_per_second: float
    ratio: float
    """Time of the fused model over time of the base, the median over the rounds."""
    low: float
    """Lower end of the ratio's 95 % interval (bootstrap over rounds)."""
    high: float


@dataclass(frozen=True)
class SpeedBuild(Noun):
    spec: SpeedSpec
    rates: tuple[Rate, ...]
    base_bytes: int
    """Weights of the base in memory."""
    added_bytes: int
    """Experts and routers in memory."""
    base_working_bytes: int | None
    """The most that a prefill took beyond the weights; None where it cannot be measured."""
    fused_working_bytes: int | None
    stored_bytes: int
    """What the checkpoint adds to the base on disk: experts and gates."""
    device: str
    num_threads: int
    dtype: str
    wall_seconds: float


@dataclass(frozen=True)
class RoutingSpec(Spec):
    """One router watched on the experts' own test rows."""

    kind: ClassVar[str] = "routing"
    version: ClassVar[int] = 2  # 1 had neither details nor switches

    router_id: ArtifactId
    rows_sha256: str

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.router_id,)


@dataclass(frozen=True)
class RoutingShare(Noun):
    """How much of one expert's test rows went to it."""

    expert: str
    accuracy: float
    """Share of its (routed module, token) pairs."""


@dataclass(frozen=True)
class RoutingDetail(Noun):
    """How one routed module decides: means over the tokens of all experts' own test rows."""

    module: str
    entropy_bits: float
    """Of the softmax of a token's logits over all experts: 0 where it is sure."""
    weight: float
    """Of the expert that was chosen first."""
    agreement: float
    """Share of tokens that it sends where most modules send them."""


@dataclass(frozen=True)
class RoutingSwitch(Noun):
    """How soon routing follows where one task's text ends and another's begins."""

    expert: str
    """Whose text begins."""
    in_answer: bool
    """Whether it is an answer's text, and not a question's."""
    delay_tokens: int | None
    """Tokens that pass before one is sent to the expert; None where the text ends first."""
    count: int
    """How often that was seen."""


@dataclass(frozen=True)
class RoutingBuild(Noun):
    """Whether tokens go to their own experts, with the gates' own choices below them."""

    spec: RoutingSpec
    accuracy: float
    """Share of all (routed module, token) pairs after the template's opening."""
    by_expert: tuple[RoutingShare, ...]
    num_tokens: int
    wall_seconds: float
    details: tuple[RoutingDetail, ...] = ()
    switches: tuple[RoutingSwitch, ...] = ()


@dataclass(frozen=True)
class RoutingScore(Noun):
    """How often tokens of one expert's own test rows were sent to one expert, at one module."""

    router_id: ArtifactId
    module: str
    truth: str
    """The expert whose rows these are."""
    chosen: str
    """The expert with the largest logit."""
    num_tokens: int
    """Tokens after the template's opening, of prompt and answer."""
