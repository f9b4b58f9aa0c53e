"""Routers: each computes the logits of a layer's choices.

Every router is a module that takes tokens [T, IN] and returns logits [T, C]. It has the options
with which `reference.route` turns logits into weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.kernels import onednn, reference

if TYPE_CHECKING:
    from meteora.base.chat_template import Template
    from meteora.kernels.stack import ExpertStack


Choices = tuple[tuple[int, float], ...]
"""K choices of one token, each with its weight."""


class OrderError(MeteoraError, RuntimeError):
    """A layer follows a gate that has not decided in this pass."""


class Router(nn.Module):
    """Abstract: `forward` takes tokens [T, IN] and returns logits [T, C]."""

    offsets: Tensor | None
    """[C, OUT] the offset that each choice adds to its tokens; see `model.opening_offsets`"""

    def __init__(self, num_choices: int, options: RouterOptions) -> None:
        super().__init__()
        self.num_choices = num_choices
        self.options = options
        self.register_buffer("offsets", None, persistent=False)

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, both [T, K], of tokens [T, IN]."""
        return self.route(self(tokens))

    def choose_for_one(self, token: Tensor) -> Choices:
        """As `choose` for one token [1, IN], as numbers of Python."""
        return _as_numbers(*self.choose(token))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, both [T, K], of logits [T, C]."""
        options = self.options
        return reference.route(logits, options.top_k, options.temperature, options.margin)

    def add_offsets(self, weights: Tensor, experts: Tensor, y: Tensor) -> None:
        """Add the offsets of the choices, weights and experts both [T, K], to y [T, OUT]."""
        if (table := self.offsets) is None:
            return
        weights = weights.to(table.dtype)
        if torch.compiler.is_compiling():  # the compiler fuses this
            y += (weights[..., None] * table[experts]).sum(1)
        elif experts.shape[1] == 1:  # half of the time of a bag for one token, and no more for many
            y.addcmul_(table.index_select(0, experts[:, 0]), weights)
        else:
            y += nn.functional.embedding_bag(experts, table, per_sample_weights=weights, mode="sum")

    def only_reads(self, x: Tensor) -> bool:  # noqa: ARG002
        """Whether the layer's input [..., IN] is only read, and the layer is its projection."""
        return False

    @property
    def leads(self) -> bool:
        """Whether other layers follow the decisions of this router."""
        return False

    @property
    def is_causal(self) -> bool:
        """Whether the route of a token depends only on the token and earlier ones."""
        return True

    def extra_repr(self) -> str:
        options = self.options
        return f"C={self.num_choices}, top_k={options.top_k}, temperature={options.temperature}"


class ByQuestion(Protocol):
    """Decides for tokens by a whole question: for the opening of a prompt, or for a turn."""

    template: Template
    """The tokens around a question."""

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The logits [T, C] of tokens [T, IN].

        Args:
            logits_of: the gate's logits of each token by itself
        """
        ...


class QuestionReader(Protocol):
    """Knows the questions of the present pass, for all gates of a model."""

    def at_gate(self) -> ByQuestion:
        """The rule with which one gate decides."""
        ...


class Gate(Router):
    """The fitted router: logits = G x + c, in the precision of the gate (MeteoRA, section 3)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        options: RouterOptions,
        *,
        by_question: ByQuestion | None = None,
        decision: Decision | None = None,
        stand_in: nn.Module | None = None,
    ) -> None:
        """Take G [C, IN] and c [C] as parameters.

        Args:
            by_question: decides for the opening of a prompt, or for a whole turn; None: each token
                is routed by itself
            decision: receives the gate's decision, for the layers that follow it
            stand_in: a `weight_scores.StandIn`, if experts had no examples
        """
        super().__init__(len(weight), options)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.by_question = by_question
        self.decision = decision
        self.stand_in = stand_in

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of each token by itself, [T, C]."""
        logits = onednn.linear(tokens.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.stand_in is None else self.stand_in(logits, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        rule = self.by_question
        logits = self.logits(tokens) if rule is None else rule.decide(self.logits, tokens)
        if self.decision is not None:
            self.decision.logits, self.decision.routes = logits, None
        return logits

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        routes = super().choose(tokens)
        if self.decision is not None:
            self.decision.routes = routes
        return routes

    def choose_for_one(self, token: Tensor) -> Choices:
        weight, decision = self.weight, self.decision
        is_more = self.by_question is not None or self.stand_in is not None or self._forward_hooks
        if is_more or weight.dtype is not token.dtype:
            logits = self(token)
        else:  # the same with fewer calls
            logits = nn.functional.linear(token, weight, self.bias)
            if decision is not None:
                decision.logits, decision.routes = logits, None
        if self.options.top_k == 1:
            choices: Choices = ((int(logits.argmax()), 1.0),)
        else:
            choices = _as_numbers(*self.route(logits))
        if decision is not None:
            decision.one = logits, choices
        return choices

    @property
    def leads(self) -> bool:
        return self.decision is not None

    @property
    def is_causal(self) -> bool:
        return self.by_question is None


class PassState(threading.local):
    """State of the present pass: each thread has its own, so several may call one model at once.

    `torch.compile` follows attributes of a thread, and neither a dict of the object nor names of
    its class. So a subclass has empty `__slots__`, without which there is such a dict, and no
    methods or defaults: `__init__`, which is called in each thread, sets all attributes.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """A copy has its own passes, and tensors with a graph cannot be copied."""
        return type(self), ()


