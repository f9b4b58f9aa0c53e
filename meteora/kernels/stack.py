"""The experts of one layer, and the choices of its router.

    A [R, IN]     rows      │ expert 0 │ expert 1 │ expert 2 │     each as many ranks as it has
    B [OUT, R]    columns   │ expert 0 │ expert 1 │ expert 2 │
    choices       [start, end) · factor: one for each expert, and any others

A choice is a segment of ranks with a factor. The segment is empty if an expert lacks the layer, and
for the choice of the base alone. Segments may overlap: all ranks with the factor 1 / E are the mean
of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes of a cache line. Torch's own memory is aligned to it, that of a mapped file is not, and dot
products are six times slower if rows do not begin at a multiple of 16 bytes."""


class Choice(NamedTuple):
    """The ranks [start, end), whose scaling is multiplied by `factor`."""

    start: int
    end: int
    factor: float = 1.0
    is_blend: bool = False
    """Whether it is all experts at once; of a single expert that is the expert itself."""


class Sizes(NamedTuple):
    """The sizes of a layer that decide which kernel is the fastest."""

    num_in: int
    num_out: int
    num_choices: int
    num_ranks: int
    """R, the ranks of all experts together."""
    max_rank: int
    """The most ranks of one expert."""
    max_width: int
    """The most ranks of one choice, which can be several experts: at least `max_rank`."""


class RankTable(NamedTuple):
    """The ranks of every choice; a row is filled up with rank 0 at scaling 0."""

    index: Tensor
    """[C, W] int64; W is the number of ranks of the widest choice"""
    scaling: Tensor
    """[C, W], float32"""


class Update(NamedTuple):
    """What one choice adds to a layer's output, in the form that takes the fewest calls."""

    a: Tensor
    """A [r, IN]"""
    b: Tensor
    """Bᵀ [r, OUT]"""
    scale: float | Tensor
    """The factor of A x: a number, or [r] if its ranks differ"""

    def add_for(self, token: Tensor, weight: float, y: Tensor) -> None:
        """Add weight · scale · x Aᵀ Bᵀ of a token x [1, IN] to y [1, OUT] in place."""
        shrunk, scale = nn.functional.linear(token, self.a), self.scale
        if isinstance(scale, float):
            y.addmm_(shrunk, self.b, alpha=weight * scale)
        else:
            y.addmm_(shrunk * scale, self.b, alpha=weight)


class _Updates(NamedTuple):
    """Updates that were asked for, as views of these A and B."""

    a: Tensor
    b: Tensor
    by_choice: dict[int, Update]


MOST_UPDATES = 32
"""Updates that a layer keeps. One takes 1.3 KB, and a model may have hundreds of layers."""


