"""Read the header of a safetensors file as if it were hostile: limits first, then parsing.

The safetensors library accepts more than this reader: keys given twice, names with NUL or `../`, a
million empty tensors (35 s and 2.9 GB to open), shapes of a thousand dimensions. This reader takes
only a flat table of named tensors of limited size that fill the file exactly.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from meteora.untrusted.strict_json import StrictJSONError, parse_object

MAX_HEADER_BYTES = 4 << 20
"""A 70B model with every linear layer targeted needs 0.2 MB."""
MAX_TENSORS = 20_000
MAX_DIMS = 4
MAX_SIZE = 1 << 24
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
"""Bytes of one element; a dtype that packs several elements into a byte is refused."""


class HeaderError(ValueError):
    """The file is not a safetensors file that can be trusted; the message is a clause."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """The first of its bytes, counted from the beginning of the file."""
    num_bytes: int


def read_header(file: BinaryIO, file_bytes: int, *, empty: bool = False) -> dict[str, TensorInfo]:
    """Return every tensor of the file by name, in the order of their bytes.

    Args:
        file: Open at its beginning; read up to the end of the header and no further.
        file_bytes: The size of the file.
        empty: Whether tensors without elements are allowed.

    Raises:
        HeaderError: The header is not sound, or the tensors do not fill the file exactly.
    """
    if file_bytes < 8:
        raise HeaderError(f"it has {file_bytes} bytes, too few for a header")
    start = file.read(8)
    if len(start) < 8:
        raise HeaderError("it was cut short while it was read")
    (size,) = struct.unpack("<Q", start)
    if size > file_bytes - 8:
        raise HeaderError(f"its header claims {size} bytes of the {file_bytes - 8} that follow")
    if size > MAX_HEADER_BYTES:
        raise HeaderError(f"its header has {size} bytes, more than {MAX_HEADER_BYTES}")
    text = file.read(size)
    if len(text) < size:
        raise HeaderError("it was cut short while it was read")
    # counted before it is parsed: a table of a million entries takes gigabytes
    most = {b"{": MAX_TENSORS + 2, b"[": 2 * MAX_TENSORS + 4, b'"': 16 * MAX_TENSORS}
    if any(text.count(mark) > limit for mark, limit in most.items()):
        raise HeaderError(f"its header lists more than {MAX_TENSORS} tensors")
    if not text.startswith(b"{"):
        raise HeaderError("its header does not begin with an object")
    try:
        table = parse_object(text)
    except StrictJSONError as error:
        raise HeaderError(f"its header cannot be read: {error}") from None
    _check_metadata(table.pop("__metadata__", {}))
    tensors = {name: _tensor(name, entry, 8 + size) for name, entry in table.items()}
    if not empty:
        _refuse_empty(tensors)
    # an empty tensor begins where the next one does
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    _check_tiling(ordered, 8 + size, file_bytes)
    return ordered


def _check_metadata(metadata: object) -> None:
    if metadata is None:  # as MLX writes it
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError("its __metadata__ is not a table of texts")


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    if not NAME.fullmatch(name):
        raise HeaderError(f"a tensor is named {name[:60]!r}; letters, digits, _ . - are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise HeaderError(f"{name} has the dtype {str(dtype)[:20]!r}, which is not read here")
    if not _sizes(shape, MAX_SIZE) or len(shape) > MAX_DIMS:
        raise HeaderError(f"{name} has a shape other than up to {MAX_DIMS} sizes below 2^24")
    if not _sizes(offsets, 1 << 62) or len(offsets) != 2:
        raise HeaderError(f"{name} has data_offsets that are not two positions")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes != math.prod(shape) * ITEMSIZE[dtype]:
        raise HeaderError(f"{name} spans {num_bytes} bytes, not those of {dtype} {shape}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _refuse_empty(tensors: Mapping[str, TensorInfo]) -> None:
    for name, tensor in tensors.items():
        if tensor.num_bytes == 0:
            raise HeaderError(
                f"{name} is empty, of shape {[*tensor.shape]}, as a shard of DeepSpeed or FSDP is"
                " that was not gathered before it was saved"
            )


def _sizes(value: Any, limit: int) -> bool:  # noqa: ANN401  (JSON is what it is)
    return isinstance(value, list) and all(type(v) is int and 0 <= v < limit for v in value)


def _check_tiling(tensors: Mapping[str, TensorInfo], start: int, file_bytes: int) -> None:
    """Refuse holes, overlaps, and bytes after the last tensor."""
    for name, tensor in tensors.items():
        if tensor.start != start:
            raise HeaderError(f"{name} begins at byte {tensor.start}, not where the last ends")
        start += tensor.num_bytes
    if start != file_bytes:
        raise HeaderError(f"its tensors end at byte {start}, and the file at {file_bytes}")
