"""What has been made, measured and published: the store as everybody else sees it.

    ledger = Ledger(home)
    if ledger.weights_of(spec.id) is None: ...              # work that was never done
    ledger.record_artifact(spec, weights_sha256=..., built=built, blobs=[...], run_id=run_id)
    ledger.ingest()                                         # late, and never a reason to fail
    ledger.query("FROM leaderboard")

A `record_…` that has returned is on disk for good. Recording the same again does nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import duckdb

from meteora.artifacts import ArtifactId, RoutingScore, Score, short
from store.blobs import Blobs
from store.errors import ConflictError, DamagedError, MissingBlobError, StoreError, UnknownError
from store.events import RunStarted
from store.files import locked
from store.index import Index, Ingest, logger
from store.query import Answer, Limits, ask, reading
from store.records import Record, Records, now

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Sequence
    from pathlib import Path

    from meteora.artifacts import Noun, Publication, Spec
    from store.events import AdapterVerdict, Failure, RunEnded

WRITE_DEADLINE_SECONDS = 60.0
INGEST_DEADLINE_SECONDS = 10.0


class Ledger:
    """The store under one home folder. Local disk only; any number of processes at once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.records = Records(home / "records")
        self.blobs = Blobs(home / "blobs")
        self.index = Index(home, self.records)
        self._pending: dict[str, Record] = {}

    def record_artifact(
        self,
        spec: Spec,
        *,
        weights_sha256: str,
        run_id: str,
        built: Noun | None = None,
        blobs: Sequence[str] = (),
    ) -> ArtifactId:
        """Record that `spec` was made; its parents have to be recorded before it.

        Raises:
            ConflictError: it is recorded already, with other weights.
            UnknownError: one of its parents is not recorded.
            MissingBlobError: one of `blobs` does not lie in the store.
        """
        self._require(spec.parents, of=spec.id)
        body = {
            "id": spec.id,
            "kind": spec.kind,
            "spec": spec.to_dict(),
            "parents": list(spec.parents),
            "weights_sha256": weights_sha256,
            "built": built.to_dict() if built else None,
        }
        self._record_once(
            Record("artifact", spec.id, body, run_id, now(), tuple(blobs)), ("weights_sha256",)
        )
        return spec.id

    def record_score(self, score: Score, *, run_id: str) -> ArtifactId:
        """Record a measurement; its outputs have to be a blob, its subject an artifact."""
        self._require((score.spec.subject_id, score.spec.base_id), of=score.spec.id)
        body = {"id": score.spec.id, **score.to_dict()}
        self._record_once(
            Record("score", score.spec.id, body, run_id, now(), (score.outputs_sha256,)),
            ("value", "num_samples"),
        )
        return score.spec.id

    def record_routing(self, scores: Sequence[RoutingScore], *, run_id: str) -> None:
        """Record how one router routes; all of it at once."""
        router_ids = {score.router_id for score in scores}
        if len(router_ids) != 1:
            raise ValueError(f"the routing of one router is needed, not of {len(router_ids)}")
        (router_id,) = router_ids
        self._require((router_id,), of="its routing")
        body = {"counts": [score.to_dict() for score in scores]}
        self._record_once(Record("routing", router_id, body, run_id, now()), ("counts",))

    def record_adapter(self, verdict: AdapterVerdict, *, run_id: str) -> None:
        """Record what was decided about an adapter, each time that it is seen."""
        subject = "/".join(filter(None, (verdict.repo_id, verdict.subfolder)))
        self._write(
            Record("adapter", f"{subject}@{verdict.revision}", verdict.to_dict(), run_id, now())
        )

    def record_run(self, event: RunStarted | RunEnded) -> None:
        """Record that a run began or ended. The first end that is recorded stands."""
        body = event.to_dict()
        if isinstance(event, RunStarted):
            kind = "run-started"
        else:
            kind = "run-ended"
            body["stages"] = [
                {"stage": stage, "wall_seconds": seconds}
                for stage, seconds in body.pop("stage_seconds").items()
            ]
        self._record_once(Record(kind, event.run_id, body, event.run_id, now()), ())

    def record_publication(self, publication: Publication, *, run_id: str) -> None:
        self._require((publication.artifact_id,), of=f"its publication at {publication.repo_id}")
        where = f"{publication.artifact_id} at {publication.repo_id}@{publication.revision}"
        self._record_once(Record("publication", where, publication.to_dict(), run_id, now()), ())

    def record_failure(self, failure: Failure, *, run_id: str) -> None:
        self._write(Record("failure", failure.subject, failure.to_dict(), run_id, now()))

    def weights_of(self, artifact_id: ArtifactId) -> str | None:
        """SHA-256 of the artifact's bytes ("" where it has none); None where it was never made."""
        record = self._first("artifact", artifact_id)
        return record.body["weights_sha256"] if record else None

    def built(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """The noun that came out, as its `to_dict`; None where there is none."""
        record = self._first("artifact", artifact_id)
        return record.body["built"] if record else None

    def spec_of(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """What was asked for, as its `to_dict`; None where it was never made."""
        record = self._first("artifact", artifact_id)
        return record.body["spec"] if record else None

    def score_of(self, benchmark_id: ArtifactId) -> Score | None:
        record = self._first("score", benchmark_id)
        return Score.from_dict(record.body) if record else None

    def routing_of(self, router_id: ArtifactId) -> tuple[RoutingScore, ...]:
        """How the router routes; empty where that was never measured."""
        record = self._first("routing", router_id)
        counts = record.body["counts"] if record else ()
        return tuple(RoutingScore.from_dict(count) for count in counts)

    def unended_runs(self) -> list[RunStarted]:
        """Runs that began and whose end nobody has recorded: they run still, or were killed."""
        started = {record.subject: record for record in self._find("run-started")}
        ended = {record.subject for record in self._find("run-ended", list(started))}
        return [
            RunStarted.from_dict(record.body)
            for run_id, record in started.items()
            if run_id not in ended
        ]

    def resolve(self, prefix: str) -> ArtifactId:
        """The artifact whose id, or whose digest, begins with `prefix`."""
        ids = self._ids_with_prefix(prefix) if prefix else []
        if len(ids) == 1:
            return ArtifactId(ids[0])
        if not ids:
            raise UnknownError(
                f"no artifact's id begins with {prefix!r}; `FROM artifacts` lists them all"
            )
        some = ", ".join(short(artifact_id) for artifact_id in ids[:5])
        raise UnknownError(f"several ids begin with {prefix!r} ({some}); give more digits")

    def ingest(self, *, deadline_seconds: float = INGEST_DEADLINE_SECONDS) -> Ingest:
        """Bring the index up to date. Never raises: what cannot be ingested now waits."""
        return self.index.ingest(deadline_seconds=deadline_seconds)

    def rebuild(self, *, deadline_seconds: float = WRITE_DEADLINE_SECONDS) -> Ingest:
        """Make the index again from the records alone; the old one is set aside."""
        return self.index.rebuild(deadline_seconds=deadline_seconds)

    def query(self, sql: str, *, limits: Limits | None = None, live: bool = False) -> Answer:
        """Answer one SELECT from the snapshot, or, with `live`, from the index itself."""
        limits = limits or Limits()
        if self.index.known() is None:
            self.ingest()
        try:
            with self._opened(limits, live=live) as connection:
                return ask(connection, sql, limits)
        except duckdb.Error as error:
            raise DamagedError(
                f"the index under {self.home} cannot be read ({error}); rebuild it from the records"
            ) from None

    @contextmanager
    def _opened(
        self, limits: Limits, *, live: bool
    ) -> Generator[duckdb.DuckDBPyConnection, None, None]:
        if not live:
            with reading(self.index.snapshot, limits) as connection:
                yield connection
            return
        lock = locked(self.index.lock, deadline_seconds=INGEST_DEADLINE_SECONDS, shared=True)
        with lock, reading(self.index.live, limits) as connection:
            yield connection

    def _require(self, ids: Iterable[str], *, of: str) -> None:
        needed = list(dict.fromkeys(ids))
        recorded = {record.subject for record in self._find("artifact", needed)}
        for artifact_id in needed:
            if artifact_id not in recorded:
                raise UnknownError(
                    f"{short(of)} refers to {artifact_id}, which is not recorded; record that first"
                )

    def _record_once(self, record: Record, must_agree: tuple[str, ...]) -> None:
        """Write the record, unless there is one; the two have to agree in some fields."""
        with locked(self.home / "records.lock", deadline_seconds=WRITE_DEADLINE_SECONDS):
            earlier = self._first(record.kind, record.subject)
            if earlier is None:
                self._write(record)
                return
        for name in must_agree:
            was, is_now = earlier.body[name], record.body[name]
            if was != is_now:
                raise ConflictError(
                    f"{record.subject} is recorded by run {earlier.run_id} with {name} {was}, and"
                    f" would now be {is_now}; ask differently (another seed), or find out which one"
                    " is right"
                )

    def _write(self, record: Record) -> None:
        for sha256 in record.blobs:
            if sha256 not in self.blobs:
                raise MissingBlobError(
                    f"{record.kind} {short(record.subject)} names blob {sha256}, which is not in"
                    " the store; put it there first"
                )
        self.records.write(record)

    def _first(self, kind: str, subject: str) -> Record | None:
        return next(iter(self._find(kind, [subject])), None)

    def _find(self, kind: str, subjects: Collection[str] | None = None) -> list[Record]:
        """The records of these subjects, or of all, earliest first, ingested or not."""
        found = self._unindexed()
        if self.index.known() is not None:
            sql = "SELECT sha256 FROM records WHERE kind = $1"
            parameters: list[object] = [kind]
            if subjects is not None:
                sql += " AND subject IN (SELECT unnest($2::VARCHAR[]))"
                parameters.append(list(subjects))
            rows = self.index.select(sql, parameters)
            names = self.records.sha256s() if rows is None else {sha256 for (sha256,) in rows}
            found |= self._read(names - found.keys())
        matching = (
            (record.at, sha256, record)
            for sha256, record in found.items()
            if record.kind == kind and (subjects is None or record.subject in subjects)
        )
        return [record for _, _, record in sorted(matching, key=lambda match: match[:2])]

    def _ids_with_prefix(self, prefix: str) -> list[str]:
        rows = self.index.select(
            "SELECT DISTINCT id FROM artifacts WHERE starts_with(id, $1)"
            " OR starts_with(split_part(id, ':', 2), $1)",
            [prefix],
        )
        records = self._unindexed() if rows is not None else self._read(self.records.sha256s())
        ids = {
            record.subject
            for record in records.values()
            if record.kind == "artifact"
            and (
                record.subject.startswith(prefix)
                or record.subject.partition(":")[2].startswith(prefix)
            )
        }
        return sorted(ids.union(artifact_id for (artifact_id,) in rows or ()))

    def _unindexed(self) -> dict[str, Record]:
        """Records that the snapshot does not hold: a few, unless there is no snapshot."""
        names = self.records.sha256s()
        missing = names - (self.index.known() or frozenset())
        kept = {sha256: self._pending[sha256] for sha256 in missing & self._pending.keys()}
        self._pending = kept | self._read(missing - kept.keys())
        return dict(self._pending)

    def _read(self, sha256s: Iterable[str]) -> dict[str, Record]:
        records = {}
        for sha256 in sha256s:
            try:
                records[sha256] = self.records.read(sha256)
            except DamagedError as error:
                logger.warning("%s", error)
        return records


__all__ = ["Answer", "Ingest", "Ledger", "Limits", "StoreError"]