class ExpertStack(nn.Module):
    """A and B of all experts of a layer, and the tables in which kernels look choices up.

    All are buffers that no state dict has. The scaling stays in float32 when the module is
    converted to another dtype.
    """

    a: Tensor
    """[R, IN]"""
    b: Tensor
    """[OUT, R]"""
    segments: Tensor
    """[2, C] the start and the number of ranks of each choice; int64"""
    rank_scaling: Tensor
    """[R] the scaling of each rank's expert"""
    factors: Tensor
    """[C] the factor of each choice"""
    _choice_scaling: Tensor | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        ranks: Sequence[int],
        scaling: Sequence[float],
        choices: Sequence[Choice] | None = None,
        *,
        mapped: bool = False,
    ) -> None:
        """Stack experts.

        Args:
            a: [R, IN]
            b: [OUT, R]
            ranks: of each expert, summing to R; zero if it lacks the layer. An expert may have
                several entries, each with its own scaling, if `choices` joins them
            scaling: of each entry
            choices: of the router, in the order of its logits; None: each expert alone
            mapped: leave A and B in their memory, unchanged, even when the module moves
        """
        super().__init__()
        self.ranks, self.scaling = list(ranks), list(scaling)
        self.largest_scaling = max(self.scaling, default=0.0)
        self.choices = own_choices(ranks) if choices is None else list(choices)
        if mapped:
            self.a, self.b = a, b
        else:
            a = a if a.data_ptr() % ALIGNMENT == 0 else a.clone()
            self.register_buffer("a", a, persistent=False)
            # column by column in memory, so that the column of a rank is read in one piece
            self.register_buffer("b", b.T.contiguous().T, persistent=False)
        self.widths = [end - start for start, end, *_ in self.choices]
        alone = [choice.end - choice.start for choice in self.choices if not choice.is_blend]
        self.sizes = Sizes(
            num_in=a.shape[1],
            num_out=b.shape[0],
            num_choices=len(self.choices),
            num_ranks=len(a),
            max_rank=max(alone or self.widths),
            max_width=max(self.widths),
        )
        by_rank = [s for s, r in zip(self.scaling, self.ranks, strict=True) for _ in range(r)]
        self._scales = [
            by_rank[start] * factor if len(set(by_rank[start:end])) == 1 else None
            for start, end, factor, _ in self.choices
        ]
        starts = [choice.start for choice in self.choices]
        factors = [choice.factor for choice in self.choices]
        # a model that is made or moved in inference mode may be trained later
        with torch.inference_mode(mode=False):
            segments = torch.tensor([starts, self.widths]).to(a.device)
            self._exact = {
                "rank_scaling": torch.tensor(by_rank, dtype=torch.float32),
                "factors": torch.tensor(factors, dtype=torch.float32),
            }
        self.register_buffer("segments", segments, persistent=False)
        self._scale()

    def _scale(self) -> None:
        """Copy the exact scaling to the device of the other tables."""
        with torch.inference_mode(mode=False):
            for name, table in self._exact.items():
                self.register_buffer(name, table.to(self.segments.device), persistent=False)
        self._rank_table: RankTable | None = None
        self._updates: _Updates | None = None
        self.register_buffer("_choice_scaling", None, persistent=False)
        if self.num_choices <= self.sizes.num_in:  # [C, R] is no larger than A
            self.choice_scaling()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as any module does, but keep the scaling in float32."""
        super()._apply(fn, recurse)
        self._scale()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: pickled, each would have a copy of the memory that it looks at."""
        return {**self.__dict__, "_updates": None}

    def whole(self, device: torch.device, dtype: torch.dtype) -> ExpertStack:
        """The same experts, copied to a device and dtype."""
        a, b = self.a.to(device, dtype), self.b.to(device, dtype)
        return ExpertStack(a, b, self.ranks, self.scaling, self.choices)

    @property
    def num_choices(self) -> int:
        """C, the width of the router's logits."""
        return len(self.choices)

    @property
    def blends(self) -> list[int]:
        """The choices of several experts at once: only fitted gates may take them."""
        return [c for c, choice in enumerate(self.choices) if choice.is_blend]

    def pair(self, choice: int) -> tuple[Tensor, Tensor]:
        """A [r, IN] and B [OUT, r] of a choice, as views."""
        start, end, *_ = self.choices[choice]
        return self.a[start:end], self.b[:, start:end]

    def scale(self, choice: int) -> float | Tensor:
        """The factor of A x of a choice: a number, or [r] if its ranks differ."""
        if (scale := self._scales[choice]) is not None:
            return scale
        start, end, factor, _ = self.choices[choice]
        return self.rank_scaling[start:end] * factor

    def update(self, choice: int) -> Update | None:
        """The update of a choice, which is kept for the next call; None if it has no ranks."""
        a, b, updates = self.a, self.b, self._updates
        if updates is None or updates.a is not a or updates.b is not b:
            updates = self._updates = _Updates(a, b, {})
        if (found := updates.by_choice.get(choice)) is None and self.widths[choice]:
            with torch.inference_mode(mode=False):
                own_a, own_b = self.pair(choice)
                found = Update(own_a, own_b.T, self.scale(choice))
            if len(updates.by_choice) >= MOST_UPDATES:
                updates.by_choice.clear()
            updates.by_choice[choice] = found
        return found

    def rank_table(self) -> RankTable:
        """The ranks of every choice, side by side; made at the first call.

        Its size is C times the ranks of the widest choice, which can be all ranks.
        """
        if self._rank_table is None:
            with torch.inference_mode(mode=False):
                starts, widths = self.segments[:, :, None]
                columns = torch.arange(self.sizes.max_width, device=starts.device)
                held = columns < widths
                index = (starts + columns) * held
                scaling = self.factors[:, None] * held
                if len(self.rank_scaling):
                    scaling = self.rank_scaling[index] * scaling
            self._rank_table = RankTable(index, scaling)
        return self._rank_table

    def choice_scaling(self) -> Tensor:
        """The scaling of each choice's ranks, times its factor; 0 for the other ranks.

        Returns:
            [C, R]; if it is larger than A, it is made at the first call outside compiled code
        """
        if self._choice_scaling is not None:
            return self._choice_scaling
        with torch.inference_mode(False):  # Dynamo takes no named argument
            starts, widths = self.segments[:, :, None]
            ranks = torch.arange(len(self.rank_scaling), device=starts.device)
            held = (ranks >= starts) & (ranks < starts + widths)
            table = held * self.factors[:, None] * self.rank_scaling
        if not torch.compiler.is_compiling():  # what is traced has no numbers to keep
            self._choice_scaling = table
        return table

    def extra_repr(self) -> str:
        return f"C={self.num_choices}, ranks={self.ranks}"


def own_choices(ranks: Sequence[int]) -> list[Choice]:
    """Each expert alone."""
    ends = accumulate(ranks)
    return [Choice(end - r, end) for r, end in zip(ranks, ends, strict=True)]


def mean_of_all(ranks: Sequence[int]) -> Choice:
    """All experts at once, each with weight 1 / E; E includes experts that lack the layer."""
    return Choice(0, sum(ranks), 1 / len(ranks), is_blend=True)
