"""Gates for composites: each half of the sequences is routed by gates of the other half."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meteora.fitting import calibrate
from meteora.fitting.sequences import UNLABELLED
from meteora.fitting.statistics import Fit
from pipelines.stages import build, open_model
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import plan_of

QUICK = {"limit": 2, "compare": [], "max_new_tokens": 1}


def test_gates_for_composites_are_fitted_in_halves(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, bool]] = []
    fit = calibrate.calibrate

    def watched(model: Any, sequences: Any, *args: Any, **settings: Any) -> Fit:
        asked.append((sequences, settings["crossed"]))
        return fit(model, sequences, *args, **settings)

    monkeypatch.setattr(calibrate, "calibrate", watched)
    planned = []
    for gates in ({}, {"composites": [2]}):
        work = workplace(benchmark=QUICK, gates=gates)
        plan = plan_of(work)
        build.stack(work, plan)
        build.fit_gates(work, plan)
        planned.append(plan.router)
    assert [router.crossed for router in planned] == [crossed for _, crossed in asked]
    assert [router.crossed for router in planned] == [False, True]
    (plain, _), (mixed, _) = asked
    assert not any(sequence.answer_starts for sequence in plain)
    opened = [sequence for sequence in mixed if sequence.answer_starts]
    assert opened
    for sequence in opened:
        for place in sequence.answer_starts:  # behind a digit that belongs to nobody
            assert sequence.experts[place] != UNLABELLED
        assert sequence.experts[sequence.answer_starts[0] - 1] == UNLABELLED


@pytest.mark.parametrize("alone", [(), ("attention",)])
def test_gates_that_could_not_be_fitted_in_halves_are_said_to_be_so(
    workplace: Callable[..., RunContext],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    alone: tuple[str, ...],
) -> None:
    fit = calibrate.calibrate
    monkeypatch.setattr(
        calibrate, "calibrate", lambda *a, **asked: replace(fit(*a, **asked), not_crossed=alone)
    )
    work = workplace(benchmark=QUICK, gates={"composites": [2]})
    plan = plan_of(work)
    build.stack(work, plan)
    made = build.fit_gates(work, plan)
    assert made.not_crossed == alone
    described = open_model.describe(work, plan, made).gates
    assert described["crossed"]
    assert described.get("not_crossed", ()) == alone
    assert ("too few examples of" in capfd.readouterr().err) == bool(alone)
