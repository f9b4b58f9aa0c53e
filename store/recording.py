"""Write facts, and look single facts up.

A fact is on disk when `record_…` returns. Recording it again does nothing.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from meteora.artifacts import (
    AdapterSpec,
    ArtifactId,
    Noun,
    Publication,
    RoutingScore,
    Score,
    Spec,
    short,
)
from store.blobs import Blobs
from store.errors import ConflictError, MissingBlobError, StoreError, UnknownError
from store.events import AdapterVerdict, Failure, RunEnded, RunStarted
from store.files import locked
from store.index import Index
from store.lookup import Lookup
from store.records import Record, Records, now
from store.remote import Remote
from store.sharing import Setting, Sharing

WRITE_DEADLINE_SECONDS = 60.0
"""Time that a writer waits for the lock of another one."""
Built = TypeVar("Built", bound=Noun)


class Recording:
    """The part of a `Ledger` that writes facts and finds single ones.

    Raises:
        StoreError: `home` has a name that DuckDB cannot open, or a damaged `store.toml`.
    """

    def __init__(self, home: Path) -> None:
        _require_openable(home)
        self.home = home
        setting = Setting.load(home)
        remote = Remote(setting.remote) if setting.remote else None
        self.name = setting.name
        self.records = Records(home / "records")
        self.blobs = Blobs(home / "blobs", remote)
        self.sharing = Sharing(self.records, self.blobs, remote) if remote else None
        self.index = Index(home, self.records)
        self._lookup = Lookup(self.records, self.index)

    def record_artifact(
        self,
        spec: Spec,
        *,
        weights_sha256: str,
        run_id: str,
        built: Noun | None = None,
        blobs: Sequence[str] = (),
    ) -> ArtifactId:
        """Record that `spec` was made; its parents have to be recorded first.

        Raises:
            ConflictError: it is already recorded with other weights.
            UnknownError: one of its parents is not recorded.
            MissingBlobError: one of `blobs` is not in the store.
        """
        self._require(spec.parents, of=spec.id)
        record = _record_of(spec, weights_sha256, run_id, built, tuple(blobs))
        self._record_once([record], ("weights_sha256",))
        return spec.id

    def record_adapters(self, specs: Iterable[AdapterSpec], *, run_id: str) -> None:
        """Record the adapters of a run, with one lookup for all; raises as `record_artifact`."""
        records = [_record_of(spec, spec.weights_sha256, run_id) for spec in specs]
        self._record_once(records, ("weights_sha256",))

    def record_score(self, score: Score, *, run_id: str) -> None:
        """Record a measurement; its subject and base have to be recorded first.

        Raises:
            ConflictError: it is already recorded with another value.
            UnknownError: its subject or base is not recorded.
            MissingBlobError: its outputs are not in the store.
        """
        self._require((score.spec.subject_id, score.spec.base_id), of=score.spec.id)
        body = {"id": score.spec.id, **score.to_dict()}
        self._record_once(
            [Record("score", score.spec.id, body, run_id, now(), (score.outputs_sha256,))],
            ("value", "num_samples"),
        )

    def record_routing(self, scores: Sequence[RoutingScore], *, run_id: str) -> None:
        """Record all routing counts of one router, in one call; only the latest ones count.

        Raises:
            UnknownError: the router is not recorded.
        """
        (router_id,) = {score.router_id for score in scores}
        self._require((router_id,), of="its routing")
        body = {"counts": [score.to_dict() for score in scores]}
        earlier = self._lookup.find("routing", [router_id])
        if not earlier or earlier[-1].body != body:
            self._write(Record("routing", router_id, body, run_id, now()))

    def record_adapter(self, verdict: AdapterVerdict, *, run_id: str) -> None:
        """Record the verdict on an adapter; every call writes a new record."""
        subject = "/".join(filter(None, (verdict.repo_id, verdict.subfolder)))
        self._write(
            Record("adapter", f"{subject}@{verdict.revision}", verdict.to_dict(), run_id, now())
        )

    def record_run(self, event: RunStarted | RunEnded) -> None:
        """Record that a run began or ended. Only the first recorded end of a run counts."""
        body = event.to_dict()
        if isinstance(event, RunStarted):
            kind, body["home"] = "run-started", self.name
        else:
            kind = "run-ended"
            body["stages"] = [
                {"stage": stage, "wall_seconds": seconds}
                for stage, seconds in body.pop("stage_seconds").items()
            ]
        self._record_once([Record(kind, event.run_id, body, event.run_id, now())], ())

    def record_publication(self, publication: Publication, *, run_id: str) -> None:
        """Record that an artifact is published, unless the latest record says the same of it.

        Raises:
            UnknownError: the artifact is not recorded.
        """
        self._require((publication.artifact_id,), of=f"its publication at {publication.repo_id}")
        where = f"{publication.artifact_id} at {publication.repo_id}@{publication.revision}"
        earlier = self._lookup.find_read("publication", [where])
        if not earlier or earlier[-1][1] != publication:
            self._write(Record("publication", where, publication.to_dict(), run_id, now()))

    def record_failure(self, failure: Failure, *, run_id: str) -> None:
        """Record a refusal or an error; every call writes a new record."""
        self._write(Record("failure", failure.subject, failure.to_dict(), run_id, now()))

    def weights_of(self, artifact_id: ArtifactId) -> str | None:
        """SHA-256 of the artifact's bytes, "" if it has none; None if it is not recorded."""
        record = self._lookup.first("artifact", artifact_id)
        return record.body["weights_sha256"] if record else None

    def blobs_of(self, artifact_id: ArtifactId) -> tuple[str, ...]:
        """SHA-256 of each of the artifact's blobs; empty if it has none, or is not recorded."""
        record = self._lookup.first("artifact", artifact_id)
        return record.blobs if record else ()

    def run_of(self, artifact_id: ArtifactId) -> str | None:
        """The run that made the artifact; None if it is not recorded."""
        record = self._lookup.first("artifact", artifact_id)
        return record.run_id if record else None

    def built(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """The noun that was built, as its `to_dict`; None if there is none."""
        record = self._lookup.first("artifact", artifact_id)
        return record.body["built"] if record else None

    def built_as(self, noun: type[Built], artifact_id: ArtifactId) -> Built | None:
        """The noun that was built; None if there is none."""
        body = self.built(artifact_id)
        return None if body is None else noun.from_dict(body)

    def spec_of(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """The spec of an artifact, as its `to_dict`; None if it is not recorded."""
        record = self._lookup.first("artifact", artifact_id)
        return record.body["spec"] if record else None

    def specs_of(self, ids: Iterable[ArtifactId] | None = None) -> dict[str, dict[str, Any]]:
        """The specs of the recorded ones of these artifacts, or of all, by id; in one lookup."""
        records = _earliest(self._lookup.find("artifact", None if ids is None else list(ids)))
        return {subject: record.body["spec"] for subject, record in records.items()}

    def scores_of(self, benchmark_ids: Iterable[ArtifactId]) -> dict[str, Score]:
        """The recorded scores among these ids, by id; one lookup for all of them."""
        found = self._lookup.find_read("score", list(benchmark_ids))
        return {record.subject: score for record, score in reversed(found)}  # the earliest stays

    def publications(self, repo_id: str) -> list[Publication]:
        """All recorded publications at a repository, earliest first."""
        found = self._lookup.find_read("publication")
        return [publication for _, publication in found if publication.repo_id == repo_id]

    def unended_runs(self) -> list[RunStarted]:
        """Runs that have a recorded start and no recorded end: still running, or killed."""
        started = {record.subject: run for record, run in self._lookup.find_read("run-started")}
        ended = {record.subject for record in self._lookup.find("run-ended", list(started))}
        return [run for run_id, run in started.items() if run_id not in ended]

    def resolve(self, prefix: str) -> ArtifactId:
        """The one artifact whose id, or whose digest, begins with `prefix`.

        Raises:
            UnknownError: there is none, or there are several.
        """
        return self._lookup.artifact_id(prefix)

    def _require(self, ids: Iterable[str], *, of: str) -> None:
        needed = list(dict.fromkeys(ids))
        recorded = {record.subject for record in self._lookup.find("artifact", needed)}
        for artifact_id in needed:
            if artifact_id not in recorded:
                raise UnknownError(
                    f"{short(of)} refers to {artifact_id}, which is not recorded; record it first"
                )

    def _record_once(self, records: Sequence[Record], must_agree: tuple[str, ...]) -> None:
        """Write records of one kind, but not about subjects that have one.

        An earlier record must agree in these fields. All are looked up together, since each lookup
        lists the whole store.
        """
        if not records:
            return
        kind, wanted = records[0].kind, {record.subject: record for record in records}
        seen = self.records.loose()
        earlier = _earliest(self._lookup.find(kind, wanted))
        if left := wanted.keys() - earlier.keys():
            with locked(self.home / "records.lock", deadline_seconds=WRITE_DEADLINE_SECONDS):
                since = self.records.loose() - seen
                earlier |= _earliest(self._lookup.find_among(since, kind, left))
                fresh = [record for subject, record in wanted.items() if subject not in earlier]
                names = [self._keep(record) for record in fresh]
            self._push(names)  # others need not wait for the network
        for subject, before in earlier.items():
            _require_agreement(before, wanted[subject], must_agree)

    def _write(self, record: Record) -> None:
        self._push([self._keep(record)])

    def _keep(self, record: Record) -> str:
        """Write a record to disk; return its SHA-256."""
        for sha256 in record.blobs:
            if sha256 not in self.blobs:
                raise MissingBlobError(
                    f"{record.kind} {short(record.subject)} names blob {sha256}, which is not in"
                    " the store; put it there first"
                )
        return self.records.write(record)

    def _push(self, sha256s: Iterable[str]) -> None:
        if self.sharing:
            for sha256 in sha256s:
                self.sharing.push(sha256)


def _require_openable(home: Path) -> None:
    if re.search(r"[?\\\ud800-\udfff]", str(home)):  # lone surrogates: no UTF-8
        raise StoreError(
            f"{str(home)!r} cannot be a home: DuckDB, which keeps its index, opens no path with ?,"
            " with \\, or with bytes that are not UTF-8; choose another folder with --home or"
            " METEORA_HOME"
        )


def _earliest(records: Sequence[Record]) -> dict[str, Record]:
    """The first of these records about each subject, by subject."""
    return {record.subject: record for record in reversed(records)}


def _record_of(
    spec: Spec,
    weights_sha256: str,
    run_id: str,
    built: Noun | None = None,
    blobs: tuple[str, ...] = (),
) -> Record:
    body = {
        "id": spec.id,
        "kind": spec.kind,
        "spec": spec.to_dict(),
        "parents": list(spec.parents),
        "weights_sha256": weights_sha256,
        "built": built.to_dict() if built else None,
    }
    return Record("artifact", spec.id, body, run_id, now(), blobs)


def _require_agreement(earlier: Record, record: Record, fields: tuple[str, ...]) -> None:
    for name in fields:
        was, is_now = earlier.body[name], record.body[name]
        if was != is_now:
            raise ConflictError(
                f"{record.subject} is recorded by run {earlier.run_id} with {name}"
                f" {was!s:.200}; now it is {is_now!s:.200}. Another number of threads, machine or"
                " version of a library can make this difference: repeat it as that run did, or"
                " change the spec (another seed) to record both"
            )
