"""Measurements: scores, comparisons, speed and routing."""

import math
from dataclasses import dataclass
from typing import ClassVar

from meteora.artifacts.identity import ArtifactId, Noun, Spec


@dataclass(frozen=True)
class BenchmarkSpec(Spec):
    """One subject on one task, with everything that changes the score."""

    kind: ClassVar[str] = "benchmark"
    made_of: ClassVar[tuple[str, ...]] = ("subject_id",)

    subject_id: ArtifactId
    """A base, an adapter (alone), a merge, or a router (the fused model)."""
    task: str
    rows_sha256: str
    """Of the canonical JSON of the rows, in order. For a task of lm-eval: of its name, the number
    of rows, its files if they are not lm-eval's own, and the length of an answer if the recipe
    names one. A system prompt is hashed too."""
    metric: str
    num_fewshot: int
    max_new_tokens: int
    """A longer answer is cut at this many tokens. Tasks of lm-eval have a length of their own
    unless the recipe names one."""
    seed: int
    base_id: ArtifactId
    """The base that the subject runs on."""
    template: str = "auto"
    """`chat`, `plain`, or `auto`: the chat template if the tokenizer has one."""
    system_prompt: str | None = None
    """Before every question. None: the chat template's own; empty: no system prompt."""


@dataclass(frozen=True)
class ScorePart(Noun):
    """The score on one kind of questions, such as one task of mixed prompts."""

    name: str
    value: float
    num_samples: int
    num_attempted: int
    """Questions with an answer."""


@dataclass(frozen=True)
class ScoreTurn(Noun):
    """The score of one turn; all fields but `turn` are means over the conversations."""

    turn: int
    """From 1."""
    value: float
    prompt_tokens: float
    """Tokens of the question with the whole history."""
    computed_tokens: float
    """The prompt tokens that were computed at this turn; the others were in a cache."""
    new_tokens: float
    """Tokens of the answer."""
    seconds: float
    """Time of a batch divided by the number of its conversations."""


@dataclass(frozen=True)
class Score(Noun):
    """The result of a benchmark."""

    spec: BenchmarkSpec
    value: float
    stderr: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    num_samples: int
    """The number of rows, or of conversations."""
    outputs_sha256: str
    """The blob that holds each row's prompt, reference, output and score."""
    harness: str
    """Such as `lm-eval 0.4.13`."""
    wall_seconds: float
    higher_is_better: bool = True
    interval: str = "wilson"
    """How `low` and `high` are computed: `wilson` or `bootstrap`."""
    templated: bool | None = None
    """Whether prompts were put into the chat template; None if not recorded."""
    num_empty: int = 0
    """Empty answers; they count as wrong."""
    num_truncated: int = 0
    """Answers that were cut at `max_new_tokens`."""
    mean_prompt_tokens: float | None = None
    max_prompt_tokens: int | None = None
    parts: tuple[ScorePart, ...] = ()
    device: str = ""
    turns: tuple[ScoreTurn, ...] = ()
    """Of conversations: one for each turn, in order."""

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
    made_of: ClassVar[tuple[str, ...]] = ("subject_id",)

    subject_id: ArtifactId
    system: str
    """The subject's name in tables: `fused`."""
    other: str
    """The other one's name: `base`, `oracle`, `arrow` …"""
    pairs: tuple[ScorePair, ...]
    """One per task: the family over which p-values are corrected."""
    seed: int = 0
    """Of the resampling."""


@dataclass(frozen=True)
class Difference(Noun):
    """The difference of two subjects on the same rows of one task."""

    task: str
    metric: str
    score_id: ArtifactId
    other_id: ArtifactId
    difference: float
    """Mean over the rows of the subject's value minus the other's."""
    low: float
    """Lower end of its 95 % interval: Agresti and Min's if every row is right or wrong, else a
    bootstrap over rows."""
    high: float
    p_value: float
    """Two-sided, of the paired test."""
    p_holm: float
    """The same, corrected over the comparison's tasks (Holm 1979)."""
    test: str
    """`mcnemar` if every row is right or wrong, else `sign-flip`; exact, or with seeded draws."""
    num_samples: int

    def mark(self, *, higher_is_better: bool) -> str:
        """See `mark_of`."""
        return mark_of(self.difference, self.p_holm, higher_is_better=higher_is_better)


def mark_of(difference: float, p_holm: float, *, higher_is_better: bool) -> str:
    """`+` if a subject is significantly better than another, `-` if worse, else empty.

    The level is 5 %, after the correction.
    """
    if p_holm >= 0.05 or not difference:
        return ""
    return "+" if (difference > 0) == higher_is_better else "-"


