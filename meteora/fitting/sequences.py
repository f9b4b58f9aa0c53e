"""Sequences of tokens with the expert that each belongs to, dealt and batched for a sweep."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import MeteoraError
from meteora.artifacts.routers import OPENING_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

HELDOUT_SHARE = 0.25
"""Of each expert's sequences: they choose the shrinkage, and then join the fit."""
MAX_ROWS = 4096
"""Tokens that tell the spread at a point of more inputs than that, where the closed form has a
matrix of tokens by tokens; means are always those of all tokens."""
TOKENS_PER_BATCH = 2048
UNLABELLED = -1


class TrainingError(MeteoraError):
    """The examples cannot teach the gates."""


@dataclass(frozen=True)
class LabelledSequence:
    """Token ids, and the expert that each belongs to; `UNLABELLED` is left out of the fit."""

    input_ids: tuple[int, ...]
    experts: tuple[int, ...]
    openings: tuple[int, ...] = ()
    """Places of tokens that open an answer where several experts answer: its number, say."""

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.experts):
            raise TrainingError(
                f"a sequence has {len(self.input_ids)} tokens and {len(self.experts)} labels;"
                " give one token or more, and one label a token"
            )

    @property
    def owners(self) -> set[int]:
        """The experts that own tokens of it: one for a plain example, several for spans."""
        return set(self.experts) - {UNLABELLED}


def renumbered(sequence: LabelledSequence, kept: Sequence[int]) -> LabelledSequence:
    """The same with its experts numbered as they come in `kept`."""
    if all(e == place for place, e in enumerate(kept)):
        return sequence
    places = {e: place for place, e in enumerate(kept)} | {UNLABELLED: UNLABELLED}
    return replace(sequence, experts=tuple(places[e] for e in sequence.experts))


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    """[B, L], padded on the right"""
    attention_mask: Tensor
    """[B, L]"""
    labels: Tensor
    """[B, L] experts; `UNLABELLED` for padding too"""
    openings: Tensor
    """[B, L] bool"""
    heldout: Tensor
    """[B, 1] bool"""
    stands_for: Tensor
    """[B, L] of how many tokens each tells the spread at a point of many inputs"""

    @property
    def kinds(self) -> Tensor:
        """[B, L] twice each token's expert, one more where it opens an answer; negative: none's."""
        return self.labels * 2 + self.openings


def hold_out(sequences: Sequence[LabelledSequence], names: Sequence[str], seed: int) -> set[int]:
    """Indices of the held-out sequences: a share of each expert's, never tokens of a fitted one.

    A sequence of several experts counts for each of them, and each keeps one to be fitted on.
    """
    own = owned(sequences, names)
    left = [len(indices) for indices in own]
    heldout: set[int] = set()
    for e, indices in enumerate(own):
        random.Random(seed * len(names) + e).shuffle(indices)  # noqa: S311  (a deal, no secret)
        wanted = max(1, round(len(indices) * HELDOUT_SHARE))
        for i in indices:
            if len(indices) - left[e] >= wanted:
                break
            if i not in heldout and all(left[owner] > 1 for owner in sequences[i].owners):
                heldout.add(i)
                for owner in sequences[i].owners:
                    left[owner] -= 1
    return heldout


def owned(sequences: Sequence[LabelledSequence], names: Sequence[str]) -> list[list[int]]:
    """The indices of the sequences in which each expert has tokens."""
    own: list[list[int]] = [[] for _ in names]
    for i, sequence in enumerate(sequences):
        for e in sequence.owners:
            if not 0 <= e < len(names):
                raise TrainingError(
                    f"sequence {i} has a token of expert {e}; the {len(names)} experts are numbered"
                    f" from 0, and {UNLABELLED} stands for none"
                )
            own[e].append(i)
    for name, indices in zip(names, own, strict=True):
        if len(indices) < 2:
            raise TrainingError(
                f"expert {name} has {len(indices)} examples; a gate needs two or more of each"
                " expert, one to fit and one to check: give it more examples"
            )
    return own


