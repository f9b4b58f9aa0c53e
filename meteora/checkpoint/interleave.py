"""The A's of many adapters one above the other, their B's side by side: at the speed of memory.

    A of expert 0  [8, IN]        B of expert 0 | 1  [OUT, 8 | OUT, 4]
    A of expert 1  [4, IN]        in the file: row by row, a few bytes of each expert in turn

A's bytes follow each other in the stack as they do in the adapters' files. B's have to be dealt out
a few at a time, which is fast only while they lie in the processor's cache: so each B is read into
blocks of rows, and the rows of one block are put together while it is there. Where everything goes
is laid out once for all modules of the same sizes: Python's own time would show otherwise.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from meteora.adapters.tensors import AdapterTensors
    from meteora.adapters.weights import AdapterWeights

    Source = tuple[AdapterWeights, AdapterTensors]
    """An open adapter, and which of its tensors are the factors of a module."""

BLOCK = 1 << 19
"""Bytes that are put together at once; twice that fits into the second cache of common CPUs."""
LINE = 64
"""Bytes of a cache line."""
UNITS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Numbers of so many bytes, which are moved and never computed with."""


class _Step(NamedTuple):
    """Some rows of one adapter's A on their way."""

    expert: int
    skip: int
    """Rows of this adapter that went before."""
    count: int
    data: memoryview
    """Where their bytes belong."""
    full: Tensor | None
    """The rows that are complete then."""


class StackOfA:
    """A [R, IN], made a few rows at a time from adapters of given ranks."""

    def __init__(self, ranks: Sequence[int], num_in: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._row_bytes = row_bytes = num_in * dtype.itemsize
        room = max(1, BLOCK // row_bytes)
        rows = torch.empty(room, num_in, dtype=dtype)
        data = _bytes(rows)
        self._steps: list[_Step] = []
        filled, left = 0, sum(ranks)
        for e, r in enumerate(ranks):
            done = 0
            while done < r:
                count = min(r - done, room - filled)
                own = data[filled * row_bytes : (filled + count) * row_bytes]
                filled, left = filled + count, left - count
                full = rows[:filled] if filled == room or not left else None
                self._steps.append(_Step(e, done, count, own, full))
                done, filled = done + count, filled % room

    def rows(self, sources: Sequence[Source]) -> Iterator[Tensor]:
        """A in pieces of rows; what is yielded is gone at the next."""
        for e, skip, count, data, full in self._steps:
            weights, names = sources[e]
            key, size = names.a_key, self._row_bytes
            if weights.holds(key, self.dtype) and not names.transposed:
                weights.read(key, (data,), count * size, skip * size)
            else:
                converted = _converted(weights, key, names, self.dtype)
                data[:] = _bytes(converted[skip : skip + count])
            if full is not None:
                yield full


class _Run(NamedTuple):
    """Adapters of one rank that follow each other, and where their rows of a block are staged.

    Those of the next adapter begin `stride` bytes later: an odd number of cache lines, since lines
    at equal distances of a power of two would push each other out of the cache.
    """

    experts: range
    r: int
    column: int
    """Of the stack, where its first adapter begins."""
    begin: int
    stride: int


class StackOfB:
    """B [OUT, R], made a few rows at a time from adapters of given ranks.

    Memory is that of B, which `stage` says, and that of one block.
    """

    def __init__(self, ranks: Sequence[int], num_out: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        row_bytes = sum(ranks) * dtype.itemsize
        most = max(1, min(BLOCK // row_bytes, num_out))
        self._counts = [min(most, num_out - start) for start in range(0, num_out, most)]
        self._runs, self._block_bytes = _runs(ranks, most * dtype.itemsize)
        self._joined = torch.empty(most * row_bytes, dtype=torch.uint8)
        self._row_bytes = row_bytes
        self.num_bytes = len(self._counts) * self._block_bytes

    def stage(self, memory: Tensor) -> None:
        """Say where B's are read to: uint8 [num_bytes] or more, until `rows` is through."""
        data, size = memoryview(memory.numpy()), self._block_bytes
        starts = [
            start
            for run in self._runs
            for start in range(run.begin, run.begin + len(run.experts) * run.stride, run.stride)
        ]
        widths = [run.r * self.dtype.itemsize for run in self._runs for _ in run.experts]
        self._buffers = [
            [
                data[n * size + start : n * size + start + count * width]
                for n, count in enumerate(self._counts)
            ]
            for start, width in zip(starts, widths, strict=True)
        ]
        self._pieces: list[tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]] = []
        """A block, from where to where its bytes are moved, and the rows that result."""
        for n, count in enumerate(self._counts):
            block = memory[n * size : (n + 1) * size]
            rows = self._joined[: count * self._row_bytes].view(count, self._row_bytes)
            moves = [_move(run, block, rows, self.dtype.itemsize) for run in self._runs]
            self._pieces.append((block.view(torch.int64), moves, rows.view(self.dtype)))

    def rows(self, sources: Sequence[Source]) -> Iterator[Tensor]:
        """B in pieces of rows; what is yielded is gone at the next."""
        for (weights, names), buffers in zip(sources, self._buffers, strict=True):
            if weights.holds(names.b_key, self.dtype) and not names.transposed:
                weights.read(names.b_key, buffers)
                continue
            converted = _converted(weights, names.b_key, names, self.dtype)
            for buffer, part in zip(buffers, converted.split(self._counts), strict=True):
                buffer[:] = _bytes(part)
        for block, moves, rows in self._pieces:
            block.max()  # one pass in order brings it into the cache
            for own, columns in moves:
                columns.copy_(own)
            yield rows


def _runs(ranks: Sequence[int], column_bytes: int) -> tuple[list[_Run], int]:
    """The runs, and the bytes of a block whose columns have so many each."""
    starts = list(accumulate(ranks, initial=0))
    runs, begin = [], 0
    for r, members in groupby(range(len(ranks)), key=ranks.__getitem__):
        experts = list(members)
        lines = -(-r * column_bytes // LINE)
        stride = (lines + 1 + lines % 2) * LINE
        runs.append(_Run(range(experts[0], experts[-1] + 1), r, starts[experts[0]], begin, stride))
        begin += len(experts) * stride
    return runs, begin


def _move(run: _Run, block: Tensor, rows: Tensor, itemsize: int) -> tuple[Tensor, Tensor]:
    """What is staged of a run in a block, and its columns of rows [·, R · itemsize], both in bytes.

    Both are given as [rows, experts, units] of units as large as they can be.
    """
    width, first, num_experts = run.r * itemsize, run.column * itemsize, len(run.experts)
    unit = gcd(max(UNITS), width, first, rows.shape[1])
    # `as_strided` counts from where the memory of a slice begins, not from the slice
    offset = (block.storage_offset() + run.begin) // unit
    size = len(rows), num_experts, width // unit
    own = block.view(UNITS[unit]).as_strided(size, (width // unit, run.stride // unit, 1), offset)
    columns = rows.view(UNITS[unit])[:, first // unit : (first + num_experts * width) // unit]
    return own, columns.unflatten(1, size[1:])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))


def staging(num_bytes: int) -> Tensor:
    """Memory for `StackOfB.stage`."""
    # numpy asks for huge pages, torch does not
    return torch.from_numpy(np.empty(num_bytes, np.uint8))


def _converted(
    weights: AdapterWeights, key: str, names: AdapterTensors, dtype: torch.dtype
) -> Tensor:
    """A factor that is not in the stack's form, brought into it; a wider dtype holds it exactly."""
    tensor = weights.tensor(key)
    return (tensor.T if names.transposed else tensor).to(dtype)
