"""Compute experts, gate and offsets with two matmuls, if each token has one choice.

    [A; G] x                     the ranks of all experts, and the logits of all choices
    e = argmax(G x + c)          the choice of each token
    y += [B, O] [s_e · A x; e]   s_e: the scaling of e's ranks; O: the offsets; e: one-hot here

A server that decodes a few requests spends more on the calls of small matmuls than on their
arithmetic.
"""

from typing import Self

import torch
from torch import Tensor, nn

from meteora.kernels.stack import ExpertStack
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import ByQuestion, Gate


class FoldedExperts(nn.Module):
    """As `RoutedExperts`, for one choice for each token."""

    first: Tensor
    """[R + C, IN] A, and below it G"""
    second: Tensor
    """[R + C, OUT] B transposed, and below it O; or B alone, [R, OUT]"""
    bias: Tensor
    """[C] c"""
    scaling: Tensor
    """[C, R + C] of the ranks; zero for the logits. Without offsets [C, R]"""
    chosen: Tensor | None
    """[C, R + C] 1 at the choice itself; None without offsets"""
    by_question: ByQuestion | None
    """Decides for whole turns, if the gate does."""

    def __init__(self, experts: ExpertStack, gate: Gate) -> None:
        super().__init__()
        self.by_question, offsets = gate.by_question, gate.offsets
        scaling, second, chosen = experts.choice_scaling(), experts.b.T, None
        if offsets is not None:
            ones = torch.eye(len(offsets), device=offsets.device)
            scaling = nn.functional.pad(scaling, (0, len(ones)))
            chosen = nn.functional.pad(ones, (experts.sizes.num_ranks, 0))
            second = torch.cat([second, offsets])
        self.register_buffer("first", torch.cat([experts.a, gate.weight.data]), persistent=False)
        self.register_buffer("second", second.contiguous(), persistent=False)
        self.register_buffer("bias", gate.bias.data, persistent=False)
        self.register_buffer("scaling", scaling, persistent=False)
        self.register_buffer("chosen", chosen, persistent=False)

    @classmethod
    def of(cls, layer: RoutedExperts, dtype: torch.dtype) -> Self | None:
        """The same experts; None if a token has several choices, or a tensor has another dtype."""
        gate = layer.router
        if type(gate) is not Gate or gate.options.top_k > 1:
            return None
        if gate.stand_in is not None:
            return None
        tensors = [layer.stack.a, layer.stack.b, gate.weight, gate.bias]
        tensors += [] if gate.offsets is None else [gate.offsets]
        return cls(layer.stack, gate) if {one.dtype for one in tensors} == {dtype} else None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the update of the gate's choices for x [T, IN] to y [T, OUT] in place."""
        both = x @ self.first.T
        num_ranks = both.shape[-1] - len(self.bias)
        logits = both[:, num_ranks:] + self.bias
        if self.by_question is not None:
            logits = self.by_question.decide(lambda _: logits, x)
        choice = logits.argmax(-1)
        factors = self.scaling[choice]
        shrunk = both[:, : factors.shape[-1]] * factors
        if self.chosen is not None:
            shrunk = shrunk + self.chosen[choice]
        y.addmm_(shrunk.to(self.second.dtype), self.second)