class Decision(PassState):
    """A gate's decision for the tokens of the present pass.

    The model's own code calls the layers one by one and passes nothing of ours between them. So a
    gate and the layers that follow it share one such object: the gate writes, they read.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        """[T, C]"""
        self.routes: tuple[Tensor, Tensor] | None = None
        """Weights and choices, both [T, K]; None before the gate has computed them."""
        self.one: tuple[Tensor, Choices] | None = None
        """The logits [1, C] of a pass of one token, and its choices; of an earlier pass if they are
        not the logits above."""


class Follower(Router):
    """Uses the decision of an earlier gate for the same tokens: one decision, many layers."""

    def __init__(self, decision: Decision, num_choices: int, options: RouterOptions) -> None:
        super().__init__(num_choices, options)
        self.decision = decision

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits as of any router.

        Raises:
            OrderError: the gate has not seen that many tokens in this pass.
        """
        logits = self.decision.logits
        seen = 0 if logits is None else len(logits)
        if logits is None or seen != len(tokens):
            raise OrderError(
                f"a layer with {len(tokens)} tokens follows a gate that saw {seen}; run the model"
                " from its first layer"
            )
        return logits if logits.device == tokens.device else logits.to(tokens.device)

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, routes = self(tokens), self.decision.routes
        if routes is None:
            return self.route(logits)
        weights, experts = routes
        if weights.device == tokens.device:
            return routes  # the same objects: a shared matmul compares their identity
        return weights.to(tokens.device), experts.to(tokens.device)

    def choose_for_one(self, token: Tensor) -> Choices:
        decision = self.decision
        if (one := decision.one) is None or one[0] is not decision.logits or self._forward_hooks:
            return super().choose_for_one(token)
        return one[1]


