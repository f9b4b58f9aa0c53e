"""Tasks are made again from recorded answers."""

import json
from dataclasses import replace
from pathlib import Path

from meteora.artifacts import (
    AdapterSpec,
    BaseSpec,
    BenchmarkSpec,
    FusedSpec,
    RouterSpec,
    Score,
    Spec,
)
from pipelines.data.rows import Row, rows_sha256
from pipelines.planning.recorded_tasks import recorded_tasks
from pipelines.scoring.outputs import write_outputs
from store.ledger import Ledger

BASE = BaseSpec("tiny/base", "a" * 40)
FUSED = FusedSpec(BASE.id, (), ())
MODEL = RouterSpec(FUSED.id, "gate", 1, 1.0)
ADAPTER = AdapterSpec("0" * 64, "tiny/base", False, "F16", ())
STACK = FusedSpec(BASE.id, ("sums",), (ADAPTER.id,))
ROWS = [Row(f"{n} + 2", str(n + 2)) for n in range(4)]


def ledger_with(home: Path, *specs: Spec) -> Ledger:
    ledger = Ledger(home)
    for spec in (BASE, *specs):
        ledger.record_artifact(spec, weights_sha256="", run_id="r")
    return ledger


def record(ledger: Ledger, folder: Path, model: RouterSpec, rows: list[Row], length: int) -> None:
    outputs = [
        {"prompt": row.prompt, "output": "", "asked": json.dumps(row.to_dict())} for row in rows
    ]
    write_outputs(outputs, folder / "outputs")
    sha256 = ledger.blobs.put(folder / "outputs", move=True)
    asked = BenchmarkSpec(model.id, "sums", rows_sha256(rows), "exact_match", 0, length, 0, BASE.id)
    score = Score(asked, 1.0, 0.0, 0.2, 1.0, len(rows), sha256, "lm-eval", 1.0)
    ledger.record_score(score, run_id="r")


def test_a_quick_try_elsewhere_does_not_decide_what_a_model_is_asked(tmp_path: Path) -> None:
    first, second, third = (RouterSpec(STACK.id, "gate", 1, 1.0, seed=n) for n in range(3))
    ledger = ledger_with(tmp_path / "home", ADAPTER, STACK, first, second, third)
    for model, num_rows, length in ((first, 3, 32), (first, 3, 16), (second, 4, 8), (second, 1, 4)):
        record(ledger, tmp_path, model, ROWS[:num_rows], length)
        ledger.ingest()
    experts = {"sums": ADAPTER.id}
    for model, num_rows, length in ((first, 3, 16), (second, 4, 8), (third, 4, 8)):
        (found,) = recorded_tasks(ledger, BASE.id, experts, model.id).values()
        assert (len(found.rows), found.max_new_tokens) == (num_rows, length)


def test_a_model_is_asked_what_the_one_was_that_it_has_grown_from(tmp_path: Path) -> None:
    """Else a report on the two would compare nothing."""
    before, other = (RouterSpec(STACK.id, "gate", 1, 1.0, seed=n) for n in range(2))
    grown = replace(before, grown_from=before.id)
    again = replace(grown, grown_from=grown.id)
    ledger = ledger_with(tmp_path / "home", ADAPTER, STACK, before, other, grown, again)
    record(ledger, tmp_path, before, ROWS[:2], 64)
    record(ledger, tmp_path, other, ROWS, 8)
    ledger.ingest()
    for model, num_rows, length in ((again, 2, 64), (other, 4, 8)):
        (found,) = recorded_tasks(ledger, BASE.id, {"sums": ADAPTER.id}, model.id).values()
        assert (len(found.rows), found.max_new_tokens) == (num_rows, length)


def test_answers_that_are_not_here_are_passed_over(tmp_path: Path) -> None:
    """As where the last ones were asked in another home, and records alone came over."""
    ledger = ledger_with(tmp_path / "home", FUSED, MODEL)
    for num_rows in (3, 4):
        before = {*ledger.blobs}
        record(ledger, tmp_path, MODEL, ROWS[:num_rows], 8)
    ledger.ingest()
    found = []
    for _ in range(2):
        found += [
            len(one.rows)
            for one in recorded_tasks(ledger, BASE.id, {"sums": MODEL.id}, MODEL.id).values()
        ]
        for sha256 in {*ledger.blobs} - before:
            ledger.blobs.place_of(sha256).unlink()
    assert found == [4, 3]


def test_a_task_of_lm_eval_s_with_an_expert_s_name_is_not_the_expert_s(tmp_path: Path) -> None:
    ledger, row = ledger_with(tmp_path / "home", FUSED, MODEL), Row("2 + 2", "4")
    for rows, outputs in (
        (
            rows_sha256([row]),
            {"prompt": "2 + 2", "output": "4", "asked": json.dumps(row.to_dict())},
        ),
        ("f" * 64, {"prompt": "a whole prompt", "output": '[["4"]]'}),
    ):
        write_outputs([outputs], tmp_path / "outputs")
        sha256 = ledger.blobs.put(tmp_path / "outputs", move=True)
        spec = BenchmarkSpec(MODEL.id, "sums", rows, "exact_match", 0, 8, 0, BASE.id)
        ledger.record_score(Score(spec, 1.0, 0.0, 0.2, 1.0, 1, sha256, "lm-eval", 1.0), run_id="r")
    ledger.ingest()
    found = recorded_tasks(ledger, BASE.id, {"sums": MODEL.id})
    assert list(found["sums"].rows) == [row]
