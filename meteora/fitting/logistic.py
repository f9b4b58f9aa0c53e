"""Logistic regression: a gate in closed form, refined on the tokens themselves.

The closed form (`lda`) assumes that the tokens of an expert are normally distributed, with one
covariance for all experts. Hidden states are not: a template's tokens lie in a few places, far
apart. So the closed form is only the start of a search. It is overconfident: first G and c are
multiplied by the one of `SCALES` with the least loss (temperature scaling, arXiv 1706.04599). Then
the search changes G by D and c by d to minimise

    sum of w_t · cross-entropy(softmax((G + D) x_t + c + d), expert_t) + PULL · ‖D S^½‖²

with S the shrunk covariance and token weights w_t that sum to 1. The paper trains its gates by this
cross-entropy, too (MeteoRA, section 3), for all layers at once. For one gate with fixed inputs it
is convex, and L-BFGS solves it in seconds, in the coordinates x S^-½, in which all directions of x
vary alike.

In most layers a gate is sure of most tokens, and these change nothing. So each round of the search
takes all tokens that the gate is not sure of, and few others (`Tokens.uncertain`). Time and memory
grow with tokens times experts, so hundreds of experts give fewer tokens each (`MAX_LOGITS`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from meteora.fitting.sequences import sample
from meteora.kernels import onednn

if TYPE_CHECKING:
    from meteora.fitting.statistics import PointStatistics

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
"""Candidates for a gate's scale."""
PULL = 2e-4
"""The weight of the penalty on D. 1e-4 and 3e-4 are about as good; with 1e-3 fewer tokens of low
layers go to their expert."""
ROUNDS = (15, 15)
"""Iterations of L-BFGS in each round."""
ONE_ROUND = (8,)
"""For a gate that was refined before, on most of the same tokens."""
SURE = 0.01
"""Cross-entropy of a token, in nats, below which its gate is sure of it."""
SURE_TAKEN = 8
"""One in so many tokens that a gate is sure of is taken, with the weight of all of them."""
STEP = 512
"""A round has a multiple of so many tokens: for each size, torch keeps 0.7 MB of code."""
MAX_LOGITS = 1 << 23
"""Most tokens times experts in a round: 10,000 tokens of each of 28 experts, 128 of each of 256."""


