"""Find single records, even if the index is missing, out of date, or damaged.

The index only names the records. Their contents are read from their files and compared with their
names. Records that are not in the index yet are few, and are all read.
"""

import logging
from collections.abc import Collection, Iterable
from typing import Any

from meteora.artifacts import (
    ArtifactId,
    BuiltBase,
    ComparisonBuild,
    Noun,
    PoolBuild,
    Publication,
    RouterBuild,
    RoutingBuild,
    Score,
    Spec,
    SpeedBuild,
    short,
)
from store.errors import UnknownError
from store.events import RunStarted
from store.index import Index
from store.records import Record, Records
from store.segments import SUFFIX

logger = logging.getLogger(__name__)

SPECS: dict[str, type[Noun]] = {spec.kind: spec for spec in Spec.__subclasses__()}
BUILDS: dict[str, type[Noun]] = {
    "base": BuiltBase,
    "comparison": ComparisonBuild,
    "pool": PoolBuild,
    "router": RouterBuild,
    "routing": RoutingBuild,
    "speed": SpeedBuild,
}
"""What `spec` and `built` of an artifact are read as, by its kind; a newer release has more."""
NOUNS: dict[str, type[Noun]] = {
    "score": Score,
    "publication": Publication,
    "run-started": RunStarted,
}
"""What the bodies of these kinds are read as."""


class Lookup:
    """Finds records by kind and subject."""

    def __init__(self, records: Records, index: Index) -> None:
        self._records = records
        self._index = index
        self._pending: dict[str, Record] = {}

    def first(self, kind: str, subject: str) -> Record | None:
        """The earliest record about this subject, the one that counts; None without any."""
        return next(iter(self.find(kind, [subject])), None)

    def find(self, kind: str, subjects: Collection[str] | None = None) -> list[Record]:
        """The records about these subjects, or about all, earliest first."""
        return [record for record, _ in self.find_read(kind, subjects)]

    def find_read(
        self, kind: str, subjects: Collection[str] | None = None
    ) -> list[tuple[Record, Any]]:
        """As `find`, each record with its noun; with its body if its kind is not in `NOUNS`."""
        if subjects is not None and not subjects:
            return []
        sql = "SELECT sha256 FROM records WHERE kind = $1"
        parameters: list[object] = [kind]
        if subjects is not None:
            sql += " AND subject IN (SELECT unnest($2::VARCHAR[]))"
            parameters.append(list(subjects))
        rows, records, segments = self._ask(sql, parameters)
        records |= self._read({sha256 for (sha256,) in rows} - records.keys())
        packed = self._records.segments.about(kind, subjects, segments)
        return _about(records | _parsed(packed), kind, subjects)

    def find_among(
        self, sha256s: Collection[str], kind: str, subjects: Collection[str]
    ) -> list[Record]:
        """Those of these records that are about these subjects, earliest first."""
        return [record for record, _ in _about(self._read(sha256s), kind, subjects)]

    def artifact_id(self, prefix: str) -> ArtifactId:
        """As `Recording.resolve`."""
        ids = self._ids_with_prefix(prefix) if prefix else []
        if len(ids) == 1:
            return ArtifactId(ids[0])
        if not ids:
            raise UnknownError(
                f"no artifact's id begins with {prefix!r}; `FROM artifacts` lists them all"
            )
        shown = ", ".join(short(artifact_id) for artifact_id in ids[:5])
        raise UnknownError(f"several ids begin with {prefix!r} ({shown}); give more digits")

    def _ids_with_prefix(self, prefix: str) -> list[str]:
        rows, loose, segments = self._ask(
            "SELECT DISTINCT id FROM artifacts WHERE starts_with(id, $1)"
            " OR starts_with(split_part(id, ':', 2), $1)",
            [prefix],
        )
        records = loose | _parsed(self._records.segments.about("artifact", None, segments))
        ids = {
            record.subject
            for record in records.values()
            if record.kind == "artifact"
            for part in (record.subject, record.subject.partition(":")[2])
            if part.startswith(prefix)
        }
        return sorted(ids.union(artifact_id for (artifact_id,) in rows))

    def _ask(
        self, sql: str, parameters: list[object]
    ) -> tuple[list[tuple], dict[str, Record], set[str]]:
        """Rows of the snapshot, and the loose records and segments that it lacks.

        If it cannot be read, it has no rows and lacks them all.
        """
        known = self._index.known()  # before the rows, since a newer snapshot only has more
        rows = None if known is None else self._index.select(sql, parameters)
        if known is None or rows is None:
            return [], *self._beside(frozenset())
        return rows, *self._beside(known)

    def _beside(self, known: frozenset[str]) -> tuple[dict[str, Record], set[str]]:
        """The loose records and the names of segments that are not among the known files."""
        missing = self._records.parts() - known
        segments = {name for name in missing if name.endswith(SUFFIX)}
        missing -= segments
        kept = {sha256: self._pending[sha256] for sha256 in missing & self._pending.keys()}
        self._pending = kept | self._read(missing - kept.keys())
        return dict(self._pending), segments

    def _read(self, sha256s: Iterable[str]) -> dict[str, Record]:
        texts, errors = self._records.read_all(sha256s)
        for error in errors.values():
            logger.warning("%s", error)
        return _parsed(texts)


def _parsed(texts: dict[str, bytes]) -> dict[str, Record]:
    return {sha256: Record.from_bytes(text) for sha256, text in texts.items()}


def _about(
    records: dict[str, Record], kind: str, subjects: Collection[str] | None
) -> list[tuple[Record, Any]]:
    wanted = None if subjects is None else set(subjects)
    matching = sorted(
        (record.at, sha256)
        for sha256, record in records.items()
        if record.kind == kind and (wanted is None or record.subject in wanted)
    )
    read = ((records[sha256], _noun_of(records[sha256])) for _, sha256 in matching)
    return [(record, noun) for record, noun in read if noun is not None]


def _noun_of(record: Record) -> Any:  # noqa: ANN401  (each kind has its own)
    """The noun, or the body if its kind has none; None for a forged record, which stops nothing."""
    try:
        if record.kind == "artifact":
            _check_artifact(record)
        return NOUNS[record.kind].from_dict(record.body) if record.kind in NOUNS else record.body
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("the %s of %r is left out: %r", record.kind, record.subject, error)
        return None


def _check_artifact(record: Record) -> None:
    """Read an artifact's record as its readers will; raises where it has another shape."""
    kind, body = record.subject.partition(":")[0], record.body
    if not isinstance(body["weights_sha256"], str):
        raise TypeError("weights_sha256 is no text")
    for noun, part in ((SPECS.get(kind), body["spec"]), (BUILDS.get(kind), body["built"])):
        if noun is not None and part is not None:
            noun.from_dict(part)
