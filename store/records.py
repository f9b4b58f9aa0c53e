"""The record: immutable facts, one event a file, under the SHA-256 of their bytes.

    records/ab/cdef….json     {"at", "blobs", "body", "kind", "run_id", "subject", "version"}

A fact is committed when its file has its name. Everything else in the store that looks like
knowledge is an index over these files and can be made again from them. Old records can be packed:
many of them in one file (`segments`), byte for byte, where they are found as before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from meteora.artifacts import canonical_json
from store.errors import DamagedError, StoreError
from store.files import discard, locked, write_whole
from store.segments import SEGMENT_RECORDS, Segments

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

PACK_SECONDS = 600.0
NAME_LENGTH = 62 + len(".json")
PREFIX = re.compile(r"[0-9a-f]{2}")


def now() -> str:
    """This moment in UTC, ISO 8601 with microseconds: sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Record:
    """One event."""

    kind: str
    """artifact, score, routing, adapter, publication, run-started, run-ended or failure."""
    subject: str
    """What it is about: an artifact id, a run id, an adapter's source."""
    body: dict[str, Any]
    run_id: str
    """The run that found it out."""
    at: str
    """When it was recorded, in UTC."""
    blobs: tuple[str, ...] = ()
    """SHA-256 of each blob that it names."""
    version: int = 1
    """Of the shape of `body`, per kind."""

    def to_bytes(self) -> bytes:
        try:
            return canonical_json(asdict(self)).encode()
        except (TypeError, ValueError) as error:  # NaN, a lone surrogate, something that is no JSON
            raise StoreError(
                f"{self.kind} of {self.subject!r} cannot be written as JSON: {error}"
            ) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        fields = json.loads(data)
        return cls(blobs=tuple(fields.pop("blobs")), **fields)


class Records:
    """The folder of all records. Any number of processes may write and read at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.segments = Segments(root / "packed")

    def write(self, record: Record) -> str:
        """Commit the record; return its SHA-256. When this returns, the record is on disk."""
        data = record.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        write_whole(self.path_of(sha256), data, root=self.root)
        return sha256

    def read(self, sha256: str) -> Record:
        """The record of that name, checked against its name."""
        return Record.from_bytes(self.read_bytes(sha256))

    def read_bytes(self, sha256: str) -> bytes:
        """The bytes of the record of that name, checked against it.

        Raises:
            DamagedError: they hash to another name, or are gone.
        """
        texts, errors = self.read_all([sha256])
        if sha256 in errors:
            raise errors[sha256]
        return texts[sha256]

    def read_all(self, sha256s: Iterable[str]) -> tuple[dict[str, bytes], dict[str, DamagedError]]:
        """The bytes of those of these records that can be read, and why the others cannot."""
        loose, elsewhere, errors = {}, [], {}
        for sha256 in sha256s:
            try:
                loose[sha256] = self._loose_bytes(sha256)
            except FileNotFoundError:
                elsewhere.append(sha256)
            except DamagedError as error:
                errors[sha256] = error
        packed = self.segments.texts(elsewhere)
        errors |= {sha256: self._gone(sha256) for sha256 in elsewhere if sha256 not in packed}
        return loose | packed, errors

    def _loose_bytes(self, sha256: str) -> bytes:
        path = self.path_of(sha256)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(
                f"{path}: its bytes do not hash to its name, so they have changed since they were"
                " written; take the file back from a backup, or move it away to go on without it"
            )
        return data

    def _gone(self, sha256: str) -> DamagedError:
        return DamagedError(
            f"record {sha256[:12]} is gone from {self.root}; take it back from a backup"
        )

    def path_of(self, sha256: str) -> Path:
        """Where the record lies while it is not packed."""
        return self.root / sha256[:2] / f"{sha256[2:]}.json"

    def parts(self) -> set[str]:
        """The names of all files: of loose records, and of segments. No file is opened.

        Loose ones are listed first, so that a record that is being packed is in the one or the
        other.
        """
        return self.loose() | self.segments.names()

    def loose(self) -> set[str]:
        """The names of the records that lie in files of their own: a listing of 256 folders."""
        names: set[str] = set()
        for folder in self._folders():
            with os.scandir(folder.path) as entries:
                names.update(
                    folder.name + entry.name[:62]
                    for entry in entries
                    if len(entry.name) == NAME_LENGTH and entry.name.endswith(".json")
                )
        return names

    def pack(self) -> int:
        """Lay all loose records into segments; return how many.

        A loose file goes only when a segment that holds its record is on disk; a process that dies
        in between leaves records that lie in both, which the next packing puts right.

        Raises:
            DamagedError: a record does not hash to its name; nothing is packed with it.
            BusyError: another process packs.
        """
        with locked(self.root.parent / "pack.lock", deadline_seconds=PACK_SECONDS):
            loose = sorted(self.loose())
            twice = self._packed_already(loose)
            waiting = [sha256 for sha256 in loose if sha256 not in twice]
            self.drop(twice)
            for start in range(0, len(waiting), SEGMENT_RECORDS):
                part = waiting[start : start + SEGMENT_RECORDS]
                self.segments.write({sha256: self.read_bytes(sha256) for sha256 in part})
                self.drop(part)
        return len(waiting)

    def _packed_already(self, loose: list[str]) -> set[str]:
        """Those that lie in a segment which is whole: only then may the loose file go."""
        if not self.segments.holding(loose):
            return set()
        held: set[str] = set()
        for name in self.segments.names():
            if some := self.segments.holding(loose, [name]):
                self.segments.check(name)
                held |= some
        return held

    def drop(self, sha256s: Collection[str]) -> None:
        """Remove the loose files of records that a segment holds."""
        for sha256 in sha256s:
            discard(self.path_of(sha256))

    def _folders(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root) as entries:
                return [entry for entry in entries if PREFIX.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
