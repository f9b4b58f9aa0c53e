"""Many records in one file: millions of small files are slow to list and to ingest.

    records/packed/<sha256>.parquet     sha256, kind, subject, text: one row a record, by sha256

A segment is written once, and its name is the SHA-256 of its bytes. `text` holds the exact bytes of
each record, which hash to the record's own name.
"""

import hashlib
import logging
import os
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

import duckdb

from meteora.artifacts import file_sha256
from store.errors import DamagedError, StoreError, brief
from store.files import partial_file, settle
from store.query import memory, quoted

logger = logging.getLogger(__name__)

SUFFIX = ".parquet"
SEGMENT_RECORDS = 200_000
"""Most records in a segment."""
ROW_GROUP_RECORDS = 20_480  # so many records are read to find one
INSERT_RECORDS = 20_000


class Segments:
    """The folder of packed records. Names end in `.parquet`, which no record's name does."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> set[str]:
        """The file names of all segments; `OSError` if they cannot be listed, as `glob` hides."""
        try:
            with os.scandir(self.root) as entries:
                return {one.name for one in entries if one.name.endswith(SUFFIX) and one.is_file()}
        except FileNotFoundError:
            return set()

    def path_of(self, name: str) -> Path:
        """The file of a segment."""
        return self.root / name

    def check(self, name: str) -> None:
        """Raise `DamagedError` for a segment that is missing, is none, or has changed."""
        path = self.path_of(name)
        try:
            whole = file_sha256(path) + SUFFIX == name
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing; restore it from a backup") from None
        if not whole:
            raise DamagedError(
                f"{path}: its bytes do not hash to its name, so they have changed since they were"
                " written; restore the file from a backup, or move it away to go on without it"
            )
        try:
            with memory() as connection:
                connection.execute(f"SELECT sha256, text FROM read_parquet({quoted(path)}) LIMIT 0")  # noqa: S608
        except (duckdb.InvalidInputException, duckdb.BinderException) as error:
            raise DamagedError(
                f"{path} is no segment ({brief(error)}); move it away to go on without it"
            ) from None

    def rows(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """The name and the bytes of each row of a file; `duckdb.Error` if it is no segment."""
        with memory() as connection:
            packed = connection.execute(f"SELECT sha256, text FROM read_parquet({quoted(path)})")  # noqa: S608
            while part := packed.fetchmany(ROW_GROUP_RECORDS):
                for sha256, text in part:
                    yield str(sha256), str(text).encode()

    def write(self, texts: dict[str, bytes]) -> str:
        """Write records, by their SHA-256, into one segment; it is on disk when this returns.

        Raises:
            StoreError: the disk is full, or the folder cannot be written to.
        """
        try:
            return self._write(texts)
        except duckdb.Error as error:
            raise StoreError(
                f"{self.root} cannot be written to ({error}); free some space or make it writable:"
                " nothing is lost"
            ) from error

    def _write(self, texts: dict[str, bytes]) -> str:
        with (
            partial_file(self.root) as spill,
            memory(spill) as connection,
            partial_file(self.root) as partial,
        ):
            connection.execute("CREATE TABLE packed (sha256 VARCHAR, text VARCHAR)")
            pairs = iter(texts.items())
            while part := list(islice(pairs, INSERT_RECORDS)):
                connection.execute(
                    "INSERT INTO packed SELECT unnest($1::VARCHAR[]), unnest($2::VARCHAR[])",
                    [[sha256 for sha256, _ in part], [text.decode() for _, text in part]],
                )
            connection.execute(
                "COPY (SELECT sha256, text->>'kind' AS kind, text->>'subject' AS subject, text"  # noqa: S608
                f" FROM packed ORDER BY sha256) TO {quoted(partial)}"
                f" (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP_RECORDS})"
            )
            rows = connection.execute(
                f"SELECT count(*) FROM read_parquet({quoted(partial)}) WHERE sha256(text) = sha256"  # noqa: S608
            ).fetchone()
            if rows != (len(texts),):  # read back, since the loose files are removed after this
                raise StoreError(f"{partial} does not hold what was written to it; nothing is lost")
            name = file_sha256(partial) + SUFFIX
            settle(partial, self.path_of(name), root=self.root)
        return name

    def holding(self, sha256s: Collection[str], names: Collection[str] | None = None) -> set[str]:
        """The records among these whose bytes any segment, or a named one, holds."""
        sql = (
            "WITH named AS MATERIALIZED"  # only what is found is hashed
            " (SELECT sha256, text FROM {} WHERE sha256 IN (SELECT unnest($1::VARCHAR[])))"
            " SELECT sha256 FROM named WHERE sha256(text) = sha256"
        )
        return {sha256 for (sha256,) in self._select(sql, sha256s, names)}

    def texts(self, sha256s: Collection[str]) -> dict[str, bytes]:
        """The bytes of the packed records among these, checked against their names.

        Damaged records are left out, with a warning.
        """
        sql = "SELECT sha256, text FROM {} WHERE sha256 IN (SELECT unnest($1::VARCHAR[]))"
        return _checked(self._select(sql, sha256s))

    def about(
        self, kind: str, subjects: Collection[str] | None, names: Collection[str]
    ) -> dict[str, bytes]:
        """The records about these subjects, or about all, in the named segments."""
        sql = "SELECT sha256, text FROM {} WHERE kind = $1[1]"
        if subjects is not None:
            sql += " AND subject IN (SELECT unnest($1[2:]))"
        return _checked(self._select(sql, [kind, *(subjects or ())], names))

    def blobs(self, name: str) -> set[str]:
        """The SHA-256s of all blobs that the records of a segment refer to; raises as `_select`."""
        sql = "SELECT DISTINCT unnest((text->'blobs')::VARCHAR[]) FROM {}"
        return {sha256 for (sha256,) in self._select(sql, None, [name], all_of_them=True)}

    def mentioned(self, sha256s: Collection[str]) -> set[str]:
        """The hashes among these in the text of any packed record; raises as `_select`."""
        rows = self._select(
            "SELECT DISTINCT mention FROM"
            " (SELECT unnest(regexp_extract_all(text, '[0-9a-f]{{64}}')) AS mention FROM {})"
            " WHERE mention IN (SELECT unnest($1::VARCHAR[]))",
            sha256s,
            all_of_them=True,
        )
        return {sha256 for (sha256,) in rows}

    def count(self) -> int:
        """The number of packed records; one that is in two segments counts once."""
        rows = self._select("SELECT DISTINCT sha256 FROM {}", None)
        return len({sha256 for (sha256,) in rows})

    def _select(
        self,
        sql: str,
        values: Collection[str] | None,
        names: Collection[str] | None = None,
        *,
        all_of_them: bool = False,
    ) -> list[tuple]:
        """Rows of the named segments, or of all; an unreadable one is skipped with a warning.

        Args:
            sql: with `{}` in place of the segments, and `$1` for the values, unless they are None
            all_of_them: raise an error for an unreadable segment instead

        Raises:
            StoreError: a segment cannot be read, and `all_of_them` is true.
        """
        present = sorted(self.names() if names is None else names)
        parameters = [] if values is None else [list(values)]
        if not present or parameters == [[]]:
            return []
        paths = ", ".join(quoted(self.path_of(name)) for name in present)
        try:
            with memory() as connection:
                return connection.execute(
                    sql.format(f"read_parquet([{paths}])"), parameters
                ).fetchall()
        except duckdb.Error as error:
            if len(present) > 1:
                return [
                    row
                    for name in present
                    for row in self._select(sql, values, [name], all_of_them=all_of_them)
                ]
            if all_of_them:
                raise StoreError(
                    f"segment {present[0]} cannot be read now ({brief(error)}), so what its records"
                    " refer to is not known; try again with more memory, and `meteora verify` says"
                    " whether it is damaged"
                ) from error
            logger.warning("segment %s cannot be read: %s", *present, error)
            return []


def _checked(rows: list[tuple[str, str]]) -> dict[str, bytes]:
    texts = {}
    for sha256, text in rows:
        data = text.encode()
        if hashlib.sha256(data).hexdigest() == sha256:
            texts[sha256] = data
        else:
            logger.warning("record %s in a segment does not hash to its name", sha256)
    return texts
