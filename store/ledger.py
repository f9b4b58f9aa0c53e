"""The interface of the store: record and look up what was made, measured and published.

    ledger = Ledger(home)
    if ledger.weights_of(spec.id) is None: ...              # not made yet
    ledger.record_artifact(spec, weights_sha256=..., built=built, blobs=[...], run_id=run_id)
    ledger.ingest()                                         # never raises
    ledger.query("FROM leaderboard")

`recording` writes facts and looks up single ones. This file adds the index and its upkeep.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import duckdb

from meteora.artifacts import SHA256, ArtifactId, Score, canonical_sha256
from store import check
from store.check import Verification
from store.errors import DamagedError, StoreError, brief
from store.events import RunEnded, RunStarted
from store.files import discard, locked, sweep
from store.garbage import Removable, find_garbage, note_freed
from store.index import Ingest
from store.query import LIMITS, Answer, Limits, ask
from store.recording import WRITE_DEADLINE_SECONDS, Recording
from store.records import now

logger = logging.getLogger(__name__)

INGEST_DEADLINE_SECONDS = 10.0
"""Time that an ingest waits for another one."""
CLOCK_SECONDS = 60
"""Between two machines' clocks such a difference is not mentioned."""
KILLED = "its process ended without a word"
IS_RUNNING = "a run is going on; try again when it is done"
PACK_RECORDS = 20_000
"""If there are so many loose records, the next run packs them before it begins."""


