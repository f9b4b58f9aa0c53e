"""Compute experts, gate and offsets with two matmuls, if each token has one choice.

    [A; G] x                     the ranks of all experts, and the logits of all choices
    e = argmax(G x + c)          the choice of each token
    y += [B, O] [s_e · A x; e]   s_e: the scaling of e's ranks; O: the offsets; e: one-hot here

A server that decodes a few requests spends more on the calls of small matmuls than on their
arithmetic. Where projection, experts and gate have one precision, the first matmul is a part of the
server's projection: [W; A; G] x. The server makes the others itself, with the matmul of its own
layers. A gate of another precision than the experts is one more.
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

    first: nn.Module | None
    """Weight [R + C, IN]: A, and below it G; or A alone, [R, IN]. None if the server multiplies."""
    rows: Tensor | None
    """[R + C, IN] the weight that the server is to multiply by, until it takes it."""
    gate: nn.Module | None
    """Weight [C, IN]: G, if its precision is not that of A"""
    second: nn.Module
    """Weight [OUT, R + C]: B, and beside it O transposed; or B alone, [OUT, R]"""
    bias: Tensor
    """[C] c"""
    scaling: Tensor
    """[C, R] of the ranks by each choice; with offsets [C, R + C]: beside it, the one-hot choice"""
    by_question: ByQuestion | None
    """Decides for whole turns, if the gate does."""

    def __init__(
        self, experts: ExpertStack, gate: Gate, linear: MakeLinear, dtype: torch.dtype
    ) -> None:
        """Fold the experts of one layer and its gate.

        Args:
            linear: makes the layers that the server multiplies by apart from its projection
            dtype: of the weight of the server's projection
        """
        super().__init__()
        a, b, offsets, weight = experts.a, experts.b, gate.offsets, gate.weight.data
        self.by_question, self.num_ranks, self.dtype = gate.by_question, len(a), a.dtype
        scaling = experts.choice_scaling()
        if offsets is not None:
            b = torch.cat([b, offsets.T.to(b.dtype)], dim=1)
            scaling = torch.cat([scaling, torch.eye(len(offsets)).to(scaling)], dim=1)
        joined = weight.dtype == a.dtype
        rows = torch.cat([a, weight]) if joined else a
        served = joined and rows.dtype == dtype
        self.rows, self.first = (rows, None) if served else (None, linear(rows))
        self.gate = None if joined else linear(weight)
        self.second = linear(b.contiguous())
        self.register_buffer("bias", gate.bias.data, persistent=False)
        self.register_buffer("scaling", scaling, persistent=False)

    @classmethod
    def of(cls, layer: RoutedExperts, linear: MakeLinear, dtype: torch.dtype) -> Self | None:
        """Fold these experts; None if a token may have several choices, or a stand-in's."""
        gate = layer.router
        if type(gate) is not Gate or gate.options.top_k > 1 or gate.stand_in is not None:
            return None
        return cls(layer.stack, gate, linear, dtype)

    def take_rows(self) -> Tensor | None:
        """The rows that the server's projection is to have, too; None if it can take none."""
        rows, self.rows = self.rows, None
        return rows

    def add(self, x: Tensor, y: Tensor, first: Tensor) -> None:
        """Add the update of the gate's choices for x [T, IN] to y [T, OUT] in place.

        Args:
            first: [T, R + C] the server's product of x and `rows`; not read if it took none
        """
        if self.first is not None:
            first = self.first(x.to(self.dtype))
        shrunk, logits = first[:, : self.num_ranks], first[:, self.num_ranks :]
        if self.gate is not None:
            logits = self.gate(x.to(self.bias.dtype))
        logits = logits + self.bias
        if self.by_question is not None:
            logits = self.by_question.decide(lambda _: logits, x)
        scaling = self.scaling[logits.argmax(-1)]
        padded = nn.functional.pad(shrunk, (0, scaling.shape[1] - self.num_ranks), value=1.0)
        y.add_(self.second((padded * scaling).to(self.dtype)))
