"""Make the rows of stacked factors: A's one above the other, B's side by side, at memory speed.

    A of expert 0  [8, IN]        B of expert 0 | 1  [OUT, 8 | OUT, 4]
    A of expert 1  [4, IN]        in the file: row by row, a few bytes of each expert in turn

The bytes of A are contiguous in the stack, as in the adapters' files. Those of B alternate every
few bytes, and moving them is fast only in the processor's cache. So each B is read into blocks of
rows, and the rows of one block are joined while it is in the cache. Modules of the same sizes share
one layout, which saves time in Python. `torch.cat` of a whole module has half of this speed
(tests/benchmarks/results/fuse.md).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meteora.adapters.tensors import AdapterTensors
from meteora.adapters.weights import AdapterWeights, bytes_of

Source = tuple[AdapterWeights, AdapterTensors]
"""An open adapter, and the names of its factors of one module."""

BLOCK = 1 << 19
"""Bytes that are joined at once; twice that fits into the second-level cache of common CPUs."""
LINE = 64
"""Bytes of a cache line."""
UNITS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype for each size in bytes, to move bytes in large units; its meaning does not matter."""


def rows_of_a(sources: Sequence[Source], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield A [R, IN] adapter by adapter, in the dtype of the stack."""
    for weights, names in sources:
        yield _converted(weights, names.a_key, names, dtype)


class _Run(NamedTuple):
    """Neighbouring adapters of one rank, and the place of their rows in a staged block.

    The rows of the next adapter begin `stride` bytes later: an odd number of cache lines, since
    lines at distances of a power of two would evict each other.
    """

    experts: range
    r: int
    column: int
    """The first column of these adapters in the stack."""
    begin: int
    """The first byte of these adapters in the block."""
    stride: int


class StackOfB:
    """B [OUT, R], made a few rows at a time from adapters of given ranks.

    It needs memory for all of B, which `stage` takes, and for one block.
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
        """Set the memory into which `rows` reads the B's, uint8 [num_bytes] or more."""
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
        """A block, the (source, target) of its moves, and the joined rows."""
        for n, count in enumerate(self._counts):
            block = memory[n * size : (n + 1) * size]
            rows = self._joined[: count * self._row_bytes].view(count, self._row_bytes)
            moves = [_move(run, block, rows, self.dtype.itemsize) for run in self._runs]
            self._pieces.append((block.view(torch.int64), moves, rows.view(self.dtype)))

    def rows(self, sources: Sequence[Source]) -> Iterator[Tensor]:
        """Yield B in pieces of rows; each piece is overwritten by the next."""
        for (weights, names), buffers in zip(sources, self._buffers, strict=True):
            if weights.holds(names.b_key, self.dtype) and not names.transposed:
                weights.read(names.b_key, buffers)
                continue
            converted = _converted(weights, names.b_key, names, self.dtype)
            for buffer, part in zip(buffers, converted.split(self._counts), strict=True):
                buffer[:] = bytes_of(part)
        for block, moves, rows in self._pieces:
            block.max()  # one sequential pass brings it into the cache
            for own, columns in moves:
                columns.copy_(own)
            yield rows


def _runs(ranks: Sequence[int], column_bytes: int) -> tuple[list[_Run], int]:
    """Return the runs, and the size of a block in bytes, with `column_bytes` for each column."""
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
    """Return the staged bytes of a run in a block, and its columns of the joined rows.

    Both as [rows, experts, units], of the largest units that divide all offsets.
    """
    width, first, num_experts = run.r * itemsize, run.column * itemsize, len(run.experts)
    unit = gcd(max(UNITS), width, first, rows.shape[1])
    # `as_strided` counts from the beginning of the storage, not of the slice
    offset = (block.storage_offset() + run.begin) // unit
    size = len(rows), num_experts, width // unit
    own = block.view(UNITS[unit]).as_strided(size, (width // unit, run.stride // unit, 1), offset)
    columns = rows.view(UNITS[unit])[:, first // unit : (first + num_experts * width) // unit]
    return own, columns.unflatten(1, size[1:])


def staging(num_bytes: int) -> Tensor:
    """Allocate memory for `StackOfB.stage`."""
    # numpy asks for huge pages, torch does not
    return torch.from_numpy(np.empty(num_bytes, np.uint8))


def _converted(
    weights: AdapterWeights, key: str, names: AdapterTensors, dtype: torch.dtype
) -> Tensor:
    """Read a factor that is transposed or of a narrower dtype, in the form of the stack."""
    tensor = weights.tensor(key)
    return (tensor.T if names.transposed else tensor).to(dtype)
