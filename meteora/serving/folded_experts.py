"""Compute experts, gate and offsets with two matmuls, if each token has one choice.

    [A; G] x                     the ranks of all experts, and the logits of all choices
    e = argmax(G x + c)          the choice of each token
    y += [B, O] [s_e · A x; e]   s_e: the scaling of e's ranks; O: the offsets; e: one-hot here

A server that decodes a few requests spends more on the calls of small matmuls than on their
arithmetic. It makes these linear layers itself, with the matmul of its own layers. A gate of
another precision than the experts is a third one.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from meteora.kernels.stack import ExpertStack
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import ByQuestion, Gate

MakeLinear = Callable[[Tensor], nn.Module]
"""Makes a linear layer without a bias from a weight [OUT, IN]."""


def plain_linear(weight: Tensor) -> nn.Linear:
    """Make a linear layer of torch from a weight [OUT, IN]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class FoldedExperts(nn.Module):
    """As `RoutedExperts`, for one choice for each token."""

    first: nn.Module
    """Weight [R + C, IN]: A, and below it G; or A alone, [R, IN]"""
    gate: nn.Module | None
    """Weight [C, IN]: G, if its precision is not that of A"""
    second: nn.Module
    """Weight [OUT, R + C]: B, and beside it O transposed; or B alone, [OUT, R]"""
    bias: Tensor
    """[C] c"""
    scaling: Tensor
    """[C, R] of the ranks"""
    by_question: ByQuestion | None
    """Decides for whole turns, if the gate does."""

    def __init__(self, experts: ExpertStack, gate: Gate, linear: MakeLinear) -> None:
        super().__init__()
        a, b, offsets, weight = experts.a, experts.b, gate.offsets, gate.weight.data
        self.by_question, self.has_offsets = gate.by_question, offsets is not None
        self.dtype = a.dtype
        if offsets is not None:
            b = torch.cat([b, offsets.T.to(b.dtype)], dim=1)
        joined = weight.dtype == a.dtype
        self.first = linear(torch.cat([a, weight]) if joined else a)
        self.gate = None if joined else linear(weight)
        self.second = linear(b.contiguous())
        self.register_buffer("bias", gate.bias.data, persistent=False)
        self.register_buffer("scaling", experts.choice_scaling(), persistent=False)

    @classmethod
    def of(cls, layer: RoutedExperts, linear: MakeLinear) -> Self | None:
        """Fold these experts; None if a token may have several choices, or a stand-in's."""
        gate = layer.router
        if type(gate) is not Gate or gate.options.top_k > 1 or gate.stand_in is not None:
            return None
        return cls(layer.stack, gate, linear)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the update of the gate's choices for x [T, IN] to y [T, OUT] in place."""
        choices, num_ranks = self.scaling.shape
        first = self.first(x.to(self.dtype))
        shrunk, logits = first[:, :num_ranks], first[:, num_ranks:]
        if self.gate is not None:
            logits = self.gate(x.to(self.bias.dtype))
        logits = logits + self.bias
        if self.by_question is not None:
            logits = self.by_question.decide(lambda _: logits, x)
        choice = logits.argmax(-1)
        shrunk = shrunk * self.scaling[choice]
        if self.has_offsets:
            shrunk = torch.cat([shrunk, nn.functional.one_hot(choice, choices)], dim=-1)
        y.add_(self.second(shrunk.to(self.dtype)))
