"""A run whose gates are trained: it goes on where it was killed, to the same bytes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from meteora.artifacts import BuiltBase, FusedCheckpoint, short
from meteora.checkpoint import CARD
from pipelines import stages
from pipelines.finished import finished
from pipelines.summary import summarise
from store.ledger import Ledger

from .conftest import run

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from pipelines.workplace import Workplace

pytestmark = pytest.mark.usefixtures("prefect_server")

GATES = {
    "method": "joint",
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
}


class KilledError(BaseException):
    pass


@contextmanager
def killed_after_three(_what: str, _total: int, _unit: str) -> Generator[Callable[[int], None]]:
    left = 3

    def advance(count: int) -> None:
        nonlocal left
        left -= count
        if left == 0:
            raise KilledError

    yield advance


def test_a_killed_training_goes_on_and_ends_in_the_same_gates(
    workplace: Callable[..., Workplace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workplace(gates=GATES, benchmark={"limit": 2, "compare": [], "max_new_tokens": 1})
    run(work)
    planned = finished(work)
    assert planned is not None
    assert planned.router.joint is not None
    whole = work.ledger.built(planned.router.id)
    assert whole is not None
    assert whole["heldout_accuracy"] is None
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    assert summary is not None
    assert summary.routing is not None
    assert summary.routing.accuracy > 0.9
    card = (work.checkpoint_folder(planned.router.id) / CARD).read_text()
    assert "trained by gradient descent on" in card
    assert short(planned.router.id) in card
    folder = work.training_folder(planned.router.id)
    assert not folder.exists()

    built = BuiltBase.from_dict(work.ledger.built(planned.base.id) or {})
    fused = FusedCheckpoint.from_dict(work.ledger.built(planned.fused.id) or {})
    stopped = replace(work, ledger=Ledger(tmp_path / "other"))
    stages.build_base(stopped, planned.base)
    for expert in planned.experts:
        spec = expert.adapter.spec
        stopped.ledger.record_artifact(
            spec, weights_sha256=spec.weights_sha256, run_id=stopped.run_id
        )
    stages.stack(stopped, planned)
    folder = stopped.training_folder(planned.router.id)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "bar", killed_after_three)
        with pytest.raises(KilledError):
            stages.fit_gates(stopped, planned, built, fused)
    assert [path.name for path in folder.iterdir()] == ["training.safetensors"]
    made = stages.fit_gates(stopped, planned, built, fused)
    assert made.weights_sha256 == whole["weights_sha256"]
    assert not folder.exists()