def batched(
    sequences: Sequence[LabelledSequence], heldout: set[int], device: torch.device
) -> Iterator[Batch]:
    """Sequences of like length together, so that little of a batch is padding."""
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    start = 0
    while start < len(by_length):
        stop = start + 1
        while (
            stop < len(by_length)
            and len(sequences[by_length[stop]].input_ids) * (stop + 1 - start) <= TOKENS_PER_BATCH
        ):
            stop += 1
        chosen = by_length[start:stop]
        shape = (len(chosen), len(sequences[chosen[-1]].input_ids))
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, UNLABELLED)
        openings = torch.zeros(shape, dtype=torch.bool)
        for row, i in enumerate(chosen):
            length = len(sequences[i].input_ids)
            ids[row, :length] = torch.tensor(sequences[i].input_ids)
            labels[row, :length] = torch.tensor(sequences[i].experts)
            openings[row, list(sequences[i].openings)] = True
        lengths = torch.tensor([len(sequences[i].input_ids) for i in chosen])
        mask = torch.arange(shape[1]) < lengths[:, None]
        held = torch.tensor([[i in heldout] for i in chosen])
        yield Batch(
            *(
                part.to(device)
                for part in (ids, mask.long(), labels, openings, held, torch.ones(shape))
            )
        )
        start = stop


def sampled(batches: Sequence[Batch], num_experts: int) -> list[Batch]:
    """Choose the tokens that tell the spread at points of many inputs: the same ones at each.

    Tokens that open answers are few and weigh much: they are chosen for themselves.
    """
    kinds = torch.cat([b.kinds.flatten() for b in batches])
    held = torch.cat([b.heldout.expand_as(b.labels).flatten() for b in batches])
    stands_for = torch.zeros(len(kinds), device=kinds.device)
    for side, share in ((~held, 1 - HELDOUT_SHARE), (held, HELDOUT_SHARE)):
        own = side & (kinds >= 0)
        stands_for[own] = sample(kinds[own], 2 * num_experts, round(MAX_ROWS * share))
    split = stands_for.split([b.labels.numel() for b in batches])
    return [
        replace(b, stands_for=part.view_as(b.labels))
        for b, part in zip(batches, split, strict=True)
    ]


def sample(labels: Tensor, num_experts: int, limit: int) -> Tensor:
    """Which tokens tell the spread where there are more than `limit`: as many of each expert.

    Args:
        labels: [T] experts. Of an expert's tokens, in this order, every so manieth is taken

    Returns:
        [T] float32: how many tokens each stands for; 0 for one that is left out
    """
    counts = torch.bincount(labels, minlength=num_experts)
    taken = counts.clamp_max(_quota(counts.tolist(), limit))[labels]
    rank = torch.empty_like(labels)  # of a token among those of its expert
    rank[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device)
    rank -= (counts.cumsum(0) - counts)[labels]
    total = counts[labels]
    chosen = (rank + 1) * taken // total > rank * taken // total
    return chosen * total.float() / taken


def _quota(counts: list[int], limit: int) -> int:
    """The largest number that each expert may give, if those that have fewer give all."""
    left = limit
    for given, count in enumerate(sorted(counts)):
        share = left // (len(counts) - given)
        if count > share:
            return max(1, share)
        left -= count
    return max(1, *counts)


def token_weights(batches: Sequence[Batch], num_experts: int) -> list[Tensor]:
    """What each token counts in a fit, [B, L] float32: every expert counts the same, 1 in all.

    Of an expert that has any, tokens that open answers count `OPENING_SHARE` together.
    """
    kinds = [b.kinds for b in batches]
    counts = sum(
        (torch.bincount(k[k >= 0], minlength=2 * num_experts) for k in kinds),
        start=torch.zeros(2 * num_experts, dtype=torch.long, device=batches[0].labels.device),
    ).view(num_experts, 2)
    each = each_of_kind(counts).flatten()
    return [each[k.clamp_min(0)] for k in kinds]


def each_of_kind(counts: Tensor) -> Tensor:
    """What each token counts if those of an expert count 1 together; float32.

    Args:
        counts: [E, 2] tokens of each expert: those that open answers, behind all others
    """
    present = (counts > 0).float() * torch.tensor(
        [1 - OPENING_SHARE, OPENING_SHARE], device=counts.device
    )
    return present / present.sum(1, keepdim=True) / counts.clamp_min(1)


def by_kind(tokens: Tensor, openings: Tensor) -> list[tuple[float, Tensor]]:
    """One expert's tokens apart, with the share of it that each kind has; openings come last.

    Args:
        tokens: [T, IN]
        openings: [T] bool
    """
    if not openings.any():
        return [(1.0, tokens)]
    return [(1 - OPENING_SHARE, tokens[~openings]), (OPENING_SHARE, tokens[openings])]
