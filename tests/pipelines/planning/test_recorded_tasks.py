"""Tasks are made again from recorded answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from meteora.artifacts import BaseSpec, BenchmarkSpec, FusedSpec, RouterSpec, Score
from pipelines.data.rows import Row, rows_sha256
from pipelines.planning.recorded_tasks import recorded_tasks
from pipelines.scoring.outputs import write_outputs
from store.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

BASE = BaseSpec("tiny/base", "a" * 40)
FUSED = FusedSpec(BASE.id, (), ())
MODEL = RouterSpec(FUSED.id, "gate", 1, 1.0)


def test_a_task_of_lm_eval_s_with_an_expert_s_name_is_not_the_expert_s(tmp_path: Path) -> None:
    ledger, row = Ledger(tmp_path / "home"), Row("2 + 2", "4")
    for spec in (BASE, FUSED, MODEL):
        ledger.record_artifact(spec, weights_sha256="", run_id="r")
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
