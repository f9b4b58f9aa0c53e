"""Verify the store: compare files with their names, look for missing blobs, check the index."""

import os
import re
import tempfile
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from meteora.artifacts import file_sha256
from store.blobs import Blobs
from store.errors import DamagedError, StoreError
from store.files import copy, locked, partial_file
from store.garbage import freed
from store.index import Index
from store.query import memory, quoted
from store.records import Records
from store.segments import SUFFIX, Segments
from store.sharing import Sharing

NAMES = re.compile(r"[0-9a-f]{2}/[0-9a-f]{62}(\.json)?|packed/[0-9a-f]{64}\.parquet")
LOCK_SECONDS = 60.0
BATCH_RECORDS = 20_000
BOOKKEEPING = ("migrations", "read_files")
"""Tables about the index itself, which do not follow from the records."""


@dataclass(frozen=True)
class Finding:
    """One record, blob or file that is damaged, missing or foreign."""

    what: str
    """record, segment, blob, index, file, or shared (an object on the shared storage)."""
    name: str
    """SHA-256 of a record or a blob; a segment's name; otherwise a path in the home."""
    problem: str
    touches: tuple[str, ...] = ()
    """Ids of all artifacts and scores that depend on it, directly or not; sorted."""


@dataclass(frozen=True)
class Verification:
    """The result of `verify`."""

    num_records: int
    num_blobs: int
    findings: tuple[Finding, ...]


def verify(
    home: Path, records: Records, blobs: Blobs, index: Index, sharing: Sharing | None
) -> Verification:
    """Compare every record and blob with its name, and the index with the records.

    Works on a read-only home, too.

    Raises:
        UnreachableError: the shared storage does not answer.
    """
    lock = locked(index.lock, deadline_seconds=LOCK_SECONDS, shared=True)
    with lock, memory() as connection, _room(home) as room, partial_file(room) as fresh:
        # listed while nobody ingests: the index would have records that are not in the list
        names, present = records.parts(), sorted(blobs)
        segments = {name for name in names if name.endswith(SUFFIX)}
        connection.execute("CREATE TABLE named (blob VARCHAR, subject VARCHAR)")
        loose, bad_records = _check_loose(connection, records, sorted(names - segments))
        whole, bad_segments = _check_segments(connection, records.segments, segments)
        index.build(fresh, loose | whole, room=room)
        connection.execute(f"ATTACH {quoted(fresh)} AS fresh (READ_ONLY)")
        lost = _lost(connection, index)
        findings = (
            *(
                Finding("record", name, why, _dependants_of(connection, _subject(index, name)))
                for name, why in bad_records
            ),
            *(
                Finding("segment", name, why, _dependants_of(connection, [*lost.values()]))
                for name, why in bad_segments
            ),
            *(() if bad_segments else _check_files(connection, lost, dict(bad_records))),
            *_check_blobs(
                connection, blobs, sorted({*present, *blobs.survey(), *freed(home, blobs)})
            ),
            *_check_shared(connection, room, sharing),
            *_foreign_files(home, records.root, blobs.root),
            *_check_index(connection, index, loose | whole, room, lost),
        )
    num_records = len(names - segments) + records.segments.count()
    return Verification(num_records, len(present), findings)


@contextmanager
def _room(home: Path) -> Generator[Path]:
    """A folder for temporary copies: the home, if it is writable."""
    if os.access(home, os.W_OK):
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="meteora-") as folder:
        yield Path(folder)


def _check_loose(
    connection: duckdb.DuckDBPyConnection, records: Records, sha256s: list[str]
) -> tuple[set[str], list[tuple[str, str]]]:
    """The records that can be read, and the errors of the others; fills the table `named`."""
    readable: set[str] = set()
    damaged: list[tuple[str, str]] = []
    for start in range(0, len(sha256s), BATCH_RECORDS):
        part = sha256s[start : start + BATCH_RECORDS]
        texts, errors = records.read_all(part)
        readable.update(texts)
        connection.execute(
            "INSERT INTO named SELECT unnest((text->'blobs')::VARCHAR[]), text->>'subject'"
            " FROM (SELECT unnest($1::VARCHAR[]) AS text)",
            [[text.decode() for text in texts.values()]],
        )
        damaged += [(sha256, str(error)) for sha256, error in errors.items()]
    return readable, damaged


def _check_segments(
    connection: duckdb.DuckDBPyConnection, segments: Segments, names: Collection[str]
) -> tuple[set[str], list[tuple[str, str]]]:
    """The undamaged segments, and the errors of the others; fills the table `named`."""
    whole: set[str] = set()
    damaged = []
    for name in sorted(names):
        try:
            segments.check(name)
        except DamagedError as error:
            damaged.append((name, str(error)))
            continue
        connection.execute(
            "INSERT INTO named SELECT unnest((text->'blobs')::VARCHAR[]), subject"  # noqa: S608
            f" FROM read_parquet({quoted(segments.path_of(name))})"
        )
        whole.add(name)
    return whole, damaged


def _subject(index: Index, sha256: str) -> list[str]:
    """The subject of an unreadable record, from the snapshot."""
    rows = index.select("SELECT subject FROM records WHERE sha256 = ?", [sha256]) or []
    return [subject for (subject,) in rows]


def _lost(connection: duckdb.DuckDBPyConnection, index: Index) -> dict[str, str]:
    """The subjects of records that are in the snapshot and cannot be read, by their SHA-256."""
    known = index.select("SELECT sha256, subject FROM records ORDER BY sha256") or []
    readable = connection.execute("SELECT sha256 FROM fresh.records").fetchall()
    left = {sha256 for (sha256,) in readable}
    return {sha256: subject for sha256, subject in known if sha256 not in left}


