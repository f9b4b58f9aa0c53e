"""The weights of an adapter, read directly into given memory.

Bytes are read with `pread` and never mapped: a mapped file that becomes shorter would kill the
process. A file that has changed since `reader.read` checked it is refused.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from meteora.adapters.tensors import Adapter, AdapterTensors, Stamp
from meteora.artifacts import MeteoraError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_BUFFERS = 1024
"""Buffers that one call of `preadv` fills."""


class ChangedAdapterError(MeteoraError):
    """An adapter's file has changed since it was read and checked."""


class AdapterWeights:
    """An adapter's safetensors file, open."""

    def __init__(self, adapter: Adapter) -> None:
        """Open it; raises `ChangedAdapterError` unless its bytes are those that were checked."""
        self.path = adapter.weights
        self._file = adapter.weights.open("rb")
        self._descriptor = self._file.fileno()
        try:
            if Stamp.of(self._file) != adapter.stamp:
                digest = hashlib.file_digest(self._file, "sha256").hexdigest()
                if digest != adapter.spec.weights_sha256:
                    raise self._changed()
            # plain JSON is safe: `reader.read` has checked this header
            (size,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
            self._header = json.loads(os.pread(self._descriptor, size, 8))
        except BaseException:
            self._file.close()
            raise
        self._start = 8 + size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def holds(self, key: str, dtype: torch.dtype) -> bool:
        return DTYPES[self._header[key]["dtype"]] is dtype

    def tensor(self, key: str) -> Tensor:
        """Read one tensor into new memory."""
        entry = self._header[key]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        self.read(key, [bytes_of(tensor)])
        return tensor

    def factors(self, names: AdapterTensors) -> tuple[Tensor, Tensor]:
        """Read A [r, IN] and B [OUT, r] of one module into new memory."""
        a, b = self.tensor(names.a_key), self.tensor(names.b_key)
        return (a.T, b.T) if names.transposed else (a, b)

    def read(self, key: str, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with all bytes of a tensor.

        Raises:
            ChangedAdapterError: the file ends too early.
        """
        begin, end = (self._start + offset for offset in self._header[key]["data_offsets"])
        if len(buffers) > MOST_BUFFERS or (
            os.preadv(self._descriptor, buffers, begin) != end - begin
        ):
            self._read_one_by_one(buffers, begin)

    def _read_one_by_one(self, buffers: Sequence[memoryview], begin: int) -> None:
        """Fill buffer by buffer: some file systems return less than is asked for."""
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                got = os.preadv(self._descriptor, [buffer[done:]], begin + done)
                if not got:
                    raise self._changed()
                done += got
            begin += done

    def _changed(self) -> ChangedAdapterError:
        return ChangedAdapterError(
            f"{self.path}: it changed after it was read and checked; run again, so that it is"
            " checked as it is now"
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as they lie in a file."""
    # one row of a transpose counts as contiguous, whatever its strides are
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
