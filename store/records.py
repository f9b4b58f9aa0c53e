"""Records: immutable facts, one file each, named by the SHA-256 of its bytes.

    records/ab/cdef….json     {"at", "blobs", "body", "kind", "run_id", "subject", "version"}

A fact is committed when its file has its name. The index can be made again from these files. Old
records can be packed into few files (`segments`), byte for byte, and are still found.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import duckdb

from meteora.artifacts import canonical_json
from store.errors import DamagedError, StoreError
from store.files import discard, locked, write_whole
from store.segments import SEGMENT_RECORDS, Segments

logger = logging.getLogger(__name__)

PACK_SECONDS = 600.0
"""Time to wait for another process that packs."""
NAME_LENGTH = 62 + len(".json")
PREFIX = re.compile(r"[0-9a-f]{2}")


def now() -> str:
    """This moment in UTC, ISO 8601 with microseconds: sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Record:
    """One fact."""

    kind: str
    """artifact, score, routing, adapter, publication, run-started, run-ended or failure."""
    subject: str
    """An artifact id, a run id, an adapter's source, or another text, depending on the kind."""
    body: dict[str, Any]
    run_id: str
    """The run that recorded it."""
    at: str
    """Time of the recording, as `now` returns it."""
    blobs: tuple[str, ...] = ()
    """SHA-256 of each blob that it refers to."""
    version: int = 1
    """Of the shape of `body`, per kind."""

    def to_bytes(self) -> bytes:
        """Its file: canonical JSON in UTF-8; `StoreError` for what JSON cannot hold, as NaN."""
        try:
            return canonical_json(asdict(self)).encode()
        except (TypeError, ValueError) as error:  # NaN, a lone surrogate, no JSON
            raise StoreError(
                f"{self.kind} of {self.subject!r} cannot be written as JSON: {error}"
            ) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote, without fields that only a newer release knows."""
        known = {name: value for name, value in json.loads(data).items() if name in TYPES}
        return cls(blobs=tuple(known.pop("blobs")), **known)


TYPES = {
    "at": str, "blobs": list, "body": dict, "kind": str, "run_id": str, "subject": str,
    "version": int,
}  # fmt: skip
"""Type of each field in JSON."""


def is_record(data: bytes) -> bool:
    """Whether bytes are those of a record of any release: the store's SQL can read them."""
    try:
        value = json.loads(data.decode())
        if rb"\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), kind) for name, kind in TYPES.items())
        and all(isinstance(blob, str) for blob in value["blobs"])
    )


class Records:
    """The folder of all records. Any number of processes may write and read at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.segments = Segments(root / "packed")

    def write(self, record: Record) -> str:
        """Write the record to disk, and return its SHA-256."""
        data = record.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        write_whole(self.path_of(sha256), data, root=self.root)
        return sha256

    def read(self, sha256: str) -> Record:
        """The record with this SHA-256. Raises as `read_bytes`."""
        return Record.from_bytes(self.read_bytes(sha256))

    def read_bytes(self, sha256: str) -> bytes:
        """The bytes of a record; `DamagedError` if they have another hash, or it is missing."""
        texts, errors = self.read_all([sha256])
        if sha256 in errors:
            raise errors[sha256]
        return texts[sha256]

    def read_all(self, sha256s: Iterable[str]) -> tuple[dict[str, bytes], dict[str, DamagedError]]:
        """The bytes of the readable records, and the errors of the others, by SHA-256."""
        loose, elsewhere, errors = {}, [], {}
        for sha256 in sha256s:
            try:
                loose[sha256] = self._loose_bytes(sha256)
            except FileNotFoundError:
                elsewhere.append(sha256)
            except DamagedError as error:
                errors[sha256] = error
        packed = self.segments.texts(elsewhere)
        for sha256 in set(elsewhere) - packed.keys():
            errors[sha256] = DamagedError(
                f"record {sha256[:12]} is missing in {self.root}; restore it from a backup"
            )
        return loose | packed, errors

    def _loose_bytes(self, sha256: str) -> bytes:
        path = self.path_of(sha256)
        if not path.is_file():
            raise FileNotFoundError(path)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(
                f"{path}: its bytes do not hash to its name, so they have changed since they were"
                " written; restore the file from a backup, or move it away to go on without it"
            )
        if not is_record(data):
            raise DamagedError(f"{path} is no record; move it away to go on without it")
        return data

    def path_of(self, sha256: str) -> Path:
        """The file of the record while it is not packed."""
        return self.root / sha256[:2] / f"{sha256[2:]}.json"

    def parts(self) -> set[str]:
        """The names of all files: of loose records, and of segments. No file is opened.

        Loose records are listed first, so that a record that is being packed is in one of the two.
        """
        return self.loose() | self.segments.names()

    def loose(self) -> set[str]:
        """The names of all records that are not packed: a listing of 256 folders."""
        names: set[str] = set()
        for folder in self._folders():
            with os.scandir(folder.path) as entries:
                names.update(
                    folder.name + entry.name[:62]
                    for entry in entries
                    if len(entry.name) == NAME_LENGTH
                    and entry.name.endswith(".json")
                    and entry.is_file()  # reading a pipe would never end
                )
        return names

    def pack(self) -> int:
        """Move all readable loose records into segments; return their number.

        A loose file is removed only after its segment is on disk. If the process dies in between,
        some records are in both, and the next `pack` removes their loose files. A record that
        cannot be read stays where it is, with a warning.

        Raises:
            DamagedError: a segment that holds loose records does not hash to its name.
            BusyError: another process is packing.
        """
        num_packed = 0
        with locked(self.root.parent / "pack.lock", deadline_seconds=PACK_SECONDS):
            loose = sorted(self.loose())
            twice = self._packed_already(loose)
            waiting = [sha256 for sha256 in loose if sha256 not in twice]
            self.drop(twice)
            for start in range(0, len(waiting), SEGMENT_RECORDS):
                texts, errors = self.read_all(waiting[start : start + SEGMENT_RECORDS])
                for error in errors.values():
                    logger.warning("not packed: %s", error)
                if texts:
                    self.segments.write(texts)
                    self.drop(texts)
                    num_packed += len(texts)
        return num_packed

    def _packed_already(self, loose: list[str]) -> set[str]:
        """The loose records that an undamaged segment holds: their loose files may be removed."""
        if not self.segments.holding(loose):
            return set()
        held: set[str] = set()
        for name in self.segments.names():
            if some := self.segments.holding(loose, [name]):
                self.segments.check(name)
                held |= some
        return held

    def is_segment(self, path: Path) -> bool:
        """Whether a stranger's file holds only records, each under its own name; reads all."""
        try:
            return all(
                hashlib.sha256(data).hexdigest() == sha256 and is_record(data)
                for sha256, data in self.segments.rows(path)
            )
        except duckdb.Error:
            return False

    def drop(self, sha256s: Collection[str]) -> None:
        """Remove the loose files of these records, which a segment has."""
        for sha256 in sha256s:
            discard(self.path_of(sha256))

    def _folders(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root) as entries:
                return [entry for entry in entries if PREFIX.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
