"""`meteora check`: one verdict for each adapter, from a folder or over real HTTP from a Hub."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pipelines.admission.check import inspect
from tests.meteora.adapters.adapter_maker import pair, write_adapter
from tests.pipelines.cli.command_line import done, meteora
from tests.pipelines.hub.hub_server import Fault, HubServer, Repo, running_hub

COMMIT = "a" * 40
CARD = b"---\nlicense: mit\nbase_model: org/base\n---\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub_here: None,  # noqa: ARG001
) -> Generator[HubServer]:
    sound = files_of(write_adapter(tmp_path / "sound"))
    head = {"base_model.model.lm_head.weight": ("F32", (9, 8), 1.0)}
    inner = write_adapter(tmp_path / "inner", pair("model.layers.0.self_attn.q_proj") | head)
    with running_hub() as server:
        server.repos["org/adapter"] = Repo(
            {"README.md": CARD, **sound},
            refs={"main": COMMIT},
            card={"license": "mit", "base_model": "org/base"},
        )
        server.repos["org/nested"] = Repo(
            {f"inner/{name}": data for name, data in files_of(inner).items()},
            refs={"main": COMMIT},
        )
        server.repos["org/pickled"] = Repo(
            {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x02"}, refs={"main": COMMIT}
        )
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_a_repository_is_judged_and_its_facts_are_told(server: HubServer, tmp_path: Path) -> None:
    said = meteora("check", "org/adapter", "org/pickled", "--json", home=tmp_path / "home")
    assert said.returncode == 1, said.stderr
    sound, pickled = json.loads(said.stdout)
    facts: dict[str, Any] = {
        "path": "org/adapter", "verdict": "accept", "reasons": [], "judged_by": "tensors",
        "repo_id": "org/adapter", "revision": COMMIT, "licence": "mit", "author": "org",
        "base_models": ["org/base"], "downloads": 7, "r_max": 4, "num_modules": 4,
    }  # fmt: skip
    assert facts.items() <= sound.items()
    assert (pickled["path"], pickled["verdict"]) == ("org/pickled", "refuse")
    (reason,) = pickled["reasons"]
    assert reason["code"] == "hub"
    assert "pickle, which can run code" in reason["message"]
    assert not any(path.endswith(".bin") for kind, path, _ in server.requests if kind == "get")

    said = done("check", f"org/adapter@{COMMIT}", "--home", tmp_path / "home")
    assert said.stdout.splitlines() == [
        f"accept  org/adapter@{COMMIT}",
        "        r 4, scaling 2, on 4 modules (q_proj, v_proj); F32, 0.0 MB; base org/base",
        f"        at commit {COMMIT}, licence mit",
    ]


@pytest.mark.usefixtures("server")
def test_a_folder_of_a_repository_is_judged_by_a_recipe_s_policy(tmp_path: Path) -> None:
    whole = inspect("org/nested", tmp_path / "cache")
    assert "say which of its folders is meant with subfolder: inner" in whole.reasons[0].message
    command = ("check", "org/nested", "--subfolder", "inner")
    said = meteora(*command, home=tmp_path / "home")
    assert said.returncode == 1
    assert "[modules_to_save]" in said.stdout
    said = done(*command, "--strip", "--json", "--home", tmp_path / "home")
    (verdict,) = json.loads(said.stdout)
    assert verdict["stripped"] == ["base_model.model.lm_head.weight"]
    assert verdict["subfolder"] == "inner"


def test_a_repository_whose_config_is_refused_is_judged_by_it_alone(
    server: HubServer, tmp_path: Path
) -> None:
    repo = server.repos["org/adapter"]
    claims = json.loads(repo.files["adapter_config.json"]) | {"use_dora": True}
    repo.files["adapter_config.json"] = json.dumps(claims).encode()
    said = meteora("check", "org/adapter", home=tmp_path / "home")
    assert said.returncode == 1, said.stderr
    assert said.stdout.splitlines()[1:3] == [
        "        judged by what its config claims: its weights were not downloaded",
        f"        at commit {COMMIT}, licence mit",
    ]
    assert "[dora]" in said.stdout
    (verdict,) = json.loads(meteora("check", "org/adapter", "--json", home=tmp_path).stdout)
    facts = {"verdict": "refuse", "judged_by": "claims", "author": "org", "revision": COMMIT}
    assert facts.items() <= verdict.items()
    assert not any(path.endswith(".safetensors") for _, path, _ in server.requests)


FAULTS = {
    "gated": ("refs", Fault(403, {"X-Error-Code": "GatedRepo"}), "hub", "--token-for"),
    "private": ("refs", Fault(401), "hub", "does not exist at"),
    "missing": ("refs", Fault(404), "hub", "does not exist at"),
    "limited": ("refs", Fault(429), "hub_unavailable", "too many requests"),
    "down": ("tree", Fault(503), "hub_unavailable", "a fault of its own"),
    "cut_short": ("get", Fault(body=b"x" * 9, path=".safetensors"), "hub_unavailable", "length"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_hub_does_wrong_is_a_verdict_too(
    name: str, server: HubServer, tmp_path: Path
) -> None:
    kind, fault, code, words = FAULTS[name]
    server.faults[kind] = fault
    verdict = inspect("org/adapter", tmp_path)
    assert verdict.verdict == "refuse"
    assert [reason.code for reason in verdict.reasons] == [code]
    assert words in verdict.reasons[0].message


def test_the_saved_token_goes_to_whom_it_is_meant_for(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    server.tokens["hf_saved"] = "read"
    server.repos["org/adapter"].private = True
    assert inspect("org/adapter", tmp_path).verdict == "refuse"
    assert {token for _, _, token in server.requests} == {""}
    assert inspect("org/adapter", tmp_path, token_for=["else"]).verdict == "refuse"
    assert inspect("org/adapter", tmp_path, token_for=["org"]).verdict == "accept"


def test_a_config_alone_is_judged_by_its_claims_and_that_is_said(tmp_path: Path) -> None:
    config = write_adapter(tmp_path) / "adapter_config.json"
    alone = config.rename(tmp_path / "alone.json")
    said = done("check", alone, "--home", tmp_path)
    assert said.stdout.splitlines() == [
        f"accept  {alone}",
        "        judged by what its config claims: there are no weights beside it",
    ]
    (verdict,) = json.loads(meteora("check", alone, "--json", home=tmp_path).stdout)
    assert verdict["judged_by"] == "claims"


def test_what_can_be_no_path_and_no_repository_gets_a_verdict(tmp_path: Path) -> None:
    for where in ("a" * 300, "path:nowhere", "x/y/z", "", "https://example.org/a/b"):
        verdict = inspect(where, tmp_path)
        assert verdict.verdict == "refuse", where


@pytest.mark.usefixtures("server")
def test_a_home_that_cannot_be_written_is_a_verdict_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    verdict = inspect("org/adapter", tmp_path / "file")
    assert [reason.code for reason in verdict.reasons] == ["disk"]
    assert "give another --home" in verdict.reasons[0].message
