"""A look at what is left to do, and the run that starts from it: nothing is resolved twice."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from meteora.artifacts import file_sha256
from meteora.checkpoint.manifest import CARD, CONFIG, GATES, LINEAGE, MANIFEST
from pipelines.admission import sources
from pipelines.flows import flow, up_to_date
from pipelines.flows.up_to_date import look
from pipelines.planning import resolve
from pipelines.publishing.signing import SIGNATURE
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from store.snapshot import IDLE_SECONDS
from tests.pipelines.cli.command_line import done
from tests.pipelines.conftest import Here, base_of, run

ONCE = {"resolve_base": 1, "make_plan": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often names of a run are resolved, and its plan and summary are made."""
    count: Counter[str] = Counter()

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    watch(sources, "resolve_base")
    watch(flow, "resolve_base")
    watch(resolve, "make_plan")
    watch(up_to_date, "summarise")
    watch(flow, "summarise")
    monkeypatch.setattr(flow, "StageProcess", Here)
    return count


@pytest.mark.usefixtures("prefect_server")
def test_one_command_resolves_the_base_and_makes_the_plan_once(
    workplace: Callable[..., RunContext], tmp_path: Path, calls: Counter[str]
) -> None:
    """In a fresh run, in one that goes on, and where nothing is left to do."""
    work = workplace(benchmark={"limit": 1, "compare": [], "max_new_tokens": 1})
    command = ("run", work.path)
    for until in ("stack", "publish", "publish"):
        as_json = ["--json"] if until == "stack" else []
        said = done(*command, "--until", until, *as_json, "--home", tmp_path / "home")
        if as_json:
            made = json.loads(said.stdout)
            assert (made["name"], made["until"]) == (work.name, until)
            assert list(made["seconds"]) == ["base", "check", "stack"]
        stopped = "done up to stack; the same command without --until goes on"
        assert (stopped in said.stderr) == (until == "stack")
        assert calls.pop("summarise", 0) == (until == "publish")
        assert calls == ONCE
        calls.clear()
    assert "nothing to do" in said.stderr
    assert "scores, and their 95 % intervals" in said.stdout
    assert Ledger(tmp_path / "home").query("SELECT outcome FROM runs").rows == [("ok",)] * 2


def test_a_plan_of_other_adapters_is_not_taken_over(
    workplace: Callable[..., RunContext],
) -> None:
    work = workplace()
    built = base_of(work)
    steps = resolve.local_steps(work, built.spec)
    plan = resolve.resolve(work, built, steps)
    assert resolve.resolve(work, built, steps, plan).tasks is plan.tasks
    fewer = replace(
        work, recipe=work.recipe.model_copy(update={"experts": work.recipe.experts[:1]})
    )
    assert resolve.resolve(fewer, built, steps, plan).fused.names == ("q_and_v",)


@pytest.mark.usefixtures("prefect_server")
def test_a_checkpoint_that_lacks_a_file_is_made_whole_and_a_signed_one_stays(
    workplace: Callable[..., RunContext],
    recipe_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What refuses such a checkpoint says to build it again."""
    few = {"limit": 1, "max_new_tokens": 1}
    one = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())["experts"][:1]
    work = workplace(benchmark={**few, "compare": []}, experts=one)
    run(work)
    done = look(work)
    assert done.plan is not None
    assert done.summary is not None
    folder = work.checkpoint_folder(done.plan.router.id)
    _, statistics = map(work.ledger.blobs.path_of, work.ledger.blobs_of(done.plan.router.id))
    texts = [folder / name for name in (CARD, CONFIG, LINEAGE)]
    for path in (folder / GATES, folder / MANIFEST, statistics, *texts):
        away = path.rename(path.with_name("away"))
        assert look(work).summary is None
        away.rename(path)
    assert look(work).summary
    lost = {path: path.read_bytes() for path in (folder / GATES, statistics, *texts)}
    for path in lost:
        path.unlink()
    run(work)
    assert {path: path.read_bytes() for path in lost} == lost
    assert look(work).summary

    (folder / SIGNATURE).write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    more = workplace(benchmark={**few, "compare": ["base"]}, experts=one)
    run(more)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "is signed, so its card stays as it is, without new scores" in capsys.readouterr().err
    assert look(more).summary

    (folder / CARD).unlink()
    run(more)
    assert (folder / CARD).is_file()
    assert "was signed, and is made again without its signature: sign it" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect_server")
def test_gates_that_another_home_recorded_earlier_take_the_place_of_its_own(
    workplace: Callable[..., RunContext],
) -> None:
    """Two homes that share a store ran the recipe at once, and their CPUs round differently."""
    work = workplace(benchmark={"limit": 1, "compare": [], "max_new_tokens": 1})
    run(work)
    done = look(work)
    assert done.plan is not None
    router, folder = done.plan.router.id, work.checkpoint_folder(done.plan.router.id)
    gates = bytearray((folder / GATES).read_bytes())
    gates[-4] ^= 1  # the last bit of a number
    sha256 = work.ledger.blobs.put_bytes(bytes(gates))
    (ours,) = (
        record
        for record in map(work.ledger.records.read, work.ledger.records.loose())
        if record.subject == router and record.kind == "artifact"
    )
    built = {**ours.body["built"], "weights_sha256": sha256}
    body = {**ours.body, "weights_sha256": sha256, "built": built}
    theirs = replace(
        ours, body=body, at="2020-01-01T00:00:00.000000Z", blobs=(sha256, *ours.blobs[1:])
    )
    work.ledger.records.write(theirs)
    work.ledger.ingest()
    assert look(work).summary is None
    run(work)
    assert file_sha256(folder / GATES) == sha256
    assert look(work).summary


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_thousand_runs_with_nothing_to_do_leave_nothing_behind(
    workplace: Callable[..., RunContext],
) -> None:
    """What a scheduled run does under its lock, a thousand times in one process."""
    work = workplace(benchmark={"limit": 2, "compare": [], "max_new_tokens": 1})
    run(work)

    def used() -> tuple[int, int]:
        time.sleep(IDLE_SECONDS + 1)  # until then a ledger keeps its snapshot open
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages, len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        again = replace(work, ledger=Ledger(work.home))
        with again.ledger.running(again.key):
            assert look(again).summary

    for _ in range(100):
        once()
    before = used()
    files = len(list(work.home.rglob("*")))
    for _ in range(1000):
        once()
    after = used()
    assert after[0] < 1.1 * before[0]
    assert after[1] == before[1]
    assert len(list(work.home.rglob("*"))) == files
