"""Labelled sequences for a fit: hold some out, batch them, weigh their tokens.

A label is the number of the expert that a token belongs to.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from meteora.artifacts import MeteoraError
from meteora.artifacts.routers import ANSWER_START_SHARE
from meteora.base.padding import padded, padded_and_mask
from meteora.untrusted.findings import counted

HELDOUT_SHARE = 0.25
"""Share of each expert's sequences that choose the shrinkage; the final fit uses them too."""
MAX_ROWS = 4096
"""At a point with more inputs than this, the covariance is estimated from at most this many tokens
(the closed form then has a matrix of tokens by tokens). Means use all tokens. For an expert that is
added later, covariance and mean use at most this many tokens of each kind."""
TOKENS_PER_BATCH = 2048
"""Most tokens of a batch, padding included; a longer sequence is a batch of its own."""
UNLABELLED = -1
"""The label of a token that belongs to no expert; the fit leaves it out."""


class TrainingError(MeteoraError):
    """The examples do not allow gates to be fitted or trained."""


@dataclass(frozen=True)
class LabelledSequence:
    """Token ids, and the label of each: an expert's number, or `UNLABELLED`."""

    input_ids: tuple[int, ...]
    experts: tuple[int, ...]
    answer_starts: tuple[int, ...] = ()
    """Positions of tokens that open an answer, such as a list number, in a prompt of several
    tasks."""

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.experts):
            raise TrainingError(
                f"a sequence has {len(self.input_ids)} tokens and {len(self.experts)} labels;"
                " give one token or more, and one label a token"
            )
        if not all(0 <= place < len(self.input_ids) for place in self.answer_starts):
            raise TrainingError(
                f"answers of a sequence of {counted(len(self.input_ids), 'token')} start at"
                f" {', '.join(map(str, self.answer_starts))}; give positions of its tokens"
            )

    @property
    def owners(self) -> set[int]:
        """The experts that have tokens in it; several in a prompt of several tasks."""
        return set(self.experts) - {UNLABELLED}


