"""The record of a run, where the disk or the ledger fails."""

from pathlib import Path

import pytest

from pipelines.recipe.recipe import Recipe
from pipelines.workspace.context import RunContext
from pipelines.workspace.recorded_run import recorded
from store.errors import StoreError
from store.events import RunEnded, RunStarted
from store.ledger import Ledger


def test_an_end_that_cannot_be_recorded_hides_no_error_and_leaves_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path)
    work = RunContext(ledger, Recipe.model_construct(), tmp_path / "recipe.yaml", "r1")
    record = ledger.record_run

    def full(event: RunStarted | RunEnded) -> None:
        if isinstance(event, RunEnded):
            raise StoreError("the disk is full")
        record(event)

    monkeypatch.setattr(Ledger, "record_run", lambda _self, event: full(event))

    def fail(error: Exception | None) -> None:
        with recorded(work, "recipe", "9" * 64, "cpu", {}), work.scratch() as scratch:
            (scratch / "file").write_text("large")
            if error:
                raise error

    with pytest.raises(RuntimeError, match="real"):
        fail(RuntimeError("real"))
    assert "the end of the run r1 is not recorded: the disk is full" in caplog.text
    assert not (tmp_path / "runs" / "r1").exists()
    with pytest.raises(StoreError, match="the disk is full"):
        fail(None)
