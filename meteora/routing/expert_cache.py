"""Keep experts in host memory, and the last used ones (LRU) also on the device.

    experts.safetensors, mapped  ─miss▶  A_e, B_e on the device, within a budget of bytes  ─▶ layer

One cache serves all layers of a model. Hundreds of experts then need no more device memory than the
few that a text uses. A prefill that uses more experts than the budget holds still runs: they are
copied one by one. No expert has to leave for the mean of all, to which openings go: it is copied at
each use, unless there is room for it, too.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Self

from torch import Tensor

from meteora.base.placement import PlacementError


class ExpertCache:
    """A and B of single experts by key, as many as fit."""

    def __init__(self, budget_bytes: int) -> None:
        """Hold at most this many bytes; raises `PlacementError` below 0."""
        if budget_bytes < 0:
            raise PlacementError(
                f"experts cannot be held in {budget_bytes} bytes; give the most bytes that they may"
                " take on the device, 0 to hold none"
            )
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.hits = 0
        self.misses = 0
        self._held: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[int]]:
        """A copy begins without experts."""
        return type(self), (self.budget_bytes,)

    @property
    def miss_rate(self) -> float:
        """The share of uses that had to wait for a copy, without those of the mean of all.

        It is 0 before the first use.
        """
        return self.misses / max(self.hits + self.misses, 1)

    def fetch(
        self, key: Hashable, load: Callable[[], tuple[Tensor, Tensor]], *, may_evict: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return A and B from the cache, or from `load`, which copies them to the device.

        Args:
            may_evict: whether others may leave for them; if not, they stay only where room is left,
                and count neither as hit nor as miss
        """
        with self._turn:
            if (pair := self._held.get(key)) is not None:
                self.hits += may_evict
                self._held.move_to_end(key)
                return pair
            self.misses += may_evict
            pair = load()
            room = self.budget_bytes - (0 if may_evict else self.held_bytes)
            if (size := _size(pair)) > room:
                return pair
            self._held[key] = pair
            self.held_bytes += size
            while self.held_bytes > self.budget_bytes:
                _, evicted = self._held.popitem(last=False)
                self.held_bytes -= _size(evicted)
            return pair

    def __repr__(self) -> str:
        return (
            f"ExpertCache({self.held_bytes:,} of {self.budget_bytes:,} bytes held,"
            f" {self.hits:,} hits, {self.misses:,} misses: {self.miss_rate:.1%})"
        )


def _size(pair: tuple[Tensor, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in pair)
