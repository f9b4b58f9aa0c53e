"""The nouns of routers: how a fused model routes, and what came out of fitting its gates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from meteora.artifacts.identity import ArtifactId, Noun, Spec

NULL = "(base)"
"""How the choice of no expert is called where a router has it; no expert can have this name."""
ROUTER_KINDS = ("gate", "arrow", "norm", "fixed", "uniform", "random", "oracle", "one_expert")
"""The last two are told the answer: controls, on prompts whose every token's expert is known."""

OPENING_SHARE = 0.5
"""Of an expert's weight, what its tokens that open an answer among others' answers have together.
They are few and alike, and whose answer follows is hard to see in them; all it says hangs on it."""


@dataclass(frozen=True)
class RouterOptions(Noun):
    """How a model routes, from the recipe to the layer; a checkpoint's manifest has all of it."""

    kind: str
    """One of `ROUTER_KINDS`."""
    top_k: int
    temperature: float
    """Of the softmax over the `top_k` chosen logits."""
    margin: float | None = None
    """Of the chosen experts, only those have a weight whose logit is this close to the best."""
    opening: str = "own"
    """Who decides for a prompt's opening: its `own` tokens, or the `prompt` as a whole."""
    null: bool = False
    """Whether one more choice, the last of every gate, is the base without any expert."""
    share: str = "module"
    """How far one gate decides: for its `module`, for the `point` where modules share an input, for
    a `layer`, or for the whole `token`."""
    stand_in: str = ""
    """`arrow` or `norm`, which scores experts without examples by their weights."""
    stand_ins: tuple[str, ...] = ()
    """The names of those experts."""


_BESIDE_KIND = [field.name for field in fields(RouterOptions) if field.name != "kind"]

POINT_GATES = RouterOptions("gate", top_k=1, temperature=1.0, share="point")
"""One gate for all modules that share an input, as a recipe has it by default."""


@dataclass(frozen=True)
class JointSettings(Noun):
    """How gates are trained by gradient descent; `meteora.fitting.joint` says what with."""

    steps: int
    """Of the optimiser."""
    batch_size: int
    """Sequences that go through the model at once, over all processes."""
    accumulate: int
    """Batches a step."""
    learning_rate: float
    """At its peak: it rises over the first steps, then falls to zero along a cosine."""
    warmup_ratio: float
    """Share of the steps in which it rises."""
    gate_loss_weight: float
    """Of the mean over all gates, against the language-model loss."""
    max_grad_norm: float
    """A longer gradient is cut to this length."""
    start: str
    """`calibrate`: from gates in closed form; `zeros`."""


@dataclass(frozen=True)
class RouterSpec(Spec):
    """How a fused model routes, and how its gates are made if it has any.

    It has the fields of `RouterOptions` too, each for itself, since they are part of its id.
    """

    kind: ClassVar[str] = "router"

    fused_id: ArtifactId
    router: str
    """The kind."""
    top_k: int
    temperature: float
    method: str = ""
    """How gates are made: `calibrate` or `joint`; empty for a router without gates."""
    examples_sha256: str = ""
    """Of the canonical JSON of all examples with their experts, in order."""
    seed: int = 0
    margin: float | None = None
    opening: str = "own"
    null: bool = False
    share: str = "module"
    joint: JointSettings | None = None
    """Of the method `joint`; None for the others."""
    composites: tuple[int, ...] = ()
    """How many tasks the prompts hold that gates are fitted to, beside each expert's examples; an
    expert that is added later has all of such a prompt."""
    opening_share: float = 0.0
    """Of an expert's weight in such a fit, that of the tokens that open its answers, in the closed
    form: with `calibrate`, and where `joint` starts from there."""
    openings_apart: bool = False
    """Whether these tokens are sampled for themselves, at points of so many inputs that a sample
    tells the spread; with `composites` they always are."""
    loss_opening_share: float = 0.0
    """The same in the gate loss of `joint`."""
    stand_in: str = ""
    stand_ins: tuple[str, ...] = ()
    grown_from: str = ""
    """The router whose gates and statistics these are made of, by one expert more or less; the
    examples are the new expert's alone."""

    @classmethod
    def of(cls, fused_id: ArtifactId, options: RouterOptions, **made: Any) -> Self:  # noqa: ANN401
        """Take how to route as one object, and how the gates are made as fields."""
        own = {name: getattr(options, name) for name in _BESIDE_KIND}
        return cls(fused_id, options.kind, **own, **made)

    @property
    def options(self) -> RouterOptions:
        """How the model routes, without how its gates are made."""
        return RouterOptions(self.router, **{name: getattr(self, name) for name in _BESIDE_KIND})

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.fused_id, *([ArtifactId(self.grown_from)] if self.grown_from else []))


@dataclass(frozen=True)
class RouterBuild(Noun):
    """What came out of fitting gates."""

    spec: RouterSpec
    weights_sha256: str
    """Of `gates.safetensors`."""
    num_tokens: int
    """Tokens that the gates were fitted on; 0 for a router without gates."""
    heldout_accuracy: float | None
    """Share of (input point, token) pairs of held-out sequences that went to their own expert;
    None where nothing was fitted."""
    wall_seconds: float
    device: str
    statistics_sha256: str = ""
    """Of `statistics.safetensors`; empty where nothing is kept of what the gates were fitted to."""

    @property
    def blobs(self) -> list[str]:
        """The hashes of all its files."""
        return [sha256 for sha256 in (self.weights_sha256, self.statistics_sha256) if sha256]
