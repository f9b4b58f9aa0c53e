"""A base and adapters that are here already need no network, and come once for two runs."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from meteora.adapters.compatibility import IncompatibleAdaptersError
from pipelines.admission import sources
from pipelines.admission.check import inspect
from pipelines.admission.experts import Expert
from pipelines.flows.up_to_date import look
from pipelines.hub.errors import HubConnectionError, HubOfflineError
from pipelines.recipe.recipe import ExpertSection
from pipelines.recipe.stage import Stage
from pipelines.stages.build import build_base
from pipelines.workspace.bases import unfinished
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.admission.test_discover import adapter_repo
from tests.pipelines.conftest import plan_of, print_steps
from tests.pipelines.hub.hub_server import HubServer, Repo, running_hub

COMMIT = "a" * 40
AWAY = "http://127.0.0.1:9"
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture
def server(world: World) -> Generator[HubServer]:
    with running_hub() as server:
        files = {name: (world.base / name).read_bytes() for name in BASE_FILES}
        server.repos["org/base"] = Repo(files, refs={"main": COMMIT})
        server.repos["a/adapter"] = adapter_repo(
            world.adapters["q_and_v"], base_model_name_or_path="org/BASE"
        )
        yield server


def found(work: RunContext, memory_limit_bytes: int = 1 << 30) -> Sequence[Expert]:
    planned = plan_of(work, memory_limit_bytes)
    return planned.experts


def asking(
    workplace: Callable[..., RunContext], server: HubServer, at: str = "", endpoint: str = ""
) -> RunContext:
    return workplace(
        base=f"org/base{at}",
        experts=[{"name": "one", "adapter": f"a/adapter{at}"}],
        router={"kind": "arrow"},
        hub={"endpoint": endpoint or server.endpoint},
    )


def test_what_is_here_is_used_offline_by_its_commit(
    workplace: Callable[..., RunContext], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expert,) = found(asking(workplace, server))
    assert not {"base_alias", "base_unreachable"} & {r.code for r in expert.adapter.reasons}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(server.requests)
    (again,) = found(asking(workplace, server, f"@{COMMIT}"))
    assert again.adapter.spec == expert.adapter.spec
    assert len(server.requests) == before
    with pytest.raises(HubOfflineError, match="names no commit"):
        found(asking(workplace, server))


@pytest.mark.usefixtures("hub_here")
def test_what_is_here_by_its_commit_needs_no_hub(
    workplace: Callable[..., RunContext],
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without HF_HUB_OFFLINE: nobody has to know that the Hub is away."""
    (expert,) = found(asking(workplace, server, f"@{COMMIT}"))
    pinned = asking(workplace, server, f"@{COMMIT}", AWAY)
    looked = look(pinned)
    assert looked.plan is not None
    assert looked.plan.experts[0].ref == expert.ref
    assert found(pinned)[0].adapter.spec == expert.adapter.spec
    print_steps(pinned)
    said = capsys.readouterr().out
    assert f"org/base at {COMMIT[:12]}, here already" in said
    assert f"a/adapter at {COMMIT[:12]}, here already" in said
    monkeypatch.setenv("HF_ENDPOINT", AWAY)
    assert inspect(f"a/adapter@{COMMIT}", pinned.adapters_folder).verdict != "refuse"
    with pytest.raises(HubConnectionError, match=r"a/adapter@main.*if its commit of 40 hex"):
        sources.resolve_adapter(
            asking(workplace, server, "@main", AWAY),
            ExpertSection(name="one", adapter="a/adapter@main"),
        )


def test_two_runs_at_once_download_a_base_once(
    workplace: Callable[..., RunContext], server: HubServer
) -> None:
    server.seconds_per_body = 0.2
    work = asking(workplace, server)
    spec = sources.resolve_base(work)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: build_base(work, spec), range(2))
    assert one == other
    assert server.count("get") == len(BASE_FILES)


def test_a_dry_run_counts_what_a_stopped_download_still_lacks(
    workplace: Callable[..., RunContext],
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, files = asking(workplace, server), server.repos["org/base"].files
    files["model.safetensors"] += b" " * 2_000_000
    files["model-00001-of-00001.safetensors"] = b" " * 1_000_000
    folder = unfinished(work.base_folder(sources.resolve_base(work)))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(files["model.safetensors"])
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"cut")
    print_steps(work)
    said = capsys.readouterr().out
    assert f"org/base at {COMMIT[:12]}, 1.0 MB to download" in said
    assert "the base's config is not here yet" in said
    assert (folder / "model-00001-of-00001.safetensors").is_file()
    (folder / "config.json").write_bytes(files["config.json"])
    monkeypatch.setattr("pipelines.planning.needs.free_bytes", lambda _folder: 1)
    print_steps(work, Stage.base)
    said = capsys.readouterr().out
    assert "Estimated, to a factor of two or so" in said
    assert "the run would stop" not in said  # what is here takes no room again


def test_a_dry_run_knows_the_base_that_a_branch_names(
    workplace: Callable[..., RunContext], server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    work = asking(workplace, server, "@main")
    build_base(work, sources.resolve_base(work))
    print_steps(work)
    said = capsys.readouterr().out
    assert f"org/base at {COMMIT[:12]}, here already" in said
    assert "Estimated, to a factor of two or so" in said


def test_a_stack_that_no_memory_holds_is_refused(
    workplace: Callable[..., RunContext], server: HubServer
) -> None:
    with pytest.raises(IncompatibleAdaptersError, match="the stack of 1 expert has 0 MB"):
        found(asking(workplace, server), memory_limit_bytes=1_000)
