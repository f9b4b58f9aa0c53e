"""Against olah, a Hub server that we did not write, which serves git repositories on loopback."""

import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from meteora.artifacts import AdapterRef, BaseSpec
from pipelines.hub import repositories
from pipelines.hub.about import facts_of
from pipelines.hub.adapter import download
from pipelines.hub.card import licence_of
from pipelines.hub.client import Hub
from pipelines.hub.errors import HubError, HubFilesError, HubRevisionError

OLAH = Path(sys.executable).with_name("olah-cli")
CONFIG = """
[basic]
host = "127.0.0.1"
port = {port}
ssl-key = ""
ssl-cert = ""
repos-path = "{folder}/repos"
mirrors-path = ["{folder}/mirrors"]
hf-scheme = "http"
hf-netloc = "127.0.0.1:9"
hf-lfs-netloc = "127.0.0.1:9"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
mirror-lfs-netloc = "127.0.0.1:{port}"

[accessibility]
offline = true
"""
LORA, LORA_OF_RANK_4 = '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": 4}'
CARD = "---\nlicense: apache-2.0\nbase_model: org/base\n---\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "Change files")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("olah")


@pytest.fixture(scope="module")
def repository(mirrors: Path) -> Path:
    folder = mirrors / "mirrors" / "models" / "someone" / "adapter"
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main", ".")
    return folder


@pytest.fixture(scope="module")
def commits(repository: Path) -> tuple[str, str]:
    """The first commit is tagged, the second is where `main` points."""
    adapter = {"adapter_config.json": LORA, "adapter_model.safetensors": "w" * 5_000}
    first = commit(repository, {**adapter, "README.md": CARD})
    git(repository, "tag", "v1")
    nested = {f"nested/{name}": text.replace("w", "n") for name, text in adapter.items()}
    base = {"config.json": "{}", "model.safetensors": "m", "modeling.py": "raise SystemExit"}
    return first, commit(repository, nested | base | {"adapter_config.json": LORA_OF_RANK_4})


@pytest.fixture(scope="module")
def asked(mirrors: Path, commits: tuple[str, str]) -> Generator[Hub]:  # noqa: ARG001
    """A running olah, once there is something that it can serve."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = mirrors / "olah.toml"
    config.write_text(CONFIG.format(port=port, folder=mirrors), encoding="utf-8")
    with (mirrors / "log").open("w") as log:
        server = subprocess.Popen([OLAH, "-c", config], cwd=mirrors, stdout=log, stderr=log)
        try:
            wait_for(port)
            yield Hub(f"http://127.0.0.1:{port}", timeout_seconds=30)
        finally:
            server.terminate()
            server.wait()


def wait_for(port: int) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("olah did not start within 60 s")


def test_branches_tags_and_commits_resolve(asked: Hub, commits: tuple[str, str]) -> None:
    first, second = commits
    assert repositories.resolve("someone/adapter", hub=asked) == AdapterRef(
        "someone/adapter", second
    )
    assert repositories.resolve("someone/adapter@v1", hub=asked).revision == first
    assert repositories.resolve(f"someone/adapter@{first}", hub=asked).revision == first


def test_each_commit_has_its_own_files(
    asked: Hub, commits: tuple[str, str], tmp_path: Path
) -> None:
    configs = []
    for revision in commits:
        folder = download(AdapterRef("someone/adapter", revision), tmp_path, hub=asked)
        configs.append((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert licence_of(folder) == "apache-2.0"
    assert configs == [LORA, LORA_OF_RANK_4]


def test_a_nested_adapter_comes_from_its_folder(
    asked: Hub, commits: tuple[str, str], tmp_path: Path
) -> None:
    ref = repositories.resolve("someone/adapter", subfolder="nested", hub=asked)
    assert ref.revision == commits[1]
    folder = download(ref, tmp_path, hub=asked)
    assert (folder / "adapter_model.safetensors").read_text(encoding="utf-8") == "n" * 5_000


def test_a_base_comes_without_its_code(
    asked: Hub, commits: tuple[str, str], tmp_path: Path
) -> None:
    repositories.download_base(
        BaseSpec("someone/adapter", commits[1]), tmp_path / "base", hub=asked
    )
    names = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]


def test_what_is_not_there_is_said(asked: Hub, commits: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(HubRevisionError, match="it has: main, v1"):
        repositories.resolve("someone/adapter@v2", hub=asked)
    with pytest.raises(HubRevisionError, match="no commit"):
        repositories.resolve(f"someone/adapter@{'0' * 40}", hub=asked)
    with pytest.raises(HubError):
        repositories.resolve("someone/nothing", hub=asked)
    with pytest.raises(HubFilesError):
        download(AdapterRef("someone/adapter", commits[1], "elsewhere"), tmp_path, hub=asked)


def test_licence_and_author_are_known(asked: Hub, commits: tuple[str, str], tmp_path: Path) -> None:
    source = facts_of(AdapterRef("someone/adapter", commits[1]), tmp_path, hub=asked)
    assert source is not None
    assert (source.author, source.licence, source.base_models) == (
        "someone",
        "apache-2.0",
        ("org/base",),
    )
