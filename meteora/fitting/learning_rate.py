"""Which sequences a step of joint training takes, and how fast it learns: by seed and step."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meteora.artifacts import JointSettings


def learning_rate(settings: JointSettings, step: int) -> float:
    """Linearly up over the first steps, then down along a cosine to zero after the last one."""
    warm = round(settings.steps * settings.warmup_ratio)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def chosen_sequences(count: int, settings: JointSettings, seed: int, step: int) -> list[int]:
    """Which of `count` sequences a step takes: shuffled anew for every time through them all."""
    size = settings.batch_size * settings.accumulate
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = list(range(count))
            random.Random(f"{seed} {epoch}").shuffle(orders[epoch])  # noqa: S311  (no secret)
        chosen.append(orders[epoch][place])
    return chosen
