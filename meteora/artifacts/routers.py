"""Routers: how a fused model routes, and the result of fitting its gates."""

from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any, ClassVar, Literal, Self, get_args

from meteora.artifacts.identity import ArtifactId, Noun, Spec

NULL = "(base)"
"""The name of the choice of no expert, in a router that has it. No expert has this name."""
SHARED = "(mean)"
"""The name of the choice of all experts, each with weight 1 / E, in a router that has it."""
Unfitted = Literal["arrow", "norm", "uniform"]
"""Kinds that are computed from the experts alone; a recipe also compares with each of them."""
ROUTER_KINDS = ("gate", "prompt", *get_args(Unfitted), "random")
"""Kinds that a checkpoint may have: its router finds the expert of each token by itself."""
Control = Literal["oracle", "one_expert", "single", "swap", "alora"]
"""Kinds that are given the expert of each token; a benchmark compares with them."""
WITH_GATES = ("gate", "prompt")
"""Kinds with a file of gates, fitted to examples or to texts that belong to no expert."""

SERVABLE = ("gate", *get_args(Unfitted))
"""Kinds that vLLM can compute: they need no further pass of the base and no random numbers."""

ONE_INPUT = ("point", "turn")
"""Values of `share` with which one gate decides only for modules that share its input."""

ANSWER_START_SHARE = 0.5
"""In a prompt of several tasks, the tokens that open an expert's answer get this share of its
weight. They are few and alike for all experts, but the whole answer depends on their route."""


@dataclass(frozen=True)
class RouterOptions(Noun):
    """How a model routes, from the recipe to the layer; a checkpoint's manifest has all of it."""

    kind: str
    """One of `ROUTER_KINDS`, a `Control`, or `fixed` where an expert is forced."""
    top_k: int
    temperature: float
    """Of the softmax over the `top_k` chosen logits."""
    margin: float | None = None
    """A chosen expert gets no weight if its logit is more than this below the best, in nats."""
    opening: str = "own"
    """The route of tokens that say nothing about the task, such as a system prompt. `own`: each has
    its own gate logits. `prompt`: the gate logits of the prompt after them decide, which is not
    causal. `shared`: as `own`, but every gate has one more choice, after the experts: the mean of
    all experts."""
    null: bool = False
    """Whether one more choice, the last of every gate, is the base without any expert."""
    share: str = "module"
    """The modules that follow one gate: its own `module`; all modules of a `point`, which share an
    input; of a `layer`; or of all layers (`token`). With `turn` each point has a gate that decides
    once for a whole turn of a conversation, from its question, which is not causal."""
    stand_in: str = ""
    """`arrow` or `norm`: how experts without examples are scored, from their weights."""
    stand_ins: tuple[str, ...] = ()
    """The names of the experts without examples."""

    @property
    def by_turns(self) -> bool:
        """Whether gates wait for the whole question of a turn, and decide once for the turn."""
        return self.kind == "gate" and self.share == "turn"

    @property
    def is_servable(self) -> bool:
        """Whether vLLM can compute such routes."""
        return self.kind in SERVABLE and (self.by_turns or self.opening != "prompt")


_BESIDE_KIND = [field.name for field in fields(RouterOptions) if field.name != "kind"]

POINT_GATES = RouterOptions("gate", top_k=1, temperature=1.0, share="point")
"""One gate for all modules that share an input, as a recipe has it by default."""


@dataclass(frozen=True)
class JointSettings(Noun):
    """How gates are trained by gradient descent (`meteora.fitting.joint`)."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Sequences in one forward pass, over all processes."""
    accumulate: int
    """Batches per step."""
    learning_rate: float
    """The peak: the rate rises linearly, then falls to zero along a cosine."""
    warmup_ratio: float
    """Share of the steps in which the rate rises."""
    gate_loss_weight: float
    """Weight of the mean loss of all gates; the language-model loss has weight 1."""
    max_grad_norm: float
    """A gradient with a larger norm is scaled down to this one."""
    start: str
    """`calibrate` starts from gates in closed form, `zeros` from zero."""