class Fixed(Router):
    """Gives every token the same weights; one expert at weight 1 is plain PEFT."""

    logits: Tensor
    """[C]"""

    def __init__(self, weights: Tensor) -> None:
        """Take weights [C] that are not negative and sum to one."""
        chosen = int((weights > 0).sum())
        super().__init__(len(weights), RouterOptions("fixed", chosen, temperature=1.0))
        # the softmax of the logarithms equals the weights, and is exactly 1 for a single one
        self.register_buffer("logits", weights.float().log(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(len(tokens), -1)


def uniform(stack: ExpertStack, _options: RouterOptions) -> Fixed:
    """Gives every expert the same weight."""
    weights = torch.ones(stack.num_choices)
    weights[stack.blends] = 0.0
    return Fixed(weights / weights.sum())


class Random(Router):
    """Draws random logits for every token: a control that shows the value of good choices.

    Two routers with the same seed draw the same for the same batches.
    """

    def __init__(self, stack: ExpertStack, options: RouterOptions, seed: int) -> None:
        super().__init__(stack.num_choices, options)
        self.blends = stack.blends
        self._generator = torch.Generator().manual_seed(seed)  # the same draws on every device

    def forward(self, tokens: Tensor) -> Tensor:
        drawn = torch.rand(len(tokens), self.num_choices, generator=self._generator)
        return _without(drawn.to(tokens.device), self.blends)

    @property
    def is_causal(self) -> bool:
        return False  # the draws depend on the whole batch


class ByWeights(Router):
    """Abstract: scores choices by the experts' weights, and needs no data.

    A choice without ranks has logit 0. An expert that lacks the layer gets no weight there, unless
    all do.
    """

    lacking: Tensor
    """[C] bool: a buffer, since an index from the host stops the capture of a CUDA graph"""

    def __init__(self, stack: ExpertStack, options: RouterOptions) -> None:
        super().__init__(stack.num_choices, options)
        self.blends = stack.blends
        lacking = torch.zeros(stack.num_choices, dtype=torch.bool, device=stack.a.device)
        if any(stack.ranks):
            lacking[: len(stack.ranks)] = torch.tensor([not rank for rank in stack.ranks])
        self.register_buffer("lacking", lacking, persistent=False)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(logits.masked_fill(self.lacking, -torch.inf))


class Arrow(ByWeights):
    """Logits |v_c · x|, v_c the direction that B_c A_c stretches most (arXiv 2405.11157)."""

    prototypes: Tensor
    """[C, IN] float32"""

    def __init__(self, stack: ExpertStack, options: RouterOptions) -> None:
        """Find v_c of each choice by a singular value decomposition of r × r."""
        super().__init__(stack, options)
        prototypes = torch.zeros(stack.num_choices, stack.a.shape[1], device=stack.a.device)
        for c, (a, b) in enumerate(_factors(stack)):
            if len(a):
                # B A = Q_b (R_b R_aᵀ) Q_aᵀ: the right singular vectors are Q_a times those inside
                q_a, r_a = torch.linalg.qr(a.T)
                _, r_b = torch.linalg.qr(b)
                inside = r_b @ r_a.T
                _require_finite(inside, "arrow")
                _, singular, right = torch.linalg.svd(inside)
                if singular[0] > 0:  # an expert that does nothing here has no direction
                    prototypes[c] = q_a @ right[0]
        self.register_buffer("prototypes", prototypes, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = (tokens.to(self.prototypes.dtype) @ self.prototypes.T).abs()
        return _without(logits, self.blends)


class Norm(ByWeights):
    """Logits ‖B_c S_c A_c x‖, S_c its scaling, in rank space (arXiv 2504.03454, 2509.18093)."""

    folded: Tensor
    """[R, IN] R_c A_c of all choices"""
    owner: Tensor
    """[R] the choice of each row"""

    def __init__(self, stack: ExpertStack, options: RouterOptions) -> None:
        """Fold R_c A_c once, with B_c S_c = Q_c R_c: ‖B_c S_c A_c x‖ = ‖R_c A_c x‖."""
        super().__init__(stack, options)
        folded = [torch.linalg.qr(b).R @ a for a, b in _factors(stack)]
        owner = torch.repeat_interleave(
            torch.arange(len(folded)), torch.tensor([len(rows) for rows in folded])
        )
        rows = torch.cat(folded)
        _require_finite(rows, "norm")
        self.register_buffer("folded", rows, persistent=False)
        self.register_buffer("owner", owner.to(stack.a.device), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        # a model may be converted to 16 bits, in which squares overflow
        wide = torch.promote_types(self.folded.dtype, torch.float32)
        squares = (tokens.to(wide) @ self.folded.to(wide).T).square()  # [T, R]
        sums = squares.new_zeros(len(tokens), self.num_choices).index_add(1, self.owner, squares)
        return _without(sums.sqrt(), self.blends)


def _as_numbers(weights: Tensor, experts: Tensor) -> Choices:
    """The choices of one token, from weights and experts, both [1, K]."""
    return tuple(zip(experts.tolist()[0], weights.tolist()[0], strict=True))


def _without(logits: Tensor, choices: list[int]) -> Tensor:
    """The logits [T, C], with -inf for these choices; not in place, so they can be learnt from."""
    if not choices:
        return logits
    return logits.index_fill(1, torch.tensor(choices, device=logits.device), -torch.inf)


def _require_finite(numbers: Tensor, kind: str) -> None:
    """Refuse experts whose products overflow; a stranger's may be as large as their dtype holds."""
    if not numbers.isfinite().all():
        raise MeteoraError(
            f"the experts hold numbers so large that their products overflow, so router {kind!r}"
            " cannot score them; download or build the checkpoint again"
        )


def _factors(stack: ExpertStack) -> Iterator[tuple[Tensor, Tensor]]:
    """A [r, IN] and scaled B [OUT, r] of each choice, in float32 at least.

    Of several experts at once, whose logits nothing asks for, they have no ranks.
    """
    wide = torch.promote_types(stack.a.dtype, torch.float32)
    blends = stack.blends
    for c in range(stack.num_choices):
        if c in blends:
            yield stack.a[:0].to(wide), stack.b[:, :0].to(wide)
            continue
        a, b = stack.pair(c)
        scale = torch.as_tensor(stack.scale(c), dtype=wide, device=b.device)
        yield a.to(wide), b.to(wide) * scale
