"""SpectR (arXiv 2504.03454): a token goes to the adapters whose inputs it looks like.

With the singular value decomposition of an adapter's update at a module, B A = U S Vᵀ,

    logits_e = ‖V_eᵀ x‖        y = W x + sum over the largest  softmax(logits)_e · s_e B_e A_e x

as its authors describe it in 2507.05346, where the largest alone is taken. The columns of V are
orthonormal, so neither the scaling s nor the size of an update counts. A later paper of theirs
(2509.18093) takes ‖S Vᵀ x‖, the length of the update itself: the package's own router `norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from meteora.routing.routers import Norm

if TYPE_CHECKING:
    from torch import Tensor

    from meteora.artifacts import RouterOptions
    from meteora.kernels.stack import ExpertStack


class SpectR(Norm):
    """Logits ‖V_eᵀ x‖; an expert that does not change this module has none."""

    def __init__(self, stack: ExpertStack, options: RouterOptions) -> None:
        super().__init__(stack, options)
        # the columns of V span the rows of A, and any orthonormal basis of them gives this length
        rows = [stack.pair(e)[0].float() for e in range(stack.num_choices)]
        self.folded = torch.cat([torch.linalg.qr(a.T).Q.T for a in rows])

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits.masked_fill(logits == 0, -torch.inf)
