"""The clock steps back, or stands still: nothing is overwritten, and no fact changes."""

from datetime import UTC, datetime, timedelta

import pytest

import store.recording
from pipelines.workspace import context
from store.events import Failure, RunEnded, RunStarted
from store.records import Record
from tests.store.conftest import Shelf

NOON = datetime(2026, 10, 25, 12, tzinfo=UTC)


def test_two_runs_of_one_second_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, _tz: object = None) -> datetime:  # ty: ignore[incompatible-method-override]
            return NOON

    monkeypatch.setattr(context, "datetime", Stopped)
    names = [context.new_run_id() for _ in range(1000)]
    assert len(set(names)) == 1000
    assert {name.partition("-")[0] for name in names} == {"20261025T120000"}


def test_a_clock_that_steps_back_an_hour_at_each_record_changes_no_fact(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = (NOON - timedelta(hours=hours) for hours in range(1000))
    monkeypatch.setattr(store.recording, "now", lambda: f"{next(moments):%Y-%m-%dT%H:%M:%S}Z")
    ledger = shelf.ledger
    for run_id, outcome in (("first", "ok"), ("second", "failed")):
        ledger.record_run(RunStarted(run_id, "nightly", "a" * 64))
        shelf.make(shelf.adapter(1), "same", run_id=run_id)
        ledger.record_run(RunEnded(run_id, outcome, "" if outcome == "ok" else "why", 1.0))
    ledger.record_run(RunStarted("third", "nightly", "a" * 64))  # and it is killed
    with ledger.running("nightly") as killed:
        assert [run.run_id for run in killed] == ["third"]
    assert ledger.unended_runs() == []
    assert ledger.ingest().reason == ""
    rows = ledger.query("SELECT run_id, outcome FROM runs ORDER BY run_id").rows
    assert rows == [("first", "ok"), ("second", "failed"), ("third", "killed")]
    ((made_by,),) = ledger.query("SELECT run_id FROM artifacts").rows
    assert made_by == "first"
    assert not ledger.verify().findings


@pytest.mark.parametrize("seconds", [30, 4000])
def test_a_run_whose_clock_is_behind_the_last_record_says_so(
    seconds: int, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    """What it records is older than what is there, and the latest of several records counts."""
    with shelf.ledger.running("nightly"):
        pass
    body = Failure("fit", "x", "E", "m").to_dict()
    for ahead in (-9, -8, seconds):
        at = datetime.now(UTC) + timedelta(seconds=ahead)
        shelf.ledger.records.write(Record("failure", "x", body, "r1", f"{at:%Y-%m-%dT%H:%M:%S}Z"))
    shelf.ledger.ingest()
    with shelf.ledger.running("nightly"):
        pass
    said = ["clock is 1:06:" in text and "(1 of 3 records" in text for text in caplog.messages]
    assert said == [True] * (seconds > 60)
    assert all("(1 of" in text for text in caplog.messages)
