"""Walk through the header of a GGUF file as if it were hostile, before a library reads it.

The library reads an array of 2^60 numbers in a file of a hundred bytes for ever.
"""

import struct
from typing import BinaryIO

from meteora.untrusted.findings import shortened
from meteora.untrusted.safetensors_header import MAX_TENSORS, HeaderError

MAGIC = b"GGUF"
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""By the number of a type, how `struct` names it."""
TEXT, ARRAY = 8, 9
MAX_FIELDS = 10_000
MAX_KEY = 1_000
"""Bytes of the name of a field."""
MAX_ITEMS = 1 << 21
"""Items of all arrays; the library takes a kilobyte for each. A vocabulary of 262,144 tokens, with
scores, types and merges, has 1.3 million."""


def read_fields(file: BinaryIO, file_bytes: int) -> dict[str, int | float | None]:
    """Return the fields of a header by name: numbers, and None in place of all else.

    Args:
        file: open at its beginning
        file_bytes: its size

    Raises:
        HeaderError: it is no GGUF file, or ends in its header, or its header is endless.
    """
    return _Walk(file, file_bytes).fields()


class _Walk:
    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file, self._left, self._items = file, file_bytes, MAX_ITEMS
        self._order = "<"

    def fields(self) -> dict[str, int | float | None]:
        if self._bytes(4) != MAGIC:
            raise HeaderError("it is no GGUF file")
        version = self._bytes(4)
        if version[:2] == b"\0\0":  # written on a machine of the other byte order
            self._order = ">"
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        for found, most, what in (
            (num_tensors, MAX_TENSORS, "tensors"),
            (num_fields, MAX_FIELDS, "fields"),
        ):
            if found > most:
                raise HeaderError(f"its header has {found} {what}, more than {most}")
        fields = dict(self._field() for _ in range(int(num_fields)))
        if len(fields) < num_fields:  # a reader might take another one of them than we do
            raise HeaderError("two of its fields have one name")
        return fields

    def _field(self) -> tuple[str, int | float | None]:
        length = int(self._number("Q"))
        if length > MAX_KEY:
            raise HeaderError(f"the name of a field has {length} bytes, more than {MAX_KEY}")
        name = self._bytes(length).decode(errors="replace")
        kind = int(self._number("I"))
        if kind in SCALARS:
            return name, self._number(SCALARS[kind])
        if kind == TEXT:
            self._skip(int(self._number("Q")))
        elif kind == ARRAY:
            self._array(name)
        else:
            raise HeaderError(f"{shortened(name)} is of type {kind}, which no field has")
        return name, None

    def _array(self, name: str) -> None:
        kind, length = int(self._number("I")), int(self._number("Q"))
        self._items -= length
        if self._items < 0:
            raise HeaderError(f"up to {shortened(name)} its arrays have over {MAX_ITEMS} items")
        if kind in SCALARS:
            self._skip(length * struct.calcsize(f"<{SCALARS[kind]}"))
        elif kind == TEXT:
            for _ in range(length):
                self._skip(int(self._number("Q")))
        else:
            raise HeaderError(f"{shortened(name)} is an array of type {kind}, which none is")

    def _number(self, code: str) -> int | float:
        form = f"{self._order}{code}"
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, length: int) -> bytes:
        self._take(length)
        data = self._file.read(length)
        if len(data) < length:
            raise HeaderError("it was cut short while it was read")
        return data

    def _skip(self, length: int) -> None:
        self._take(length)
        self._file.seek(length, 1)

    def _take(self, length: int) -> None:
        self._left -= length
        if self._left < 0:
            raise HeaderError("it ends inside its header")
