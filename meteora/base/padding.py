"""Put token ids of different lengths into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The indices of rows in batches of `size`, the shortest rows first, for little padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(
    rows: Sequence[Sequence[int]], filling: int = 0, side: Literal["left", "right"] = "right"
) -> Tensor:
    """Return rows of numbers as [B, L], filled up at one side to the longest length L."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filling, padding_side=side)


def padded_and_mask(
    rows: Sequence[Sequence[int]], filling: int = 0, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """The same, and its attention mask [B, L]: 1 for a token, 0 for padding."""
    return padded(rows, filling, side), padded([[1] * len(row) for row in rows], 0, side)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The padding token of a tokenizer, or its end token; None if it has neither."""
    own = tokenizer.pad_token_id
    return tokenizer.eos_token_id if own is None else own
