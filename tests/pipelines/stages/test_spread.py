"""A base that one device does not hold: its gates and scores are those of one that lies whole."""

from collections.abc import Callable
from typing import Any

import pytest

import meteora
from meteora.fitting import calibrate
from pipelines.stages import build, measure, open_model
from pipelines.stages.open_model import is_spread, map_to_fit
from pipelines.workspace import machine
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import plan_of


def fit(work: RunContext) -> tuple[Any, Any]:
    planned = plan_of(work)
    build.stack(work, planned)
    return planned, build.fit_gates(work, planned)


@pytest.mark.parametrize("how", ["asked", "too large"])
def test_gates_that_are_fitted_one_layer_at_a_time_are_the_same_artifact(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, how: str
) -> None:
    """The way is not part of an id: what it gives are the same bytes."""
    planned, whole = fit(workplace())
    (tmp_path / "home").rename(tmp_path / "first")
    if how == "asked":
        work = workplace(gates={"by_layer": True})
    else:
        work = workplace()
        monkeypatch.setattr(machine, "MOST", 0)
    seen: list[set[str]] = []
    own = calibrate.calibrate

    def watched(model: Any, *given: Any, **more: Any) -> Any:
        seen.append({path for path, tensor in model.named_parameters() if tensor.is_meta})
        return own(model, *given, **more)

    monkeypatch.setattr(calibrate, "calibrate", watched)
    again, by_layer = fit(work)
    assert again.router.id == planned.router.id
    assert by_layer.weights_sha256 == whole.weights_sha256
    assert by_layer.statistics_sha256 == whole.statistics_sha256
    (on_disk,) = seen
    assert {path.split(".")[1] for path in on_disk if path.startswith("model")} == {"layers"}


def test_a_recipe_may_say_that_a_base_is_not_read_by_layer(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workplace(gates={"by_layer": False})
    planned = plan_of(work)
    build.stack(work, planned)
    assert not is_spread(work, planned)
    monkeypatch.setattr(machine, "MOST", 0)
    assert is_spread(work, planned)
    assert map_to_fit(work, planned) is None
    work = workplace(gates={"method": "joint"})
    assert map_to_fit(work, plan_of(work)) is None


def test_a_benchmark_of_a_base_that_is_spread_gives_the_same_answers(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """What Accelerate would do by itself on a small machine is asked for here by hand."""
    asked = {"limit": 3, "compare": ["base", "oracle", "ties"], "max_new_tokens": 4}
    values, routes = [], []
    for on_disk in (False, True):
        work = workplace(benchmark=asked)
        planned, gates = fit(work)
        if on_disk:
            monkeypatch.setattr(machine, "MOST", 0)
            monkeypatch.setattr(open_model, "placed", lambda *_, **__: {"device_map": {"": "disk"}})
        measure.measure(work, planned, gates)
        scores = work.ledger.scores_of(one.spec.id for one in planned.measurements)
        values.append({spec_id: score.outputs_sha256 for spec_id, score in scores.items()})
        routes.append((work.ledger.built(planned.routing.id) or {})["accuracy"])
        (tmp_path / "home").rename(tmp_path / str(on_disk))
    assert values[0] == values[1]
    assert routes[0] == routes[1]


@pytest.mark.parametrize(
    ("kind", "gates"),
    [("gate", {}), ("prompt", {}), ("gate", {"method": "joint", "steps": 2, "batch_size": 2})],
)
def test_experts_that_stay_in_their_file_get_the_same_gates_and_give_the_same_answers(
    workplace: Callable[..., RunContext], tmp_path: Any, kind: str, gates: dict[str, Any]
) -> None:
    compare = ["base", "oracle", "uniform", "arrow", "ties"]
    asked = {
        "benchmark": {"limit": 3, "compare": compare, "max_new_tokens": 4},
        "router": {"kind": kind},
        "gates": gates,
    }
    made, answers = [], []
    for budget in (None, 0, 2_000):
        work = workplace(**asked, expert_cache_bytes=budget)
        planned, fitted = fit(work)
        measure.measure(work, planned, fitted)
        scores = work.ledger.scores_of(one.spec.id for one in planned.measurements)
        made.append((planned.router.id, fitted.weights_sha256, fitted.statistics_sha256))
        answers.append({spec_id: score.outputs_sha256 for spec_id, score in scores.items()})
        with open_model.opened(work, planned, gates=fitted) as (model, _):
            cache = meteora.expert_cache(model)
            assert (cache and cache.budget_bytes) == budget
        (tmp_path / "home").rename(tmp_path / str(budget))
    assert made[0] == made[1] == made[2]
    assert answers[0] == answers[1] == answers[2]