class Ledger(Recording):
    """The store in one home folder, on a local disk. Any number of processes may use it at once.

    With a `store.toml` the home shares its records and blobs with other homes (`sharing`).
    """

    def ingest(
        self, *, deadline_seconds: float = INGEST_DEADLINE_SECONDS, restore: bool = False
    ) -> Ingest:
        """Exchange records with the shared storage, if any, and bring the index up to date.

        Never raises: the next ingest tries again. The result has the reason if one did not work.
        With `restore` it also uploads the blobs of this home that the storage has lost.
        """
        unshared = ""
        try:
            if self.sharing:
                self.sharing.sync(restore=restore)
        except StoreError as error:
            logger.warning("%s", error)
            unshared = str(error)
        outcome = self.index.ingest(deadline_seconds=deadline_seconds)
        return replace(outcome, reason=outcome.reason or unshared)

    def rebuild(self) -> Ingest:
        """Make the index again from the records alone, and set the old one aside.

        It stays if none can be made now, which is a `StoreError`.
        """
        return self.index.rebuild(deadline_seconds=WRITE_DEADLINE_SECONDS)

    def pack(self) -> int:
        """Move loose records into segments; return their number. Useful with thousands of records.

        Raises:
            UnreachableError: the shared storage does not answer; nothing is lost.
        """
        if self.sharing is None:
            return self.records.pack()
        self.sharing.sync()
        num_records = self.records.pack()
        self.sharing.sync()
        self.sharing.prune()
        return num_records

    def query(self, sql: str, *, limits: Limits = LIMITS) -> Answer:
        """Run one SELECT on the snapshot of the index.

        Raises:
            QueryError: the query is wrong, or past its limits.
            DamagedError: the index cannot be read.
            StoreError: there is no index, and none can be made now.
        """
        if self.index.known() is None:
            reason = self.ingest().reason
            if not self.index.snapshot.exists():
                raise StoreError(
                    f"there is no index under {self.home}, and none can be made now ({reason});"
                    " records and blobs are not harmed, run again when that is mended"
                )
        try:
            with self.index.reader.reading(limits) as connection:
                return ask(connection, sql, limits)
        except duckdb.Error as error:
            raise DamagedError(
                f"the index under {self.home} cannot be read ({error}); rebuild it from the records"
            ) from None

    def scores(self, sql: str) -> list[Score]:
        """The scores whose ids a SELECT returns, in its order. Raises as `query`."""
        ids = [ArtifactId(row[0]) for row in self.query(sql).rows]
        scores = self.scores_of(ids)
        return [scores[one] for one in ids if one in scores]

    def verify(self) -> Verification:
        """Check every record, blob and row (`check`). Changes nothing.

        Raises:
            StoreError: the disk is too full for an index to compare with, or the shared storage
                does not answer.
        """
        try:
            return check.verify(self.home, self.records, self.blobs, self.index, self.sharing)
        except duckdb.Error as error:
            raise StoreError(
                f"the store cannot be verified now ({brief(error)}); free some space or memory, and"
                " run again"
            ) from None

    def gc(self, *, remove: bool = False) -> list[Removable]:
        """List files that nothing refers to, and work that was stopped; with `remove`, remove them.

        Not during a run.

        Raises:
            BusyError: a run is going on; its blobs may not be recorded yet.
            DamagedError: a record cannot be read, so its blobs are not known.
        """
        with self._alone():
            found = find_garbage(self.home, self.records, self.blobs)
            for one in found if remove else ():
                discard(one.path)
        return found

    def free(self, find: Callable[[], Sequence[Removable]]) -> Sequence[Removable]:
        """Delete the files that `find` lists; blobs among them may be recorded. Not during a run.

        `verify` does not call these blobs missing from then on. A shared storage keeps them.

        Raises:
            BusyError: a run is going on, and may need them.
            UnreachableError: the shared storage, which may lack them, does not answer.
        """
        if self.sharing:
            self.sharing.sync(restore=True)
        with self._alone():
            files = find()
            blobs = [one for one in files if SHA256.fullmatch(one.name)]
            folders = [one for one in files if not SHA256.fullmatch(one.name)]
            for one in folders:  # these first: on a full disk the note needs their space
                discard(one.path)
            note_freed(self.home, self.blobs, [one.name for one in blobs])
            for one in blobs:
                discard(one.path)
        return files

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Hold the locks with which no run goes on, and nobody records."""
        records = locked(self.home / "records.lock", deadline_seconds=WRITE_DEADLINE_SECONDS)
        with locked(self.home / "runs.lock", deadline_seconds=0, message=IS_RUNNING), records:
            yield

    @contextmanager
    def running(self, recipe_name: str) -> Generator[list[RunStarted]]:
        """Hold a run's locks: no second run of the recipe starts, and no `gc`.

        Yields earlier runs of this recipe that were killed, after recording their ends.

        Raises:
            BusyError: another process is running the recipe.
        """
        digest = canonical_sha256(recipe_name)[:16]
        alone = locked(
            self.home / "locks" / f"recipe-{digest}.lock",
            deadline_seconds=0,
            message=f"{recipe_name} is being run by another process; wait for it, or stop it",
        )
        together = locked(
            self.home / "runs.lock", deadline_seconds=WRITE_DEADLINE_SECONDS, shared=True
        )
        with alone, together:
            if self.sharing:
                # so that nothing is made again that another home has made
                self.ingest(restore=True)
            self._check_clock()
            killed = self.unended_here(recipe_name)
            for run in killed:  # only the holder of a recipe's lock is still running
                self.record_run(RunEnded(run.run_id, "killed", KILLED))
            self._tidy()
            yield killed
            self._forget_freed()

    def close_killed(self) -> None:
        """Record the ends of all killed runs of this home; `BusyError` if a run is going on."""
        with locked(self.home / "runs.lock", deadline_seconds=0, message=IS_RUNNING):
            for run in self.unended_runs():
                if run.home == self.name:
                    self.record_run(RunEnded(run.run_id, "killed", KILLED))

    def unended_here(self, recipe_name: str) -> list[RunStarted]:
        """Runs of a recipe in this home that have no recorded end: killed, unless one goes on."""
        return [
            run
            for run in self.unended_runs()
            if run.recipe_name == recipe_name and run.home == self.name
        ]

    def _check_clock(self) -> None:
        """Warn if records are from later than this machine's clock: the latest record counts."""
        ahead = self.index.select(
            "SELECT max(recorded_at) - $1::TIMESTAMP AS ahead, count(*),"
            " count(*) FILTER (recorded_at > $1::TIMESTAMP) FROM records"
            " HAVING ahead > to_seconds($2)",
            [now(), CLOCK_SECONDS],
        )
        if ahead:
            by, total, later = ahead[0]
            logger.warning(
                "this machine's clock is %s behind the newest record under %s (%s of %s records are"
                " from the future): new scores and routes count as older than these; set the clock,"
                " here or where these were recorded",
                by,
                self.home,
                f"{later:,}",
                f"{total:,}",
            )

    def _tidy(self) -> None:
        """Remove leftovers, and pack many loose records. Never raises."""
        for root in (self.home, self.records.root, self.records.segments.root, self.blobs.root):
            sweep(root)
        self._forget_freed()
        if len(self.records.loose()) >= PACK_RECORDS:
            try:
                self.pack()
            except StoreError as error:
                logger.warning("loose records are not packed: %s", error)

    def _forget_freed(self) -> None:
        """Forget which blobs were freed, of those that a run has made again."""
        with suppress(OSError):
            note_freed(self.home, self.blobs)
