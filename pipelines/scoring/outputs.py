"""What is kept of every row that was asked: one Parquet file a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def write_outputs(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of one shape; equal rows give equal bytes."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def read_outputs(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file, all columns or some."""
    # the file itself, not the folder's layout: a blob lies where its hash says
    table = pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    return table.to_pylist()