def _check_files(
    connection: duckdb.DuckDBPyConnection, lost: dict[str, str], damaged: Collection[str]
) -> Iterator[Finding]:
    """The records that the index has, and no file."""
    gone = {sha256: subject for sha256, subject in lost.items() if sha256 not in damaged}
    if gone:
        first, *others = gone
        more = f", as are those of {len(others)} more" * bool(others)
        problem = f"its file is gone{more}; restore it from a backup: a rebuild forgets it"
        yield Finding("record", first, problem, _dependants_of(connection, [*gone.values()]))


def _check_blobs(
    connection: duckdb.DuckDBPyConnection, blobs: Blobs, present: list[str]
) -> Iterator[Finding]:
    for sha256 in blobs.verify():
        problem = "its bytes have changed since"
        yield Finding("blob", sha256, problem, _touched(connection, sha256))
    missing = connection.execute(
        "SELECT DISTINCT blob FROM named"
        " WHERE blob NOT IN (SELECT unnest($1::VARCHAR[])) ORDER BY blob",
        [present],
    ).fetchall()
    for (sha256,) in missing:
        problem = "a record refers to it, and it is missing"
        yield Finding("blob", sha256, problem, _touched(connection, sha256))


def _check_shared(
    connection: duckdb.DuckDBPyConnection, room: Path, sharing: Sharing | None
) -> Iterator[Finding]:
    """Compare every object on the shared storage with its name; no copy is kept."""
    if sharing is None:
        return
    remote = sharing.remote
    for name in sorted(remote.names("records") | remote.names("blobs")):
        with partial_file(room) as partial:
            downloaded_sha256 = remote.get(name, partial)
        digits = "".join(re.findall("[0-9a-f]+", name.partition("/")[2].partition(".")[0]))
        if downloaded_sha256 and not digits.endswith(downloaded_sha256):
            touched = _touched(connection, digits) if name.startswith("blobs/") else ()
            problem = f"its bytes on {remote.url} have changed since"
            yield Finding("shared", name, problem, touched)


def _touched(connection: duckdb.DuckDBPyConnection, blob: str) -> tuple[str, ...]:
    """Everything that depends on a blob: subjects that refer to it, and their dependants."""
    rows = connection.execute("SELECT subject FROM named WHERE blob = ?", [blob]).fetchall()
    return _dependants_of(connection, [subject for (subject,) in rows])


def _dependants_of(connection: duckdb.DuckDBPyConnection, subjects: list[str]) -> tuple[str, ...]:
    """These subjects, artifacts made from them, scores of these, and comparisons of the scores."""
    rows = connection.execute(
        """
        WITH direct AS (SELECT unnest($1::VARCHAR[]) AS id),
        made AS (
            FROM direct
            UNION SELECT descendant_id FROM fresh.ancestors SEMI JOIN direct ON ancestor_id = id
        ),
        found AS (
            FROM made
            UNION SELECT id FROM fresh.scores
            WHERE subject_id IN (FROM made) OR base_id IN (FROM made)
        )
        FROM found
        UNION SELECT comparison_id FROM fresh.comparisons
        WHERE score_id IN (FROM found) OR other_score_id IN (FROM found)
        ORDER BY ALL
        """,
        [subjects],
    ).fetchall()
    return tuple(touched for (touched,) in rows)


def _foreign_files(home: Path, *roots: Path) -> Iterator[Finding]:
    """Files in the store's folders that the store did not write, and pipes in their place."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            ours = NAMES.fullmatch(name.as_posix()) or "tmp" in name.parts
            if not path.is_dir() and not (ours and path.is_file()):
                yield Finding("file", str(path.relative_to(home)), "it does not belong here")


def _check_index(
    connection: duckdb.DuckDBPyConnection,
    index: Index,
    names: Collection[str],
    room: Path,
    lost: Collection[str],
) -> Iterator[Finding]:
    """Compare the database files, row by row, with an index that is newly made from the records.

    A copy of each file is brought up to date first, as the next ingest would do. If it has records
    that are lost, it differs by them, and a rebuild would forget them: it is only read.
    """
    paths = [path for path in (index.live, index.snapshot) if path.exists()]
    if len({file_sha256(path) for path in paths}) < len(paths):
        paths = paths[:1]  # the snapshot is an exact copy
    for path in paths:
        try:
            with partial_file(room) as held:
                copy(path, held)
                index.build(held, names, room=room)
                for table in () if lost else _differing_tables(connection, held):
                    problem = f"table {table} differs from the records; rebuild"
                    yield Finding("index", path.name, problem)
        except (duckdb.Error, StoreError) as error:
            yield Finding("index", path.name, f"cannot be read: {error}; rebuild")


def _differing_tables(connection: duckdb.DuckDBPyConnection, database: Path) -> list[str]:
    connection.execute(f"ATTACH {quoted(database)} AS held (READ_ONLY)")
    try:
        tables = connection.execute(
            "SELECT DISTINCT table_name FROM duckdb_tables()"
            " WHERE database_name IN ('held', 'fresh') AND NOT list_contains($1, table_name)"
            " ORDER BY ALL",
            [BOOKKEEPING],
        ).fetchall()
        sums = "SELECT count(*), bit_xor(hash(t)), sum(hash(t)) FROM {}.{} t"
        differing = [
            table
            for (table,) in tables
            if connection.execute(sums.format("held", table)).fetchone()
            != connection.execute(sums.format("fresh", table)).fetchone()
        ]
        return ["records"] if "records" in differing else differing
    finally:
        connection.execute("DETACH held")
