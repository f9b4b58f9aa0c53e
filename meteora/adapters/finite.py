"""Check the numbers of a tensor: no NaN, no infinity, not too large, not all zero.

The bits of a float without its sign, read as an integer, sort like the floats, and NaN comes after
infinity. So the largest integer decides, and bfloat16, which numpy lacks, needs no conversion.
"""

from dataclasses import dataclass
from typing import BinaryIO

from meteora.untrusted.safetensors_header import TensorInfo

CHUNK = 1 << 18
"""Bytes that are read at once."""

LARGE = 1024
"""A number this large is suspicious: trained factors stay below 10."""

_BITS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x4090_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000, 0x4480_0000),
    "F16": ("<u2", 0x7C00, 0x6400),
    "BF16": ("<u2", 0x7F80, 0x4480),
}
"""An unsigned integer of the same size; the bits of infinity; the bits of `LARGE`."""
FLOATS = tuple(_BITS)
"""The types that `scan` reads."""


@dataclass(frozen=True)
class Numbers:
    """The result of `scan` for one tensor."""

    finite: bool
    moderate: bool
    """No element is `LARGE` or above."""
    zero: bool
    """Every element is 0."""


def scan(file: BinaryIO, tensor: TensorInfo) -> Numbers:
    """Read a whole tensor of one of `FLOATS`; raises `EOFError` if it is cut short."""
    import numpy as np  # noqa: PLC0415  (a config alone needs no numpy)

    name, infinity, large = _BITS[tensor.dtype]
    dtype = np.dtype(name)
    without_sign = dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    file.seek(tensor.start)
    largest, left = 0, tensor.num_bytes
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk or len(chunk) % dtype.itemsize:
            raise EOFError("the file was cut short while it was read")
        left -= len(chunk)
        largest = max(largest, int((np.frombuffer(chunk, dtype) & without_sign).max()))
    return Numbers(finite=largest < infinity, moderate=largest < large, zero=largest == 0)
