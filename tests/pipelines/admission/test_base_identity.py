"""The base that an adapter names is looked at over real HTTP, once, and where it may be asked."""

import json
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest
from prefect import flow

from meteora.adapters.compatibility import IncompatibleAdaptersError
from meteora.artifacts import AdapterRef
from pipelines.flows import flow as flows
from pipelines.hub.errors import HubError
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.admission.test_discover import adapter_repo
from tests.pipelines.conftest import plan_of
from tests.pipelines.hub.hub_server import Fault, HubServer, Repo, running_hub

COMMIT = "a" * 40
PROFILE = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def server(world: World, hub_here: None) -> Generator[HubServer]:  # noqa: ARG001
    with running_hub() as server:
        server.repos["a/adapter"] = adapter_repo(
            world.adapters["q_and_v"], base_model_name_or_path="org/base"
        )
        yield server


@pytest.fixture
def opened(server: HubServer, workplace: Callable[..., RunContext]) -> Callable[..., RunContext]:
    """A function that opens a recipe of one adapter on a base that is a folder."""
    return partial(
        workplace,
        experts=[{"name": "one", "adapter": "a/adapter"}],
        router={"kind": "arrow"},
        hub={"endpoint": server.endpoint},
    )


def profile_of(folder: Path) -> Repo:
    files = {name: (folder / name).read_bytes() for name in PROFILE}
    files |= {"model.safetensors": b"never asked for", "modeling_x.py": b"raise SystemExit"}
    return Repo(files, refs={"main": COMMIT})


def codes(work: RunContext) -> dict[str, str]:
    """The warnings about its one adapter."""
    planned = plan_of(work)
    (expert,) = planned.experts
    said = {reason.code: reason.message for reason in expert.adapter.reasons}
    del said["large_update"]  # its weights are random
    return said


def asked_for(server: HubServer, name: str) -> list[str]:
    return [path for _, path, _ in server.requests if name in path]


def test_a_mirror_is_known_by_what_it_is_and_looked_at_once(
    opened: Callable[..., RunContext], server: HubServer, world: World
) -> None:
    server.repos["org/base"] = profile_of(world.base)
    assert "taken for a copy" in codes(opened())["base_alias"]
    came = asked_for(server, "org/base")
    assert not any("safetensors" in path or ".py" in path for path in came)
    assert "base_alias" in codes(opened())
    assert asked_for(server, "org/base") == came


@pytest.mark.usefixtures("called_here")
def test_a_card_names_the_base_where_the_config_does_not(
    opened: Callable[..., RunContext], server: HubServer, world: World
) -> None:
    server.repos["org/base"] = profile_of(world.base)
    repo = adapter_repo(world.adapters["q_and_v"])  # its config names the base by a path
    repo.files["README.md"] = b"---\nlicense: mit\nbase_model:\n- org/base\n---\n"
    server.repos["a/adapter"] = repo
    assert {"base_local_path", "base_alias"} <= codes(opened()).keys()


@pytest.mark.usefixtures("called_here")
def test_an_adapter_of_another_base_is_refused_though_its_shapes_fit(
    opened: Callable[..., RunContext], server: HubServer, build_base: Callable[[str], Path]
) -> None:
    server.repos["org/base"] = profile_of(build_base("llama_64"))
    for _ in range(2):  # the second time by what is kept
        with pytest.raises(IncompatibleAdaptersError, match="org/base, which has hidden_size 64"):
            codes(opened())


@pytest.mark.usefixtures("called_here")
def test_a_base_that_cannot_be_reached_is_a_warning_or_a_refusal(
    opened: Callable[..., RunContext], server: HubServer
) -> None:
    assert "does not exist" in codes(opened())["base_unreachable"]
    with pytest.raises(IncompatibleAdaptersError, match="unreachable_base: refuse"):
        codes(opened(policy={"unreachable_base": "refuse"}))
    server.repos["org/base"] = Repo({"config.json": b"{}"}, refs={"main": COMMIT})
    assert "not one that transformers reads" in codes(opened())["base_unreachable"]


@pytest.mark.parametrize("prefix", ["xxxx", "x"])  # a panic; a panic while that is cleaned up
def test_a_tokenizer_that_ends_the_process_that_reads_it_ends_no_run(
    prefix: str, opened: Callable[..., RunContext], server: HubServer, world: World
) -> None:
    repo = profile_of(world.base)
    read = json.loads(repo.files["tokenizer.json"])
    read["model"] = {
        "type": "BPE",
        "vocab": {"a": 0, "é": 1, "a©": 2},
        "merges": [["a", "é"]],
        "continuing_subword_prefix": prefix,
    }
    repo.files["tokenizer.json"] = json.dumps(read).encode()
    server.repos["org/base"] = repo
    assert "to compare them failed: its process" in codes(opened())["base_unreachable"]


@pytest.mark.usefixtures("called_here")
def test_where_all_is_local_nobody_is_asked_unless_the_recipe_says_so(
    opened: Callable[..., RunContext],
    server: HubServer,
    world: World,
    recipe_folder: Path,
) -> None:
    local = recipe_folder / "local"
    local.mkdir(exist_ok=True)
    for name, data in server.repos["a/adapter"].files.items():
        (local / name).write_bytes(data)
    server.repos["org/base"] = profile_of(world.base)
    experts = [{"name": "one", "adapter": "path:local"}]
    assert codes(opened(experts=experts)) == {}
    assert not server.requests
    strict = opened(experts=experts, policy={"unreachable_base": "refuse"})
    assert "base_alias" in codes(strict)

    config = json.loads((local / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/another"
    (local / "adapter_config.json").write_text(json.dumps(config))
    found = codes(opened(experts=experts))  # its shapes fit, so only the name tells
    assert "it was trained on org/another" in found["base_named_differently"]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(("status", "tries"), [(500, 3), (429, 3), (401, 1), (403, 1), (404, 1)])
def test_a_run_asks_again_only_where_that_can_help(
    status: int, tries: int, opened: Callable[..., RunContext], server: HubServer
) -> None:
    work = opened()
    at_once = flows.resolve_adapter.with_options(retry_delay_seconds=0)
    server.faults["refs"] = Fault(status, times=2)

    @flow(name="asking", persist_result=False)
    def asking() -> AdapterRef:
        return at_once(work, work.recipe.experts[0])

    if tries == 1:
        with pytest.raises(HubError):
            asking()
    else:
        assert asking().revision == COMMIT
    assert server.count("refs") == tries