@dataclass(frozen=True)
class RouterSpec(Spec):
    """How a fused model routes, and how its gates are made if it has any.

    It repeats the fields of `RouterOptions`, since each is part of its id.
    """

    kind: ClassVar[str] = "router"

    fused_id: ArtifactId
    router: str
    """The kind."""
    top_k: int
    """Experts for each token."""
    temperature: float
    """Of the softmax over the chosen experts' logits."""
    method: str = ""
    """How gates are made: `calibrate` or `joint`; empty without gates."""
    examples_sha256: str = ""
    """Of the canonical JSON of all examples with their experts, in order."""
    seed: int = 0
    margin: float | None = None
    opening: str = "own"
    null: bool = False
    share: str = "module"
    joint: JointSettings | None = None
    """For the method `joint`; otherwise None."""
    composites: tuple[int, ...] = ()
    """Numbers of tasks in the mixed prompts that gates are fitted to, beside the experts' examples.
    For an expert that is added later, such a prompt holds its own examples only."""
    solved: tuple[int, ...] = ()
    """How many solved prompts each of `composites` shows before its questions; empty: none does."""
    opening_share: float = 0.0
    """`ANSWER_START_SHARE` in a fit to mixed prompts in closed form: `calibrate`, or `joint` that
    starts from there. Records have this older name."""
    conversations: tuple[int, ...] = ()
    """Numbers of turns of the conversations that gates are fitted to; every example is one turn of
    one conversation."""
    template: str = "auto"
    """`plain` where gates are fitted to plain text, even if the tokenizer has a chat template."""
    system_prompts: tuple[str, ...] = ()
    """System prompts of every other example and conversation; the others have the chat template's
    own."""
    openings_apart: bool = False
    """Whether tokens that open answers are sampled separately for the covariance, at points where
    it is estimated from a sample; true in new fits with `composites`."""
    loss_opening_share: float = 0.0
    """`ANSWER_START_SHARE` in the gate loss of `joint`."""
    refined: bool = False
    """Whether logistic regression refines the closed form of `calibrate`; new fits do so."""
    crossed: bool = False
    """Whether the fit routed each half of the sequences by gates of the other half, and left out
    the digits of answers' numbers; true in new fits with `composites`. For an expert that is added
    later: whether these digits were left out, as in the fit of the others."""
    offsets: bool = False
    """Whether experts have offsets that make up for an opening by all of them; new fits with a
    shared opening do so."""
    lead_unseen: bool = False
    """Whether the lead of the base, with `null`, comes from tokens that the gate was not fitted to;
    new fits in one sweep do so."""
    bounded: bool = False
    """Whether the row of an expert that is added claims no more than its held-out tokens need; true
    of those that are added now."""
    stand_in: str = ""
    stand_ins: tuple[str, ...] = ()
    grown_from: str = ""
    """The router that this one is made from by adding or dropping one expert; `examples_sha256` is
    then of the new expert's examples alone."""
    dtype: str = ""
    """Of the base while the gates were fitted, if a person named one; empty: that of its files."""
    pool_id: str = ""
    """The pool with the examples of experts that bring none."""
    found_in: str = ""
    """SHA-256 of the gates, if only a checkpoint from elsewhere shows them. `method` and `template`
    are then as it states, and nothing else is known of the fit."""

    @classmethod
    def of(cls, fused_id: ArtifactId, options: RouterOptions, **made: Any) -> Self:  # noqa: ANN401
        """Make a spec from the routing options, and further fields about the fit of the gates."""
        own = {name: getattr(options, name) for name in _BESIDE_KIND}
        return cls(fused_id, options.kind, **own, **made)

    @property
    def options(self) -> RouterOptions:
        """The routing options alone, without the fields about the fit of the gates."""
        return RouterOptions(self.router, **{name: getattr(self, name) for name in _BESIDE_KIND})

    @property
    def mixed_prompts(self) -> tuple[tuple[int, int], ...]:
        """(number of questions, number of solved prompts before them) of each kind."""
        return tuple(zip_longest(self.composites, self.solved, fillvalue=0))

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        further = (self.grown_from, self.pool_id)
        return (self.fused_id, *(ArtifactId(one) for one in further if one))


@dataclass(frozen=True)
class RouterBuild(Noun):
    """The result of fitting gates."""

    spec: RouterSpec
    weights_sha256: str
    """Of `gates.safetensors`."""
    num_tokens: int
    """Tokens that the gates were fitted on; 0 for a router without gates."""
    heldout_accuracy: float | None
    """Share of (input point, token) pairs of held-out sequences that go to their own expert; None
    if nothing was fitted, or nothing held out. The bias of an added expert is set on them."""
    wall_seconds: float
    device: str
    statistics_sha256: str = ""
    """Of `statistics.safetensors`; empty if there is none."""
    card_examples: tuple[str, ...] = ()
    """`expert: source` of experts whose examples come from a data set that their card names."""
    hub_examples: tuple[str, ...] = ()
    """`expert: source`, with the commit, of experts whose examples a recipe takes from the Hub."""
    example_licences: tuple[str, ...] = ()
    """`owner/name: licence` of these data sets, as far as they state one."""
    not_crossed: tuple[str, ...] = ()
    """The experts with examples in one half alone. If there are any, a fit with a `crossed` spec
    was not crossed."""

    @property
    def blobs(self) -> list[str]:
        """The SHA-256 of each of its files."""
        return [sha256 for sha256 in (self.weights_sha256, self.statistics_sha256) if sha256]
