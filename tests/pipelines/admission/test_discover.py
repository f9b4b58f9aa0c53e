"""Adapters that a recipe does not name but lets be found, over real HTTP."""

import json
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from meteora.artifacts import MeteoraError
from pipelines.admission import sources
from pipelines.hub.errors import HubError
from pipelines.recipe.recipe import ExpertSection
from pipelines.reports import queries
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.conftest import (
    base_of,
    finished,
    letters,
    plan_of,
    print_steps,
    result_of,
    run,
)
from tests.pipelines.hub.hub_server import Fault, HubServer, Repo, running_hub

COMMIT = "a" * 40
TAG = "base_model:adapter:org/base"


def adapter_repo(folder: Path, **config: object) -> Repo:
    """An adapter as its repository, with some of its config changed."""
    claims = json.loads((folder / "adapter_config.json").read_text()) | config
    files = {
        "adapter_config.json": json.dumps(claims).encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }
    card = {"tags": [TAG], "license": "mit", "base_model": "org/base"}
    return Repo(files, refs={"main": COMMIT}, card=card)


@pytest.fixture
def server(world: World, hub_here: None) -> Generator[HubServer]:  # noqa: ARG001
    with running_hub() as server:
        server.repos["z/letters"] = adapter_repo(world.adapters["q_and_v"])
        server.repos["b/attention"] = adapter_repo(world.adapters["attention"])
        server.repos["c/pickled"] = Repo({"adapter_model.bin": b"\x80\x02"}, card={"tags": [TAG]})
        server.repos["d/dora"] = adapter_repo(world.adapters["all_seven"], use_dora=True)
        server.repos["zz/copy"] = adapter_repo(world.adapters["q_and_v"])
        server.repos["x/other"] = Repo({}, card={"tags": ["base_model:adapter:org/other"]})
        yield server


