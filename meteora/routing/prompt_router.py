"""A router that makes one choice for a whole prompt, by the size of each expert's updates.

The router of a module measures tokens, and uses the decision of all modules together.
`meteora.model.prompt_choice` reads the prompt and decides.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from meteora.artifacts import RouterOptions
from meteora.kernels.stack import ExpertStack
from meteora.routing.passes import UnreadPromptError
from meteora.routing.routers import PassState, Router

LEAST_SIZE = 1e-12
"""The least size of an update, so that its logarithm is finite."""


class HeldChoice(PassState):
    """The decisions for the sequences of a batch; all routers of a model share one object."""

    __slots__ = ()

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        """[B, C]"""
        self.on: dict[torch.device, Tensor] = {}
        """Copies of the logits on the devices of the routers."""
        self.measure: Callable[[PromptRouter, Tensor], None] | None = None
        """Takes each router and its input while a prompt is read with the base alone."""


class PromptRouter(Router):
    """Gives all tokens of a sequence the logits of its prompt."""

    rows: Tensor
    """[R, IN]"""
    offset: Tensor
    """[R]"""
    owner: Tensor
    """[R] the expert of each row"""

    def __init__(
        self,
        rows: Tensor,
        offset: Tensor,
        stack: ExpertStack,
        options: RouterOptions,
        held: HeldChoice,
    ) -> None:
        """Take R_c A_c (Σ + λ I)^-½ [R, IN] of a stack's experts, and its product with μ [R]."""
        super().__init__(stack.num_choices, options)
        self.held = held
        ranks = [min(rank, len(stack.b)) for rank in stack.ranks]  # the number of rows of R_c
        self.has = [rank > 0 for rank in ranks]
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("owner", owner.to(rows.device), persistent=False)

    def sizes(self, tokens: Tensor) -> Tensor:
        """Log ‖R_c A_c (Σ + λ I)^-½ (x - μ)‖ of tokens [T, IN], as [T, E].

        It is 0 for an expert that lacks the module.
        """
        # rows are stored in 16 bits, and the whole model may be converted to 16 bits
        wide = torch.promote_types(self.offset.dtype, torch.float32)
        squares = (tokens.to(wide) @ self.rows.to(wide).T - self.offset).square()  # [T, R]
        sums = squares.new_zeros(len(tokens), len(self.has)).index_add(1, self.owner, squares)
        logs = sums.sqrt().clamp_min(LEAST_SIZE).log()
        return torch.where(torch.tensor(self.has, device=logs.device), logs, 0.0)

    def only_reads(self, x: Tensor) -> bool:
        if self.held.measure is None:
            return False
        self.held.measure(self, x)
        return True

    @property
    def is_causal(self) -> bool:
        return False

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of tokens [B × L, IN], each those of its sequence: [T, C].

        Raises:
            UnreadPromptError: no prompt was read, or the number of sequences is another.
        """
        logits, copies, device = self.held.logits, self.held.on, tokens.device
        num_read = 0 if logits is None else len(logits)
        if logits is None or len(tokens) % num_read:
            raise UnreadPromptError(
                f"{len(tokens)} tokens are to be routed by their prompts, and {num_read} prompts"
                " were read; start with a pass over the whole prompts"
            )
        if device not in copies:
            copies[device] = logits.to(device)
        return copies[device].repeat_interleave(len(tokens) // num_read, 0)
