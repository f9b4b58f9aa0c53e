"""How large an adapter's update is, compared with the weights that it changes."""

import math
from collections.abc import Mapping

from meteora.adapters.tensors import Adapter
from meteora.adapters.weights import AdapterWeights
from meteora.artifacts import Reason

LIMIT = 0.5
"""The largest ratio of Frobenius norms, of update to weight, without a warning.

The six adapters that ship have 0.01 in the median module and 0.065 at most; the LoRA paper reports
0.06 to 0.11 for GPT-3 (arXiv 2106.09685, table 7). Five times more means a wrong scaling, a
training that diverged, or an adapter of another base.
"""


def update_norms(adapter: Adapter) -> dict[str, float]:
    """Return ‖scaling · B A‖ (Frobenius) of each module, from r × r products instead of B A."""
    norms = {}
    with AdapterWeights(adapter) as file:
        for module in adapter.spec.modules:
            a, b = (factor.double() for factor in file.factors(adapter.tensors[module.path]))
            square = ((b.T @ b) * (a @ a.T)).sum().item()  # ‖B A‖² = tr(BᵀB · A Aᵀ)
            norms[module.path] = abs(module.scaling) * math.sqrt(max(0.0, square))
    return norms


def check_proportion(adapter: Adapter, base_norms: Mapping[str, float]) -> tuple[Reason, ...]:
    """Return a warning where an update exceeds `LIMIT` times the weight that it updates.

    Args:
        base_norms: Frobenius norms of the base's weights, by module path; modules without one are
            not judged.
    """
    ratios = {
        path: norm / base_norms[path]
        for path, norm in update_norms(adapter).items()
        if base_norms.get(path)
    }
    large = [path for path, ratio in ratios.items() if ratio > LIMIT]
    if not large:
        return ()
    worst = max(large, key=lambda path: ratios[path])
    return (
        Reason(
            "large_update",
            f"what it adds to {worst} has {ratios[worst]:.3g} times the norm of the base's own"
            f" weight, and more than {LIMIT} times in {len(large)} of {len(ratios)} modules, where"
            " trained adapters stay near 0.01; check its scaling and which base it was trained on",
        ),
    )