class Tokens(NamedTuple):
    """Tokens at an input point, T of them."""

    x: Tensor
    """[T, IN] float32"""
    labels: Tensor
    """[T] experts"""
    weights: Tensor
    """[T]"""

    @classmethod
    def empty(cls, count: int, like: Tensor) -> Tokens:
        """Room for tokens, on the device and with the inputs of `like` [..., IN]."""
        x = like.new_empty(count, like.shape[-1], dtype=torch.float32)
        return cls(x, x.new_empty(count, dtype=torch.long), x.new_empty(count))

    def put(self, start: int, part: Tokens) -> None:
        """Copy tokens to the places from `start` on."""
        for column, own in zip(self.between(start, start + len(part.x)), part, strict=True):
            column.copy_(own)

    def sampled(self, stands_for: Tensor) -> Tokens:
        """The tokens with `stands_for` [T] above 0, with the weight of all that they stand for."""
        taken = stands_for > 0
        counted = self.weights[taken] * stands_for[taken]
        return Tokens(self.x[taken], self.labels[taken], counted)

    def uncertain(self, weight: Tensor, bias: Tensor) -> Tokens:
        """The tokens of which the gate G [E, IN], c [E] is not sure, and a sample of the others."""
        losses = [part.losses(logits) for part, logits in self.with_logits(weight, bias)]
        sure = torch.cat(losses).lt(SURE)
        stands_for = (~sure).float()
        stands_for[sure.nonzero()[::SURE_TAKEN]] = SURE_TAKEN
        return self.sampled(stands_for)

    def limited(self, num_experts: int) -> Tokens:
        """As many tokens as a round may have, equally many of each expert."""
        limit = max(num_experts, MAX_LOGITS // num_experts)
        if len(self.x) <= limit:
            return self
        return self.sampled(sample(self.labels, num_experts, limit))

    def filled_up(self) -> Tokens:
        """The tokens, and others without a weight up to a multiple of `STEP`."""
        pad, lacking = torch.nn.functional.pad, (0, -len(self.x) % STEP)
        return Tokens(pad(self.x, (0, 0, *lacking)), *(pad(one, lacking) for one in self[1:]))

    def with_logits(self, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tokens, Tensor]]:
        """All of the tokens in their order, a few at a time, with a gate's logits [T', E]."""
        size = max(1, MAX_LOGITS // len(bias))
        for start in range(0, len(self.x), size):
            part = self.between(start, start + size)
            yield part, onednn.linear(part.x, weight, bias)

    def between(self, start: int, stop: int | None = None) -> Tokens:
        """Some of the tokens, without a copy."""
        return Tokens(*(column[start:stop] for column in self))

    def losses(self, logits: Tensor) -> Tensor:
        """[T] the cross-entropy of each token, in nats, from logits [T, E]."""
        return torch.nn.functional.cross_entropy(logits, self.labels, reduction="none")

    def accuracy(self, weight: Tensor, bias: Tensor) -> float:
        """The weighted share of tokens that a gate G [E, IN], c [E] gives to their expert."""
        parts = self.with_logits(weight, bias)
        right = torch.cat([logits.argmax(-1) == part.labels for part, logits in parts])
        return ((right * self.weights).sum() / self.weights.sum()).item()


class Whitening:
    """The linear map x -> x S^-½, for the shrunk covariance S in a point's statistics.

    S has a few directions of large variance, and one variance for all others:

        S^-½ = r^-½ I + Vᵀ diag(s_m^-½ - r^-½) V
    """

    def __init__(self, statistics: PointStatistics) -> None:
        unit, floor, shrinkage = statistics.scalars.tolist()
        rows = statistics.rows.float() * unit
        spread = rows.square().sum(-1)
        num_inputs = rows.shape[1]
        ridge = shrinkage * (float(spread.sum()) / num_inputs + floor) + (1 - shrinkage) * floor
        ridge = max(ridge, torch.finfo(torch.float32).tiny)
        self.rest = ridge**-0.5
        self.directions = rows / spread.sqrt().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.apart = ((1 - shrinkage) * spread + ridge).rsqrt() - self.rest

    def __call__(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """Map rows x [N, IN]; `in_place` saves a copy, which can be a gigabyte."""
        along = onednn.linear(x, self.directions) * self.apart
        out = x if in_place else None
        return torch.addmm(x, along, self.directions, beta=self.rest, out=out)


def refine(
    weight: Tensor,
    bias: Tensor,
    tokens: Tokens,
    statistics: PointStatistics,
    rounds: Sequence[int] = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Refine a gate on tokens; returns G [E, IN] and c [E].

    Args:
        weight: G [E, IN] to start from, float32
        bias: c [E]
        tokens: to fit
        statistics: of the point, for its covariance
        rounds: iterations of L-BFGS in each round
    """
    whiten = Whitening(statistics)
    gate = scaled(weight, bias, tokens.limited(len(bias)))
    for iterations in rounds:
        few = tokens.uncertain(*gate).limited(len(bias)).filled_up()
        gate = search(*gate, few, whiten, iterations)
    return gate


def scaled(
    weight: Tensor, bias: Tensor, tokens: Tokens, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """The gate with these rows multiplied by the one of `SCALES` that has the least loss."""
    logits = onednn.linear(tokens.x, weight, bias)

    def times(part: Tensor, scale: float) -> Tensor:
        part = part.clone()
        part[..., rows] *= scale
        return part

    def loss(scale: float) -> float:
        return (tokens.losses(times(logits, scale)) * tokens.weights).sum().item()

    best = min(SCALES, key=loss)
    return times(weight.T, best).T, times(bias, best)


def search(
    weight: Tensor,
    bias: Tensor,
    tokens: Tokens,
    whiten: Whitening,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """One round of `refine` on all of these tokens; overwrites their inputs."""
    shares = tokens.weights / tokens.weights.sum()
    centre = shares @ tokens.x
    start = onednn.linear(weight, tokens.x).add_(bias[:, None])  # [E, T]: rows of many numbers
    u = whiten(tokens.x.sub_(centre), in_place=True)
    own = tokens.labels[None]
    inside, offset = torch.zeros_like(weight), torch.zeros_like(bias)

    def loss() -> float:
        """The loss at `inside` and `offset`; sets their gradients."""
        logs = onednn.linear(inside, u).add_(start).add_(offset[:, None]).log_softmax(0)
        value = PULL * inside.square().sum() - (logs.gather(0, own)[0] * shares).sum()
        missing = logs.exp_()
        missing.scatter_(0, own, missing.gather(0, own) - 1).mul_(shares)
        inside.grad = onednn.linear(missing, u.T).add_(inside, alpha=2 * PULL)
        offset.grad = missing.sum(1)
        return value.item()

    torch.optim.LBFGS(
        [inside, offset], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    ).step(loss)
    added = whiten(inside)
    return weight + added, bias + (offset - added @ centre)
