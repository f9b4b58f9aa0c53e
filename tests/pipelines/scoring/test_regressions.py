"""What a run says of its checkpoint beside the last one of the same recipe."""

from dataclasses import replace
from pathlib import Path

from pipelines.scoring.regressions import Change, describe, since_last
from store.events import RunStarted
from tests.store.conftest import Shelf

SAME = Change("sums", "exact_match", 0.5, 0.5, worse=False)


def test_what_is_worse_is_said_first_and_what_is_the_same_is_not_said() -> None:
    better, worse = replace(SAME, previous=0.25), replace(SAME, task="dates", value=0.1, worse=True)
    assert describe([SAME, better, worse]) == [
        "Worse than the last checkpoint on dates: exact_match 0.100, it was 0.500.",
        "sums: exact_match 0.500, it was 0.250.",
    ]
    by_rounding = replace(SAME, value=0.1 + 0.2, previous=0.3)
    assert describe([by_rounding]) == ["The last checkpoint scored the same on its task."]
    assert describe([]) == []


def test_tasks_are_counted_and_not_their_metrics() -> None:
    both = [SAME, replace(SAME, metric="rouge1")]
    assert describe(both) == ["The last checkpoint scored the same on its task."]
    two = [*both, replace(SAME, task="dates")]
    assert describe(two) == ["The last checkpoint scored the same on all 2 tasks."]


def test_a_checkpoint_is_compared_with_the_one_of_the_night_before(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    stack = shelf.fused(shelf.adapter(1))
    for spec in (shelf.base, shelf.adapter(1), stack):
        shelf.make(spec)
    nights = ((0.9, 0.3), (0.6, 0.31), (0.6, 0.31))
    models = [shelf.router(stack, seed=night) for night, _ in enumerate(nights)]
    for night, (model, values) in enumerate(zip(models, nights, strict=True)):
        run_id = f"r{night}"
        shelf.ledger.record_run(RunStarted(run_id, "nightly", "9" * 64))
        shelf.make(model, run_id=run_id)
        for task, value in zip(("sums", "dates"), values, strict=True):
            shelf.measure(model, task, value, run_id)
    shelf.ledger.ingest()
    assert since_last(shelf.ledger, models[0].id) == []
    assert since_last(shelf.ledger, models[1].id) == [
        Change("dates", "exact_match", 0.31, 0.3, worse=False),
        Change("sums", "exact_match", 0.6, 0.9, worse=True),
    ]
    assert len(describe(since_last(shelf.ledger, models[2].id))) == 1
