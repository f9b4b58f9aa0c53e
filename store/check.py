"""Whether everything is as it was written, and what nothing refers to any more."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from store.errors import DamagedError
from store.files import STALE_SECONDS, leftovers, locked, partial_file
from store.query import memory, quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from store.blobs import Blobs
    from store.index import Index
    from store.records import Record, Records

NAMES = re.compile(r"[0-9a-f]{2}/[0-9a-f]{62}(\.json)?")
LOCK_SECONDS = 60.0
SHA256_IN_TEXT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written."""

    what: str
    """record, blob, index or file."""
    name: str
    """SHA-256 of a record or a blob; a path, relative to the home, of anything else."""
    problem: str
    touches: tuple[str, ...] = ()
    """Ids of what rests on it, directly or through what was made from it; sorted."""


@dataclass(frozen=True)
class Verification:
    num_records: int
    num_blobs: int
    num_waiting: int
    """Records that are not in the index yet, which is no fault."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Garbage:
    """Files that nothing refers to; whether they were removed is for the caller to know."""

    blobs: tuple[str, ...]
    files: tuple[Path, ...]
    """Leftovers of killed writers, and databases that were set aside."""
    num_bytes: int


def verify(home: Path, records: Records, blobs: Blobs, index: Index) -> Verification:
    """Read every record and every blob against its name, and the index against the records."""
    names, present = records.sha256s(), sorted(blobs)
    readable, damaged = _read_all(records, index, sorted(names))
    findings = (
        *damaged,
        *_check_blobs(blobs, present, readable.values()),
        *_foreign_files(home, records.root, blobs.root),
        *_check_index(index, set(readable)),
    )
    waiting = names - (index.known() or frozenset())
    return Verification(len(names), len(present), len(waiting), findings)


def _read_all(
    records: Records, index: Index, names: list[str]
) -> tuple[dict[str, Record], list[Finding]]:
    readable: dict[str, Record] = {}
    findings = []
    for sha256 in names:
        try:
            readable[sha256] = records.read(sha256)
        except DamagedError as error:
            subjects = index.select("SELECT subject FROM records WHERE sha256 = ?", [sha256]) or []
            touched = tuple(subject for (subject,) in subjects)
            findings.append(Finding("record", sha256, str(error), touched))
    return readable, findings


def _check_blobs(
    blobs: Blobs, present: list[str], records: Collection[Record]
) -> Iterator[Finding]:
    touched = _Touched(records)
    for sha256 in blobs.verify():
        yield Finding("blob", sha256, "its bytes have changed since", touched.by(sha256))
    named = {sha256 for record in records for sha256 in record.blobs}
    for sha256 in sorted(named.difference(present)):
        problem = "it is named by a record and is not there"
        yield Finding("blob", sha256, problem, touched.by(sha256))


class _Touched:
    """What rests on a blob: what names it, and what was made from that or measured on it."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._direct: dict[str, set[str]] = defaultdict(set)
        self._children: dict[str, set[str]] = defaultdict(set)
        for record in records:
            for sha256 in {*record.blobs, record.body.get("weights_sha256", "")}:
                self._direct[sha256].add(record.subject)
            for parent in record.body.get("parents", ()):
                self._children[parent].add(record.subject)
            if record.kind == "score":
                self._children[record.body["spec"]["subject_id"]].add(record.subject)

    def by(self, sha256: str) -> tuple[str, ...]:
        found, frontier = set[str](), set(self._direct[sha256])
        while frontier:
            found |= frontier
            frontier = {child for one in frontier for child in self._children[one]} - found
        return tuple(sorted(found))


def _foreign_files(home: Path, *roots: Path) -> Iterator[Finding]:
    for root in roots:
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            ours = NAMES.fullmatch(name.as_posix()) or name.parts[0] == "tmp"
            if path.is_file() and not ours:
                yield Finding("file", str(path.relative_to(home)), "it does not belong here")


def _check_index(index: Index, readable: set[str]) -> list[Finding]:
    """Compare both database files, row by row, with one made from the same records just now."""
    findings = []
    lock = locked(index.lock, deadline_seconds=LOCK_SECONDS, shared=True)
    with lock, partial_file(index.home) as fresh:
        for path in filter(Path.exists, (index.live, index.snapshot)):
            try:
                findings += [
                    Finding("index", path.name, f"table {table} differs from the records; rebuild")
                    for table in _differing_tables(index, path, fresh, readable)
                ]
            except duckdb.Error as error:
                findings.append(Finding("index", path.name, f"cannot be read: {error}; rebuild"))
    return findings


def _differing_tables(index: Index, path: Path, fresh: Path, readable: set[str]) -> list[str]:
    with memory() as connection:
        connection.execute(f"ATTACH {quoted(path)} AS held (READ_ONLY)")
        held = _sha256s(connection, "held")
        index.build(fresh, held & readable)
        connection.execute(f"ATTACH {quoted(fresh)} AS fresh (READ_ONLY)")
        if _sha256s(connection, "fresh") != held:
            return ["records"]
        tables = connection.execute(
            "SELECT table_name FROM duckdb_tables() WHERE database_name = 'held' ORDER BY ALL"
        ).fetchall()
        sums = "SELECT count(*), bit_xor(hash(t)), sum(hash(t)) FROM {}.{} t"
        return [
            table
            for (table,) in tables
            if connection.execute(sums.format("held", table)).fetchone()
            != connection.execute(sums.format("fresh", table)).fetchone()
        ]


def _sha256s(connection: duckdb.DuckDBPyConnection, database: str) -> set[str]:
    rows = connection.execute(
        f"SELECT sha256 FROM {database}.records UNION ALL SELECT sha256 FROM {database}.rejected"  # noqa: S608
    ).fetchall()
    return {sha256 for (sha256,) in rows}


def garbage(home: Path, records: Records, blobs: Blobs) -> Garbage:
    """What no record's text mentions, and what killed writers left; all of it an hour old."""
    mentioned: set[str] = set()
    for sha256 in records.sha256s():
        mentioned.update(
            match.decode() for match in SHA256_IN_TEXT.findall(records.read_bytes(sha256))
        )
    oldest = time.time() - STALE_SECONDS
    unused = [
        sha256
        for sha256 in blobs
        if sha256 not in mentioned and blobs.path_of(sha256).stat().st_mtime < oldest
    ]
    aside = [*home.glob("ledger.damaged-*"), *home.glob("ledger.rebuilt-*")]
    files = [path for path in aside if path.stat().st_mtime < oldest]
    for root in (home, records.root, blobs.root):
        files += leftovers(root)
    sizes = [path.stat().st_size for path in (*map(blobs.path_of, unused), *files)]
    return Garbage(tuple(unused), tuple(files), sum(sizes))
