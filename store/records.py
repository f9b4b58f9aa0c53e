"""The record: immutable facts, one event a file, under the SHA-256 of their bytes.

    records/ab/cdef….json     {"at", "blobs", "body", "kind", "run_id", "subject", "version"}

A fact is committed when its file has its name. Everything else in the store that looks like
knowledge is an index over these files and can be made again from them.
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
from store.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

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
        path = self.path_of(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(
                f"record {sha256[:12]} is gone from {self.root}; take it back from a backup"
            ) from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(
                f"{path}: its bytes do not hash to its name, so they have changed since they were"
                " written; take the file back from a backup, or move it away to go on without it"
            )
        return data

    def path_of(self, sha256: str) -> Path:
        return self.root / sha256[:2] / f"{sha256[2:]}.json"

    def sha256s(self) -> set[str]:
        """The names of all records: a listing of 256 folders, no file is opened."""
        names: set[str] = set()
        for folder in self._folders():
            with os.scandir(folder.path) as entries:
                names.update(
                    folder.name + entry.name[:62]
                    for entry in entries
                    if len(entry.name) == NAME_LENGTH and entry.name.endswith(".json")
                )
        return names

    def _folders(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root) as entries:
                return [entry for entry in entries if PREFIX.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
