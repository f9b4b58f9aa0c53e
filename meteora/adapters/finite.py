"""Numbers that would poison a model, found with the standard library alone.

A chunk of a tensor is one big integer, and a test of every element is two operations on it: clear
the signs, add to each lane what makes exactly the lanes at or above a threshold carry into the
place of their sign. IEEE numbers without their sign sort as integers do, so one such test finds
NaN and infinity (everything from the all-ones exponent on), another what is out of proportion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import BinaryIO

    from meteora.untrusted.safetensors_header import TensorInfo

CHUNK = 1 << 16

_LANES = {
    "F32": (4, 0x7F80_0000, 0x4480_0000),
    "F16": (2, 0x7C00, 0x6400),
    "BF16": (2, 0x7F80, 0x4480),
}
"""Bytes of an element; the bits of infinity; the bits of `LARGE`."""

LARGE = 1024
"""Trained factors stay below 10."""


@dataclass(frozen=True)
class Numbers:
    """What is wrong with the numbers of one tensor."""

    finite: bool
    moderate: bool
    """No element is `LARGE` or above."""
    zero: bool
    """Every element is 0."""


def scan(file: BinaryIO, tensor: TensorInfo) -> Numbers:
    """Read one tensor of dtype F32, F16 or BF16 through; raises `EOFError` if it is cut short."""
    itemsize, infinity, large = _LANES[tensor.dtype]
    file.seek(tensor.start)
    finite = moderate = zero = True
    left = tensor.num_bytes
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk or len(chunk) % itemsize:
            raise EOFError("the file was cut short while it was read")
        left -= len(chunk)
        lanes = len(chunk) // itemsize
        magnitudes = int.from_bytes(chunk, "little") & _repeated(
            itemsize, lanes, _sign(itemsize) - 1
        )
        if not magnitudes:
            continue
        zero = False
        if _any_at_least(magnitudes, itemsize, lanes, large):
            moderate = False
            finite = finite and not _any_at_least(magnitudes, itemsize, lanes, infinity)
    return Numbers(finite, moderate, zero)


def _any_at_least(magnitudes: int, itemsize: int, lanes: int, threshold: int) -> bool:
    sign = _sign(itemsize)
    carried = magnitudes + _repeated(itemsize, lanes, sign - threshold)
    return bool(carried & _repeated(itemsize, lanes, sign))


def _sign(itemsize: int) -> int:
    return 1 << (8 * itemsize - 1)


@lru_cache(maxsize=32)
def _repeated(itemsize: int, lanes: int, value: int) -> int:
    """`value` in each lane."""
    return int.from_bytes(value.to_bytes(itemsize, "little") * lanes, "little")
