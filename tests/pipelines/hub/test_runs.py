"""Runs whose adapters lie on a Hub: what moved there, and what passes by itself there."""

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from pipelines.flows import flow
from pipelines.hub.errors import HubError
from pipelines.workspace import console
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.admission.test_discover import COMMIT, adapter_repo
from tests.pipelines.conftest import result_of, run
from tests.pipelines.hub.hub_server import Fault, HubServer, running_hub

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def server(world: World) -> Generator[HubServer]:
    with running_hub() as server:
        server.repos["org/adapter"] = adapter_repo(world.adapters["q_and_v"])
        yield server


@pytest.fixture
def on_the_hub(
    server: HubServer, workplace: Callable[..., RunContext], recipe_folder: Path
) -> Callable[..., RunContext]:
    """A function that opens the recipe with one of its adapters at a branch on the Hub."""
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    first, second = body["experts"]
    return partial(
        workplace,
        experts=[{**first, "adapter": "org/adapter@main"}, second],
        benchmark={"limit": 2, "compare": ["base"], "max_new_tokens": 2},
        hub={"endpoint": server.endpoint},
    )


@pytest.mark.slow
def test_a_branch_is_resolved_anew_and_what_moved_is_compared_with_what_was(
    on_the_hub: Callable[..., RunContext],
    server: HubServer,
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a download that takes a while is told of in the run's log, from a thread of its own."""
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.0)
    work = on_the_hub()
    run(work)
    before, _ = result_of(work)
    assert before.experts[0].ref.revision == COMMIT
    made = work.ledger.query("SELECT kind, count(*) FROM artifacts GROUP BY ALL ORDER BY 1").rows

    run(on_the_hub())  # nothing moved
    again = work.ledger.query("SELECT kind, count(*) FROM artifacts GROUP BY ALL ORDER BY 1").rows
    assert again == made

    moved = adapter_repo(world.adapters["all_seven"])
    server.repos["org/adapter"] = replace(moved, commit="b" * 40, refs={"main": "b" * 40})
    capsys.readouterr()
    run(on_the_hub())
    after, _ = result_of(on_the_hub())
    assert after.experts[0].ref.revision == "b" * 40
    assert after.experts[1] == before.experts[1]
    assert after.fused.id != before.fused.id
    assert after.router.id != before.router.id
    compared = work.ledger.query("SELECT DISTINCT subject_id, previous_id FROM changes").rows
    assert (after.router.id, before.router.id) in compared
    said = capsys.readouterr().err
    assert "it was" in said or "scored the same" in said


@pytest.mark.usefixtures("hub_here")
def test_what_may_pass_is_tried_again_and_what_stays_is_not(
    on_the_hub: Callable[..., RunContext],
    server: HubServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow.resolve_adapter, "retry_delay_seconds", 0)
    server.faults["refs"] = Fault(status=503, times=1, path="org/adapter/refs")
    run(on_the_hub(), "check")
    assert server.faults["refs"].times == 0
    assert "a fault of its own (503); try later; it is tried again" in capsys.readouterr().err
    assert server.count("refs") >= 2

    server.requests.clear()
    server.faults["refs"] = Fault(status=403, path="org/adapter/refs")
    with pytest.raises(HubError):
        run(on_the_hub(), "check")
    assert server.count("refs") == 1