def renumbered(sequence: LabelledSequence, kept: Sequence[int]) -> LabelledSequence:
    """The same sequence with experts numbered by their positions in `kept`, and no others."""
    places = {e: place for place, e in enumerate(kept)}
    return replace(sequence, experts=tuple(places.get(e, UNLABELLED) for e in sequence.experts))


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together. B: sequences, L: length of the longest."""

    input_ids: Tensor
    """[B, L], padded on the right"""
    attention_mask: Tensor
    """[B, L]"""
    labels: Tensor
    """[B, L] experts; `UNLABELLED` for padding too"""
    answer_starts: Tensor
    """[B, L] bool: whether the token opens an answer"""
    heldout: Tensor
    """[B, 1] bool"""
    stands_for: Tensor
    """[B, L] the result of `sampled`; 1 everywhere before"""

    @classmethod
    def of(
        cls,
        sequences: Sequence[LabelledSequence],
        device: torch.device,
        heldout: Sequence[bool] | None = None,
    ) -> Self:
        """Pad sequences into one batch; without `heldout` none is held out."""
        rows = [sequence.input_ids for sequence in sequences]
        ids, mask = padded_and_mask(rows)
        answer_starts = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            answer_starts[row, list(sequence.answer_starts)] = True
        labels = padded([sequence.experts for sequence in sequences], UNLABELLED)
        held = torch.tensor(heldout or [False] * len(rows)).unsqueeze(1)
        parts = ids, mask, labels, answer_starts, held, torch.ones(ids.shape)
        return cls(*(part.to(device) for part in parts))

    @property
    def kinds(self) -> Tensor:
        """[B, L] 2 · expert, plus 1 if the token opens an answer; negative for no expert."""
        return self.labels * 2 + self.answer_starts


def hold_out(
    sequences: Sequence[LabelledSequence],
    names: Sequence[str],
    seed: int,
    share: float = HELDOUT_SHARE,
) -> set[int]:
    """Choose the held-out sequences: this share of each expert's, as indices.

    A sequence of several experts counts for each of them. At least one sequence of each expert
    stays in the fit, so an expert with few, shared sequences may have none that is held out. Equal
    sequences are held out together, if at least half of the expert's are left for the fit.

    Args:
        names: of all experts, in order, for messages

    Raises:
        TrainingError: as `owned`.
    """
    own = owned(sequences, names)
    left = Counter(e for e, indices in enumerate(own) for _ in indices)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        alike.setdefault(sequence.input_ids, []).append(i)
    heldout: set[int] = set()
    for e, indices in enumerate(own):
        random.Random(seed * len(names) + e).shuffle(indices)  # noqa: S311  (no secret)
        wanted = max(1, round(len(indices) * share))
        for i in indices:
            if len(indices) - left[e] >= wanted:
                break
            for group in (set(alike[sequences[i].input_ids]) - heldout, {i} - heldout):
                leave = Counter(owner for j in group for owner in sequences[j].owners)
                least = {o: 1 if len(group) == 1 else len(own[o]) / 2 for o in leave}
                if all(left[owner] - count >= least[owner] for owner, count in leave.items()):
                    heldout |= group
                    left -= leave
                    break
    return heldout


def owned(sequences: Sequence[LabelledSequence], names: Sequence[str]) -> list[list[int]]:
    """The indices of the sequences in which each expert has tokens.

    Raises:
        TrainingError: an expert has fewer than two, or a label is no expert's number.
    """
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
                f"expert {name} has {counted(len(indices), 'example')}; a gate needs two or more"
                " of each expert, one to fit and one to check: give it more examples"
            )
    return own


def batched(
    sequences: Sequence[LabelledSequence], heldout: set[int], device: torch.device
) -> Iterator[Batch]:
    """Batch sequences of similar length together, so that there is little padding."""
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
        yield Batch.of([sequences[i] for i in chosen], device, [i in heldout for i in chosen])
        start = stop


def in_halves(
    sequences: Sequence[LabelledSequence], heldout: set[int], device: torch.device
) -> Iterator[Batch]:
    """As `batched`, but no batch has both held-out sequences and others."""
    for held in (False, True):
        half = [one for i, one in enumerate(sequences) if (i in heldout) == held]
        yield from batched(half, set(range(len(half))) if held else set(), device)


def sampled(
    batches: Sequence[Batch], num_experts: int, share: float = HELDOUT_SHARE
) -> list[Batch]:
    """Choose the tokens that estimate the covariance at points with more than `MAX_ROWS` inputs.

    They are the same tokens at every point. Tokens that open answers are few and have much weight,
    so they are sampled separately.

    Args:
        share: the share of sequences that are held out
    """
    kinds = torch.cat([b.kinds.flatten() for b in batches])
    held = torch.cat([b.heldout.expand_as(b.labels).flatten() for b in batches])
    stands_for = torch.zeros(len(kinds), device=kinds.device)
    for side, part in ((~held, 1 - share), (held, share)):
        own = side & (kinds >= 0)
        stands_for[own] = sample(kinds[own], 2 * num_experts, round(MAX_ROWS * part))
    split = stands_for.split([b.labels.numel() for b in batches])
    return [
        replace(b, stands_for=own.view_as(b.labels)) for b, own in zip(batches, split, strict=True)
    ]


def sample(labels: Tensor, num_experts: int, limit: int) -> Tensor:
    """Sample at most about `limit` tokens, equally many of each expert, evenly spaced.

    Args:
        labels: [T] experts

    Returns:
        [T] float32: the number of tokens that each stands for; 0 for a token that is left out
    """
    counts = torch.bincount(labels, minlength=num_experts)
    taken = counts.clamp_max(_quota(counts.tolist(), limit))[labels]
    rank = torch.empty_like(labels)  # of a token among the tokens of its expert
    rank[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device)
    rank -= (counts.cumsum(0) - counts)[labels]
    total = counts[labels]
    chosen = (rank + 1) * taken // total > rank * taken // total
    return chosen * total.float() / taken


def _quota(counts: list[int], limit: int) -> int:
    """The most tokens of one expert, if experts with fewer give all of theirs."""
    left = limit
    for num_done, count in enumerate(sorted(counts)):
        share = left // (len(counts) - num_done)
        if count > share:
            return max(1, share)
        left -= count
    return max(1, *counts)


def token_weights(batches: Sequence[Batch], num_experts: int) -> list[Tensor]:
    """The weights of the tokens in a fit, [B, L] float32: those of an expert sum to 1.

    If an expert has tokens that open answers, these sum to `ANSWER_START_SHARE`.
    """
    each = each_of_kind(num_of_kinds(batches, num_experts)).flatten()
    return [each[b.kinds.clamp_min(0)] for b in batches]


def num_of_kinds(batches: Sequence[Batch], num_experts: int) -> Tensor:
    """[E, 2] tokens of each expert: [:, 0] ordinary ones, [:, 1] those that open answers."""
    kinds = torch.cat([b.kinds.flatten() for b in batches])
    return torch.bincount(kinds[kinds >= 0], minlength=2 * num_experts).view(num_experts, 2)


def each_of_kind(counts: Tensor) -> Tensor:
    """The weight of one token of each kind, [E, 2] float32, from their numbers [E, 2].

    The weights of an expert's tokens sum to 1.
    """
    present = (counts > 0).float() * torch.tensor(
        [1 - ANSWER_START_SHARE, ANSWER_START_SHARE], device=counts.device
    )
    return present / present.sum(1, keepdim=True) / counts.clamp_min(1)


def by_kind(tokens: Tensor, answer_starts: Tensor) -> list[tuple[float, Tensor]]:
    """Split one expert's tokens by kind, each kind with its share of the expert's weight.

    Args:
        tokens: [T, IN]
        answer_starts: [T] bool: whether a token opens an answer

    Returns:
        (share, tokens [T', IN]) of the ordinary tokens, and then of those that open answers; of
        all tokens at once if they are of one kind
    """
    if not answer_starts.any() or answer_starts.all():
        return [(1.0, tokens)]
    return [
        (1 - ANSWER_START_SHARE, tokens[~answer_starts]),
        (ANSWER_START_SHARE, tokens[answer_starts]),
    ]
