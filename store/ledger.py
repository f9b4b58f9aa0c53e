"""What has been made, measured and published: the store as everybody else sees it.

    ledger = Ledger(home)
    if ledger.weights_of(spec.id) is None: ...              # work that was never done
    ledger.record_artifact(spec, weights_sha256=..., built=built, blobs=[...], run_id=run_id)
    ledger.ingest()                                         # late, and never a reason to fail
    ledger.query("FROM leaderboard")

A `record_…` that has returned is on disk for good. Recording the same again does nothing.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import duckdb

from meteora.artifacts import ArtifactId, RoutingScore, Score, canonical_sha256, short
from store import check, garbage
from store.blobs import Blobs
from store.errors import BusyError, ConflictError, DamagedError, MissingBlobError, UnknownError
from store.events import RunEnded, RunStarted
from store.files import locked, sweep
from store.index import Index, Ingest
from store.lookup import Lookup
from store.query import Limits, ask, reading
from store.records import Record, Records, now

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from pathlib import Path

    from meteora.artifacts import Noun, Publication, Spec
    from store.check import Verification
    from store.events import AdapterVerdict, Failure
    from store.garbage import Garbage
    from store.query import Answer

WRITE_DEADLINE_SECONDS = 60.0
INGEST_DEADLINE_SECONDS = 10.0


class Ledger:
    """The store under one home folder. Local disk only; any number of processes at once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.records = Records(home / "records")
        self.blobs = Blobs(home / "blobs")
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
        record = self._lookup.first("artifact", artifact_id)
        return record.body["weights_sha256"] if record else None

    def built(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """The noun that came out, as its `to_dict`; None where there is none."""
        record = self._lookup.first("artifact", artifact_id)
        return record.body["built"] if record else None

    def spec_of(self, artifact_id: ArtifactId) -> dict[str, Any] | None:
        """What was asked for, as its `to_dict`; None where it was never made."""
        record = self._lookup.first("artifact", artifact_id)
        return record.body["spec"] if record else None

    def score_of(self, benchmark_id: ArtifactId) -> Score | None:
        record = self._lookup.first("score", benchmark_id)
        return Score.from_dict(record.body) if record else None

    def routing_of(self, router_id: ArtifactId) -> tuple[RoutingScore, ...]:
        """How the router routes; empty where that was never measured."""
        record = self._lookup.first("routing", router_id)
        counts = record.body["counts"] if record else ()
        return tuple(RoutingScore.from_dict(count) for count in counts)

    def unended_runs(self) -> list[RunStarted]:
        """Runs that began and whose end nobody has recorded: they run still, or were killed."""
        started = {record.subject: record for record in self._lookup.find("run-started")}
        ended = {record.subject for record in self._lookup.find("run-ended", list(started))}
        return [
            RunStarted.from_dict(record.body)
            for run_id, record in started.items()
            if run_id not in ended
        ]

    def resolve(self, prefix: str) -> ArtifactId:
        """The one artifact whose id, or whose digest, begins with `prefix`."""
        return self._lookup.artifact_id(prefix)

    def ingest(self, *, deadline_seconds: float = INGEST_DEADLINE_SECONDS) -> Ingest:
        """Bring the index up to date. Never raises: what cannot be ingested now waits."""
        return self.index.ingest(deadline_seconds=deadline_seconds)

    def rebuild(self, *, deadline_seconds: float = WRITE_DEADLINE_SECONDS) -> Ingest:
        """Make the index again from the records alone; the old one is set aside."""
        return self.index.rebuild(deadline_seconds=deadline_seconds)

    def pack(self) -> int:
        """Lay loose records into segments; return how many. Worth it from some thousands on."""
        return self.records.pack()

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

    def verify(self) -> Verification:
        """Read every record, blob and row against what it should be. Changes nothing."""
        return check.verify(self.home, self.records, self.blobs, self.index)

    def gc(self, *, remove: bool = False) -> Garbage:
        """List what nothing refers to; with `remove`, remove it. Refused while a run goes on.

        Raises:
            BusyError: a run goes on, whose blobs may not be recorded yet.
            DamagedError: a record cannot be read, so what it refers to is not known.
        """
        alone = _no_wait(self.home / "runs.lock", "a run is going on; sweep when it is done")
        with alone, locked(self.home / "records.lock", deadline_seconds=WRITE_DEADLINE_SECONDS):
            found = garbage.garbage(self.home, self.records, self.blobs)
            if remove:
                for path in (*map(self.blobs.path_of, found.blobs), *found.files):
                    path.unlink()
        return found

    @contextmanager
    def running(self, recipe_name: str) -> Generator[list[RunStarted], None, None]:
        """Hold what a run has to hold: its recipe's lock, and `gc` at bay.

        Yields the runs of this recipe that were killed; their ends have been recorded.

        Raises:
            BusyError: the recipe is being run by another process.
        """
        digest = canonical_sha256(recipe_name)[:16]
        alone = _no_wait(
            self.home / "locks" / f"recipe-{digest}.lock",
            f"{recipe_name} is being run by another process; wait for it, or stop it",
        )
        together = locked(
            self.home / "runs.lock", deadline_seconds=WRITE_DEADLINE_SECONDS, shared=True
        )
        with alone, together:
            killed = [run for run in self.unended_runs() if run.recipe_name == recipe_name]
            for run in killed:  # whoever holds a recipe's lock is its only run that is alive
                self.record_run(RunEnded(run.run_id, "killed", "its process ended without a word"))
            for root in (self.home, self.records.root, self.records.segments.root, self.blobs.root):
                sweep(root)
            yield killed

    def _require(self, ids: Iterable[str], *, of: str) -> None:
        needed = list(dict.fromkeys(ids))
        recorded = {record.subject for record in self._lookup.find("artifact", needed)}
        for artifact_id in needed:
            if artifact_id not in recorded:
                raise UnknownError(
                    f"{short(of)} refers to {artifact_id}, which is not recorded; record that first"
                )

    def _record_once(self, record: Record, must_agree: tuple[str, ...]) -> None:
        """Write the record, unless there is one; the two have to agree in some fields."""
        seen = self.records.loose()
        earlier = self._lookup.first(record.kind, record.subject)
        if earlier is None:
            with locked(self.home / "records.lock", deadline_seconds=WRITE_DEADLINE_SECONDS):
                unseen = self.records.loose() - seen
                earlier = self._lookup.first_among(unseen, record.kind, record.subject)
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


@contextmanager
def _no_wait(path: Path, sentence: str) -> Generator[None, None, None]:
    """Hold a lock that is free; where it is not, say so in words that fit."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, deadline_seconds=0))
        except BusyError as error:
            raise BusyError(f"{sentence} ({error})") from None
        yield
