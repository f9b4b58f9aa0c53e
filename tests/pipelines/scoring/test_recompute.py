"""Scores that do not follow from their outputs are found."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meteora.artifacts import BaseSpec, BenchmarkSpec, Score
from pipelines.scoring.intervals import wilson
from pipelines.scoring.outputs import RowValues, write_outputs
from pipelines.scoring.recompute import _difference, recompute_scores
from store.errors import DamagedError
from store.ledger import Ledger

BASE = BaseSpec("tiny/base", "a" * 40)


def record(
    ledger: Ledger,
    folder: Path,
    task: str,
    value: float,
    interval: tuple[float, float] = wilson(1, 2),
    *,
    kept: bool = True,
) -> None:
    """A score of one right and one wrong answer."""
    ledger.record_artifact(BASE, weights_sha256="", run_id="r")
    rows = [
        {"prompt": "p", "reference": "a", "output": output, "exact_match": float(output == "a")}
        | ({"asked": f'{{"prompt": "{task}", "response": "a"}}'} if kept else {})
        for output in ("a", "b")
    ]
    write_outputs(rows, folder / "outputs")
    sha256 = ledger.blobs.put(folder / "outputs", move=True)
    spec = BenchmarkSpec(BASE.id, task, "f" * 64, "exact_match", 0, 8, 0, BASE.id)
    score = Score(spec, value, 0.1, *interval, 2, sha256, "lm-eval", 1.0)
    ledger.record_score(score, run_id="r")
    ledger.ingest()


def test_scores_that_follow_from_their_outputs_are_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home")
    record(ledger, tmp_path, "new", 0.5)
    record(ledger, tmp_path, "old", 0.5, kept=False)  # as before outputs held all of a row
    found = recompute_scores(ledger, 20)
    assert (found.num_scores, found.findings) == (2, ())
    assert recompute_scores(ledger, 1).num_scores == 1
    assert recompute_scores(ledger, 0).num_scores == 0


def test_an_index_that_cannot_be_read_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other findings were lost with it."""
    ledger = Ledger(tmp_path / "home")
    record(ledger, tmp_path, "new", 0.5)

    def fail(_query: str) -> list[Score]:
        raise DamagedError("the index is damaged")

    monkeypatch.setattr(ledger, "scores", fail)
    found = recompute_scores(ledger, 20)
    (finding,) = found.findings
    assert (found.num_scores, finding.what, finding.name) == (0, "index", "ledger.snapshot.duckdb")
    assert "the index is damaged" in finding.problem


def test_a_score_that_does_not_follow_is_named_with_both_values(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home")
    record(ledger, tmp_path, "right", 0.5)
    record(ledger, tmp_path, "better", 0.9)
    (finding,) = recompute_scores(ledger, 20).findings
    assert finding.what == "score"
    assert "recorded as 0.9 over 2 rows, but its outputs give 0.5 over 2" in finding.problem


def test_an_interval_that_does_not_follow_is_named_with_both(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home")
    record(ledger, tmp_path, "surer", 0.5, (0.45, 0.55))
    (finding,) = recompute_scores(ledger, 20).findings
    assert finding.problem == (
        "its interval is recorded as 0.45 to 0.55, but its outputs give 0.0945312 to 0.905469"
    )


def test_rounding_is_no_difference_where_an_interval_has_no_width() -> None:
    spec = BenchmarkSpec(BASE.id, "logs", "f" * 64, "exact_match", 0, 8, 0, BASE.id)
    score = Score(spec, -0.3, 0.0, -0.3, -0.3, 2, "f" * 64, "lm-eval", 1.0)
    found = RowValues((-0.1 - 0.2,) * 2, graded=True)
    assert found.interval(0)[1] != score.low
    assert _difference(score, found) == ""


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [{"asked": '{"prompt": "p", "response": "a"}', "output": None}],
            "cannot be computed again",
        ),
        ([{"asked": "[1]", "output": "a"}], "cannot be computed again"),
        ([], "cannot be computed again"),
        (None, "cannot be computed again"),
        ([{"exact_match": math.nan}] * 2, "but its outputs give nan"),
    ],
    ids=["no answer", "no row", "empty", "no table", "no number"],
)
def test_outputs_that_give_no_score_are_named(
    tmp_path: Path, rows: list[dict[str, Any]] | None, problem: str
) -> None:
    ledger = Ledger(tmp_path / "home")
    record(ledger, tmp_path, "one", 0.5)
    write_outputs(rows or [], tmp_path / "other")
    if rows is None:
        (tmp_path / "other").write_bytes(b"no table")
    sha256 = ledger.blobs.put(tmp_path / "other")
    score = ledger.scores("SELECT id FROM scores")[0]
    other = replace(score, spec=replace(score.spec, task="other"), outputs_sha256=sha256)
    ledger.record_score(other, run_id="r")
    ledger.ingest()
    (finding,) = recompute_scores(ledger, 20).findings
    assert problem in finding.problem
