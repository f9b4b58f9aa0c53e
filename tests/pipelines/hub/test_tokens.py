"""One rule for the saved token: it goes only to owners that the user names, whatever is asked."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import DatasetInfo, HfApi
from typer.main import get_command

import meteora
from meteora.artifacts import ArtifactId, Publication
from meteora.checkpoint.manifest import MANIFEST, BaseEntry
from pipelines.admission import checkpoints
from pipelines.admission.sources import token_of_rows
from pipelines.cli.app import app
from pipelines.data.row_sources import ExamplesError, read_rows
from pipelines.flows import flow
from pipelines.flows.up_to_date import Look
from pipelines.hub.client import Hub, hub_of
from pipelines.hub.errors import HubTokenError, InsecureEndpointError
from pipelines.hub.upload import describe_destination
from pipelines.publishing import publish, reload_worker
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.stage import Stage
from pipelines.workspace.context import RunContext
from pipelines.workspace.environment import SETTINGS
from tests.conftest import World
from tests.pipelines.admission.test_discover import COMMIT, adapter_repo
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.hub.hub_server import running_hub

ROOT = Path(__file__).parents[3]
WITH_OPTION = {
    "add", "benchmark", "chat", "chat-server", "check", "drop", "export", "generate", "publish",
    "report", "verify",
}  # fmt: skip
BY_RECIPE = {"run", "schedule", "serve"}


@pytest.fixture(autouse=True)
def _saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_saved")


def test_one_function_takes_the_saved_token() -> None:
    sources = [path for room in ("meteora", "pipelines") for path in (ROOT / room).rglob("*.py")]
    taking = {path.name: path.read_text().count("get_token()") for path in sources}
    assert {name: count for name, count in taking.items() if count} == {"client.py": 1}
    assert not [path for path in sources if "token=True" in path.read_text()]


def test_every_command_that_asks_the_hub_takes_the_option() -> None:
    commands: Any = get_command(app)
    names = {name: {one.name for one in c.params} for name, c in commands.commands.items()}
    assert {name for name, options in names.items() if "token_for" in options} == WITH_OPTION
    naming = {
        name
        for name, command in commands.commands.items()
        if any(word in str(one.help) for one in command.params for word in ("Hub", "owner/name"))
    }
    assert naming - BY_RECIPE <= WITH_OPTION


def test_libraries_send_no_token_by_themselves_in_any_command(tmp_path: Path) -> None:
    """A process of its own: in that of these tests the settings are there from the beginning."""
    code = (
        "import contextlib, sys; from pipelines.cli.app import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "from huggingface_hub.utils import build_hf_headers; print(build_hf_headers())"
    )
    words = ["check", str(tmp_path / "none"), "--home", str(tmp_path / "home")]
    bare = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    said = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True, env=bare
    )
    assert "there is nothing here" in said.stdout
    assert "user-agent" in said.stdout
    assert "hf_saved" not in said.stdout


@pytest.mark.usefixtures("called_here")
def test_data_sets_get_it_where_the_recipe_names_their_owner(
    recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, object] = {}

    def load_dataset(name: str, _config: object, **asked: Any) -> list[dict[str, str]]:
        assert sent[name] == asked["token"]
        return [{"prompt": "a", "response": "b"}]

    def dataset_info(_api: HfApi, name: str, **asked: Any) -> DatasetInfo:
        sent[name] = asked["token"]
        return DatasetInfo(id=name, sha=f"{len(sent)}" * 40)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    recipe = Recipe.load(recipe_folder / "recipe.yaml")
    named = recipe.model_copy(update={"hub": recipe.hub.model_copy(update={"token_for": ("me",)})})
    for name in ("me/mine", "you/yours"):
        assert read_rows(f"hf:{name}", tmp_path, 1, token_of_rows(named.hub))
    assert sent == {"me/mine": "hf_saved", "you/yours": False}
    assert read_rows("hf:me/mine", tmp_path, 1)
    assert sent["me/mine"] is False
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(InsecureEndpointError):
        read_rows("hf:me/mine", tmp_path, 1, token_of_rows(named.hub))


def test_a_recipe_alone_sends_it_to_no_server(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    mirror = "https://mirror.example"
    hub = {"endpoint": f"{mirror}/", "token_for": ["me"]}
    work = workplace(publish={"repo": "me/model"}, hub=hub)
    run: Any = SimpleNamespace(context=work)
    for ask_for_it in (
        lambda: hub_of(work.recipe, "me/base"),
        lambda: describe_destination(work),
        lambda: flow._stages(run, Stage.publish, Look(None)),
    ):
        with pytest.raises(HubTokenError, match=f"set HF_ENDPOINT={mirror}, or else take"):
            ask_for_it()
    assert hub_of(work.recipe, "you/base").token is None
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    assert hub_of(work.recipe, "me/base") == Hub(f"{mirror}/", "hf_saved")
    monkeypatch.setenv("HF_ENDPOINT", "https://another.example")
    work = workplace(hub=hub | {"endpoint": "https://huggingface.co"})
    assert hub_of(work.recipe, "me/base").token == "hf_saved"  # noqa: S105


@pytest.mark.usefixtures("called_here")
def test_a_private_data_set_says_how_it_gets_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset_info(*_args: object, **_asked: object) -> None:
        raise FileNotFoundError("not there, or private")

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    with pytest.raises(ExamplesError, match="name its owner in the recipe under hub, token_for"):
        read_rows("hf:me/mine", tmp_path, 1)


@pytest.mark.parametrize(
    ("words", "to_base"), [([], False), (["--token-for", "other"], "hf_saved")]
)
def test_publish_sends_it_there_and_to_the_owner_of_the_base_only_if_named(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    to_base: object,
) -> None:
    fingerprint = world.manifest.base.fingerprint
    manifest = replace(world.manifest, base=BaseEntry("other/base", "b" * 40, fingerprint))
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / MANIFEST).write_text(manifest.to_json())
    seen: list[tuple[checkpoints.FoundCheckpoint, publish.Destination]] = []

    def take(
        _ledger: object, found: checkpoints.FoundCheckpoint, to: publish.Destination, _run: object
    ):
        seen.append((found, to))
        return Publication(ArtifactId("router:a"), to.repo_id, "c" * 40, tag="tag"), True

    monkeypatch.setattr(publish, "publish", take)
    monkeypatch.setattr(checkpoints, "cached", lambda *_: tmp_path)  # the base is here
    words = [*words, "--device", "cpu", "--dtype", "float32"]
    said = done("publish", tmp_path / "fused", "org/model", "--home", tmp_path / "home", *words)
    ((found, to),) = seen
    assert (found.device, found.dtype) == ("cpu", "float32")
    words[words.index("cpu")] = "cuda:99"
    said = ask("publish", tmp_path / "fused", "org/model", "--home", tmp_path / "home", *words)
    assert "torch finds no device 'cuda:99'" in said.stderr
    assert (said.returncode, len(seen)) == (1, 1)
    assert to.hub.token == "hf_saved"  # noqa: S105
    assert found.download == {"token": to_base}


def test_the_process_that_compares_loads_as_it_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    model = world.load()

    def load(_folder: Path, **options: object) -> object:
        asked.append([options[name] for name in ("download", "device", "dtype")])
        return model, None

    monkeypatch.setattr(meteora, "load", load)
    monkeypatch.setattr(reload_worker, "encode_prompt", lambda *_: [1, 2, 3])
    monkeypatch.setattr(reload_worker, "find_checkpoint", lambda *_, **__: world.checkpoint)
    there: dict[str, Any] = {"folder": "x", "repo_id": "org/model", "revision": "main", "names": []}
    how = {"download": {"token": False}, "device": "cpu", "dtype": "bfloat16"}
    found = reload_worker.compare(**there, cache_dir=str(tmp_path), base_folder=None, **how)
    assert found["difference"] == 0
    assert asked == [[{"token": False}, "cpu", "bfloat16"]] * 2


def test_it_is_written_nowhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as server:
        server.repos["org/adapter"] = adapter_repo(world.adapters["q_and_v"])
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        said = ask("check", f"org/adapter@{COMMIT}", "--token-for", "org", "--home", tmp_path)
        assert {token for _, _, token in server.requests} == {"Bearer hf_saved"}
    assert said.returncode == 0, said.stdout
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(b"hf_saved" in text for text in (*written, (said.stdout + said.stderr).encode()))