@pytest.fixture
def found(
    server: HubServer, workplace: Callable[..., RunContext], recipe_folder: Path
) -> Callable[..., RunContext]:
    """A function that opens a recipe that names no expert."""
    rows = letters("q_and_v", 2, 4)
    (recipe_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(
        workplace,
        experts=[],
        discover={"base": "org/base"},
        router={"kind": "arrow"},
        benchmark={
            "tasks": [{"name": "letters", "rows": "jsonl:rows.jsonl"}],
            "compare": ["base"],
            "max_new_tokens": 2,
        },
        hub={"endpoint": server.endpoint},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_run_takes_the_sound_ones_it_finds_and_says_why_not_the_others(
    found: Callable[..., RunContext],
    server: HubServer,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And as soon as one of them moves, there is a new stack to make."""
    work = found()
    run(work)
    planned, _ = result_of(work)
    assert planned.fused.names == ("b--attention", "z--letters")
    assert {expert.ref.revision for expert in planned.experts} == {COMMIT}

    said = capsys.readouterr().err
    assert said.count("found 5 adapters on the Hub") == 1
    left_out = [line for line in said.splitlines() if line.startswith("left out:")]
    assert [line.split()[2] for line in left_out] == ["c--pickled:", "d--dora:", "zz--copy:"]
    rows = work.ledger.query("SELECT name, verdict, codes, licence FROM adapters ORDER BY name")
    verdicts = {name: (verdict, codes[-1:]) for name, verdict, codes, _ in rows.rows}
    assert verdicts["c--pickled"] == ("refuse", ["hub"])
    assert verdicts["d--dora"] == ("refuse", ["dora"])
    assert verdicts["zz--copy"] == ("refuse", ["same_adapter"])
    assert {verdicts[name][0] for name in planned.fused.names} == {"warn"}  # a base that is a path
    assert {row[3] for row in rows.rows if row[1] == "warn"} == {"mit"}

    of_b, of_d = work.ledger.query(
        "SELECT licence, author, base_models, downloads, revision FROM adapters"
        " WHERE name IN ('b--attention', 'd--dora') ORDER BY name"
    ).rows
    assert of_b == ("mit", "b", ["org/base"], 7, COMMIT)
    assert of_d == ("mit", "d", ["org/base"], 7, COMMIT)  # of a refused one, too

    looked_at = queries.run_queries(work.ledger, planned.router.id)["adapters"].rows
    assert [(row["name"], row["verdict"]) for row in looked_at] == [
        ("c--pickled", "refuse"), ("d--dora", "refuse"), ("zz--copy", "refuse"),
        ("b--attention", "warn"), ("z--letters", "warn"),
    ]  # fmt: skip

    assert not any("d/dora" in p and ".safetensors" in p for _, p, _ in server.requests)
    print_steps(work)
    assert "d--dora: d/dora at aaaaaaaaaaaa, refused: " in capsys.readouterr().out

    downloaded = server.count("get")
    run(found())
    assert server.count("get") == downloaded

    moved = adapter_repo(world.adapters["patterns"])
    server.repos["b/attention"] = replace(moved, commit="b" * 40, refs={"main": "b" * 40})
    assert finished(found()) is None
    run(work, "stack")
    assert work.ledger.query("SELECT count(*) FROM artifacts WHERE kind = 'fused'").rows == [(2,)]
    revisions = "SELECT revision FROM adapters WHERE name = 'b--attention' ORDER BY ALL"
    assert work.ledger.query(revisions).rows == [(COMMIT,), ("b" * 40,)]


def find_experts(work: RunContext) -> list[str]:
    planned = plan_of(work)
    return [expert.name for expert in planned.experts]


def expanded(work: RunContext) -> RunContext:
    return replace(work, recipe=sources.discover(work.recipe))


def test_tags_and_a_limit_narrow_what_is_found(
    found: Callable[..., RunContext], server: HubServer
) -> None:
    server.repos["b/attention"].card["tags"].append("letters")
    tagged = expanded(found(discover={"base": "org/base", "tags": ["letters"]}))
    assert [expert.adapter for expert in tagged.recipe.experts] == [f"b/attention@{COMMIT}"]
    assert find_experts(tagged) == ["b--attention"]
    assert (
        len(sources.discover(found(discover={"base": "org/base", "limit": 2}).recipe).experts) == 2
    )


def test_a_named_expert_is_not_found_a_second_time(found: Callable[..., RunContext]) -> None:
    work = expanded(found(experts=[{"name": "b--attention", "adapter": "z/letters"}]))
    names = {expert.name: expert.adapter for expert in work.recipe.experts}
    assert names["b--attention"] == "z/letters"
    (other,) = (name for name, adapter in names.items() if adapter.startswith("b/attention@"))
    assert other.startswith("b--attention-")
    assert not any(adapter.startswith("z/letters@") for adapter in names.values())


def test_a_fault_of_the_hub_itself_leaves_nothing_out(
    found: Callable[..., RunContext], server: HubServer
) -> None:
    """Else two runs of one recipe would stack different adapters, by the weather."""
    work = expanded(found())
    server.faults["tree"] = Fault(status=200, body=b"<html>the Hub is being repaired</html>")
    with pytest.raises(HubError):
        find_experts(work)


@pytest.mark.parametrize("gone", ["gone/adapter", "z/letters@v9", f"z/letters@{'b' * 40}"])
def test_an_adapter_that_the_hub_does_not_have_is_refused_like_others(
    gone: str, found: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    named = [{"name": "gone", "adapter": gone}, {"name": "here", "adapter": "z/letters"}]
    skipping = found(experts=named, discover=None, policy={"on_refused": "skip"})
    print_steps(skipping)
    assert f"gone: {gone}, refused: {gone.partition('@')[0]} " in capsys.readouterr().out
    assert find_experts(skipping) == ["here"]
    assert "left out: gone: " in capsys.readouterr().err
    verdicts = skipping.ledger.query("SELECT repo_id, verdict FROM adapters WHERE name = 'gone'")
    assert verdicts.rows == [(gone.partition("@")[0], "refuse")]
    with pytest.raises(HubError):
        find_experts(found(experts=named, discover=None))


def test_where_nothing_is_found_or_usable_there_is_nothing_to_stack(
    found: Callable[..., RunContext], server: HubServer
) -> None:
    with pytest.raises(MeteoraError, match="no adapter was found"):
        print_steps(found(discover={"base": "org/nobody"}, router={"kind": "prompt"}))
    server.repos = {"c/pickled": server.repos["c/pickled"]}
    with pytest.raises(MeteoraError, match="of 1 adapter none can be used"):
        find_experts(expanded(found()))


def test_a_dry_run_resolves_and_downloads_nothing(
    found: Callable[..., RunContext], server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the base is known already, so that nothing else is left to be looked at."""
    for name in ("b/attention", "d/dora", "zz/copy"):
        del server.repos[name]
    work = found()
    base_of(work)
    assert finished(work) is None
    print_steps(work)
    assert not server.count("get")
    assert not work.adapters_folder.exists()
    said = capsys.readouterr().out
    assert f"z--letters: z/letters at {COMMIT[:12]}, 0.0 MB to download" in said
    assert "c--pickled: c/pickled at aaaaaaaaaaaa, refused: " in said
    find_experts(expanded(work))
    print_steps(work)
    assert f"z--letters: z/letters at {COMMIT[:12]}, here already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repo_id", "taken", "name"),
    [
        ("org/name", set(), "org--name"),
        ("org/name", {"org--name"}, "org--name-"),
        ("o" * 90 + "/name", set(), "o" * 55 + "-"),
    ],
)
def test_names_of_found_adapters_are_names(repo_id: str, taken: set[str], name: str) -> None:
    made = sources.name_of(repo_id, taken)
    assert made.startswith(name)
    assert made not in taken
    assert len(made) <= 64
    ExpertSection(name=made, adapter="path:a")


def test_the_saved_token_goes_only_to_whom_the_recipe_names(
    found: Callable[..., RunContext], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    for name in ("d/dora", "zz/copy"):
        del server.repos[name]
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)  # a recipe's own endpoint gets no token
    hub = {"endpoint": server.endpoint, "token_for": ["z", "b/attention"]}
    find_experts(expanded(found(hub=hub)))
    told = {path.split("/")[3] for kind, path, token in server.requests if token and kind == "tree"}
    asked = {path.split("/")[3] for kind, path, _ in server.requests if kind == "tree"}
    assert told == {"z", "b"}
    assert asked == {"z", "b", "c"}
    assert {token for _, _, token in server.requests} == {"", "Bearer hf_saved"}