@dataclass(frozen=True)
class ComparisonBuild(Noun):
    spec: ComparisonSpec
    differences: tuple[Difference, ...]
    """One for each pair of scores on the same prompts."""
    mean_difference: float
    """Mean over the tasks; where lower is better, with the other sign."""
    low: float
    """Lower end of its 95 % interval, from those of the tasks (MOVER)."""
    high: float


@dataclass(frozen=True)
class SpeedSpec(Spec):
    """A routed model and its own base, timed in turns on one machine."""

    kind: ClassVar[str] = "speed"
    made_of: ClassVar[tuple[str, ...]] = ("subject_id",)

    subject_id: ArtifactId
    base_id: ArtifactId
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int
    """Each round times both models."""


@dataclass(frozen=True)
class Rate(Noun):
    """The speed of one phase of generation: medians over the rounds."""

    phase: str
    """`prefill` (the prompt) or `decode` (token by token)."""
    base_tokens_per_second: float
    fused_tokens_per_second: float
    ratio: float
    """Time of the fused model over time of the base."""
    low: float
    """Lower end of the ratio's 95 % interval (bootstrap over rounds)."""
    high: float


@dataclass(frozen=True)
class SpeedBuild(Noun):
    """The result of timing a model, with its sizes in memory and on disk."""

    spec: SpeedSpec
    rates: tuple[Rate, ...]
    base_bytes: int
    """Weights of the base in memory."""
    added_bytes: int
    """Experts and routers in memory."""
    base_working_bytes: int | None
    """Peak memory of a prefill beyond the weights; None if it cannot be measured."""
    fused_working_bytes: int | None
    stored_bytes: int
    """Experts and gates on disk; the base is not counted."""
    device: str
    num_threads: int
    dtype: str
    wall_seconds: float


@dataclass(frozen=True)
class RoutingSpec(Spec):
    """The routing of one router on the experts' own test rows."""

    kind: ClassVar[str] = "routing"
    version: ClassVar[int] = 2  # 1 had neither details nor switches
    made_of: ClassVar[tuple[str, ...]] = ("router_id",)

    router_id: ArtifactId
    rows_sha256: str


@dataclass(frozen=True)
class RoutingShare(Noun):
    """The share of one expert's test tokens that go to it."""

    expert: str
    accuracy: float
    """Share of (routed module, token) pairs."""


@dataclass(frozen=True)
class RoutingDetail(Noun):
    """How one routed module decides: means over the tokens of all experts' own test rows."""

    module: str
    entropy_bits: float
    """Entropy of the softmax over all experts; 0 for a certain choice."""
    weight: float
    """Weight of the first chosen expert."""
    agreement: float
    """Share of tokens that it sends to the same expert as most modules do."""


@dataclass(frozen=True)
class RoutingSwitch(Noun):
    """How soon routing changes when the text of one task ends and that of another begins."""

    expert: str
    """The expert whose text begins."""
    in_answer: bool
    """Whether this text is an answer, not a question."""
    delay_tokens: int | None
    """Tokens before the first one that goes to the expert; None if no token does."""
    count: int
    """How many switches had this delay."""


@dataclass(frozen=True)
class Abstention(Noun):
    """How well a router sends prompts without an expert to the base, and no others."""

    num_own: int
    """Prompts of the experts' own test rows."""
    num_nobodys: int
    """Prompts of tasks without an expert."""
    own_share: float
    """Mean probability of the base over tokens and routed modules, on the experts' prompts."""
    nobodys_share: float
    """The same on prompts without an expert."""
    auroc: float
    """Area under the ROC curve of that probability: of pairs of one prompt of each kind, the share
    in which the prompt without an expert has the larger one."""


@dataclass(frozen=True)
class RoutingBuild(Noun):
    """Whether tokens go to their own experts; all layers route by their own gates."""

    spec: RoutingSpec
    accuracy: float
    """Share of all (routed module, token) pairs that go to their own expert, without the template's
    opening."""
    by_expert: tuple[RoutingShare, ...]
    num_tokens: int
    wall_seconds: float
    details: tuple[RoutingDetail, ...] = ()
    switches: tuple[RoutingSwitch, ...] = ()
    abstention: Abstention | None = None
    """None if the base is no choice, or all tasks have an expert."""


@dataclass(frozen=True)
class RoutingScore(Noun):
    """How many tokens of one expert's test rows are sent to one expert, at one module."""

    router_id: ArtifactId
    module: str
    truth: str
    """The expert that the rows belong to."""
    chosen: str
    """The expert with the largest logit."""
    num_tokens: int
    """Tokens of prompt and answer, without the template's opening."""
