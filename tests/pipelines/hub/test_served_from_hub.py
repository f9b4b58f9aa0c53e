"""A folder that vLLM serves comes from the Hub, and is checked as one on this disk is."""

import json
import shutil
from collections.abc import Generator
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from meteora.artifacts import RouterOptions
from meteora.base.sources import SourceError
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, CheckpointError
from meteora.model.fused import WrongBaseError
from meteora.serving.served_folder import export_for_vllm, find_served_checkpoint
from meteora.serving.vllm_version import UnservableError
from tests.conftest import World
from tests.meteora.serving.served_world import with_router
from tests.pipelines.admission.test_checkpoints import Main
from tests.pipelines.hub.hub_server import HubServer, running_hub

PLENTY = 1 << 40


@pytest.fixture
def server(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[HubServer]:
    """A Hub with a folder that `meteora export --for vllm --copy` wrote, and an empty cache."""
    options = RouterOptions("gate", 1, 1.0, opening="shared", share="point")
    made = with_router(world.checkpoint, world.manifest, world.base, options, tmp_path / "made")
    export_for_vllm(made, world.base, tmp_path / "out", copy=True)
    with running_hub() as server:
        url = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server


def put(server: HubServer, folder: Path) -> str:
    """Have the Hub show a folder, in a new repository."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    name = f"org/served{len(server.repos)}"
    server.repos[name] = Main(files)
    return name


def test_it_comes_whole_and_once(server: HubServer, tmp_path: Path) -> None:
    name = put(server, tmp_path / "out")
    found = find_served_checkpoint(name, None, PLENTY)
    assert {path.name for path in found.iterdir()} == {MANIFEST, EXPERTS, GATES}
    assert {path.name for path in found.parent.glob("*.safetensors")} == {"model.safetensors"}
    assert find_served_checkpoint(name, "main", PLENTY) == found
    got = [path for kind, path, _ in server.requests if kind == "get"]
    assert sum(path.endswith(".safetensors") for path in got) == 3


def test_another_base_is_refused_before_any_weights_come(server: HubServer, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    other = json.dumps(config | {"num_attention_heads": 2})
    (tmp_path / "out" / "config.json").write_text(other)
    name = put(server, tmp_path / "out")
    with pytest.raises(WrongBaseError, match="this base has num_attention_heads 2"):
        find_served_checkpoint(name, None, PLENTY)
    assert not any(path.endswith(".safetensors") for _, path, _ in server.requests)


def test_other_weights_and_too_little_memory_are_refused(server: HubServer, tmp_path: Path) -> None:
    name = put(server, tmp_path / "out")
    with pytest.raises(UnservableError, match=r"take at least 0\.0 GB"):
        find_served_checkpoint(name, None, 10_000)
    weights = tmp_path / "out" / "model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(other, weights)
    name = put(server, tmp_path / "out")
    with pytest.raises(WrongBaseError, match="it holds other weights than at the export"):
        find_served_checkpoint(name, None, PLENTY)
    weights.unlink()
    name = put(server, tmp_path / "out")
    with pytest.raises(SourceError, match="does not come from the Hub"):
        find_served_checkpoint(name, None, PLENTY)
    shutil.rmtree(tmp_path / "out" / "meteora")
    name = put(server, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no fused checkpoint of that name"):
        find_served_checkpoint(name, None, PLENTY)
