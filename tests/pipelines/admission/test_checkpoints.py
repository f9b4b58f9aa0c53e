"""A checkpoint on the Hub and the base that it names get the saved token only where allowed."""

import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import meteora
from meteora.artifacts import MeteoraError, file_sha256
from meteora.checkpoint.manifest import EXPERTS, MANIFEST, BaseEntry, CheckpointError, Manifest
from meteora.checkpoint.resolve import base_download
from pipelines.admission import checkpoints
from pipelines.hub.errors import HubConnectionError, InsecureEndpointError
from pipelines.workspace import machine
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.cli.forked import Forks
from tests.pipelines.hub.hub_server import HubServer, Main, Repo, running_hub

COMMIT = "b" * 40


@pytest.fixture(scope="module")
def manifest(world: World) -> Manifest:
    """Of a checkpoint whose base is of `other`."""
    fingerprint = world.manifest.base.fingerprint
    files = {EXPERTS: file_sha256(world.checkpoint / EXPERTS)}
    return replace(world.manifest, base=BaseEntry("other/base", COMMIT, fingerprint), files=files)


@pytest.fixture(scope="module")
def server(world: World, manifest: Manifest) -> Generator[HubServer]:
    """A Hub with that checkpoint, of `org`; of `org/earlier` only a commit has it."""
    with running_hub() as server:
        fused = {
            MANIFEST: manifest.to_json().encode(),
            EXPERTS: (world.checkpoint / EXPERTS).read_bytes(),
        }
        base = {path.name: path.read_bytes() for path in world.base.iterdir()}
        server.repos = {"org/fused": Main(fused), "other/base": Main(base, COMMIT)}
        server.repos["org/earlier"] = Repo(fused, COMMIT)  # its branch has gone on
        server.repos["org/vast"] = Main(fused, listed_sizes={EXPERTS: 1 << 50})
        server.repos["other/vast"] = Main(base, COMMIT, listed_sizes={"model.safetensors": 1 << 50})
        yield server


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    """A checkpoint on this disk, of which nothing but its manifest is there."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


class Asking:
    """Commands in a process where a token is saved, and where they keep what they download."""

    def __init__(self, server: HubServer, folder: Path, **more: str) -> None:
        self.server, self.folder = server, folder
        told = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_saved"}
        told |= {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
        self.forks = Forks(told | more)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        self.server.requests.clear()
        return self.forks.run(*words, "--home", str(self.folder / "home"))

    def generate(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Answer a prompt with the checkpoint."""
        return self.run("generate", "org/fused", "hello", "--max-new-tokens", "1", *words)

    @contextmanager
    def nothing_kept(self) -> Generator[None]:
        """As if nothing had been downloaded yet."""
        aside = (self.folder / "cache").rename(self.folder / "aside")
        try:
            yield
        finally:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            aside.rename(self.folder / "cache")


@pytest.fixture(scope="module")
def asking(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Generator[Asking]:
    asking = Asking(server, tmp_path_factory.mktemp("asked"))
    with asking.forks:
        yield asking


@pytest.fixture(scope="module")
def answer(asking: Asking) -> str:
    """What is answered without a token; checkpoint and base are in the cache then."""
    said = asking.generate()
    assert said.returncode == 0, said.stderr
    assert {"/other/base" in path for _, path, _ in asking.server.requests} == {True, False}
    assert [r for r in asking.server.requests if r[2]] == []
    return said.stdout


def owners_with_token(server: HubServer) -> set[str]:
    """The owners that were sent a token."""
    paths = [path for _, path, token in server.requests if token]
    return {owner for owner in ("org", "other") for path in paths if f"/{owner}/" in path}


@pytest.mark.usefixtures("answer")  # for which no token was sent
def test_the_saved_token_goes_only_to_owners_that_are_named(asking: Asking) -> None:
    with asking.nothing_kept():
        said = asking.generate("--token-for", "org")
    assert said.returncode == 0, said.stderr
    assert owners_with_token(asking.server) == {"org"}


@pytest.mark.parametrize(
    ("name", "asked", "sent"),
    [
        ("org/fused", {}, False),
        ("org/fused", {"token": "hf_given"}, False),
        ("other/fused", {"token": "hf_given"}, "hf_given"),
        ("other/fused", {}, None),  # as transformers has it: the saved one
    ],
)
def test_a_given_token_is_for_the_base_of_the_same_owner_only(
    world: World, manifest: Manifest, name: str, asked: dict[str, str], sent: object
) -> None:
    assert base_download(name, manifest, asked)["token"] == sent
    local = base_download(world.checkpoint, manifest, asked)
    assert local["token"] == asked.get("token", False)


def test_plain_http_is_refused_for_a_checkpoint_and_for_its_base(
    world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(InsecureEndpointError, match="is not https"):
        checkpoints.find("org/fused", tmp_path)
    with pytest.raises(InsecureEndpointError, match="is not https"):
        checkpoints.find(str(folder), tmp_path)
    found = checkpoints.find(str(folder), tmp_path, world.base)  # then nothing is downloaded
    assert (found.base_folder, found.download) == (world.base, {})


def test_without_a_network_a_checkpoint_and_its_base_are_a_sentence_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.endpoint)
    monkeypatch.setattr(checkpoints, "cached", lambda *_: None)
    with pytest.raises(HubConnectionError, match=r"org/fused: .* cannot be reached"):
        checkpoints.find("org/fused", tmp_path)
    with pytest.raises(HubConnectionError, match=r"other/base: .* cannot be reached"):
        checkpoints.find(str(folder), tmp_path)
    monkeypatch.setattr(checkpoints, "cached", lambda *_: folder)  # then nobody is asked
    assert checkpoints.find(str(folder), tmp_path).download == {"token": False}


@pytest.mark.usefixtures("answer")  # which leaves something to put aside
def test_what_the_hub_has_is_measured_and_its_base_comes_into_the_home(
    asking: Asking, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab", "response": "b"}\n')
    asked = f"sums=jsonl:{rows}"
    with asking.nothing_kept():
        said = asking.run("benchmark", "org/fused", "--tasks", asked, "--compare", "base")
    assert said.returncode == 0, said.stderr
    assert "it is taken in as router:" in said.stderr
    assert [r for r in asking.server.requests if r[2]] == []
    home = asking.folder / "home"
    ledger = Ledger(home)
    bases = ledger.query("SELECT base_model, base_revision FROM base_models").rows
    assert bases == [("other/base", COMMIT)]
    assert len(list((home / "bases").iterdir())) == 1
    assert ledger.query("SELECT task, num_samples FROM leaderboard").rows == [("sums", 1)]

    with asking.nothing_kept():  # a server is asked again for what was recorded
        said = asking.run("verify", "org/fused", "--served", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9/v1/models does not answer" in said.stderr
    assert [path for _, path, _ in asking.server.requests if EXPERTS in path] == []


def test_what_is_neither_here_nor_on_the_hub_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MeteoraError, match="there is no such folder"):
        checkpoints.find("../no/such/folder", tmp_path)


@pytest.mark.usefixtures("answer")  # the base is in the cache then
def test_a_checkpoint_of_the_hub_may_be_named_at_a_revision(asking: Asking, answer: str) -> None:
    """`meteora publish` prints the commit in this form."""
    said = asking.run("generate", f"org/earlier@{COMMIT}", "hello", "--max-new-tokens", "1")
    assert (said.returncode, said.stdout) == (0, answer), said.stderr
    missing = asking.run("export", "org/earlier@v9", "--expert", "sums")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: org/earlier: ")
    assert "v9 is not a valid git identifier" in missing.stderr


def test_a_vast_checkpoint_or_base_is_refused_before_any_of_it_is_downloaded(
    asking: Asking, manifest: Manifest, folder: Path
) -> None:
    """The Hub's own client has no limit, and a stranger's checkpoint names any base."""
    vast_base = replace(manifest, base=replace(manifest.base, repo_id="other/vast"))
    (folder / MANIFEST).write_text(vast_base.to_json())
    for named, refused in (("org/vast", "org/vast at aaaa"), (str(folder), "other/vast at bbbb")):
        said = asking.run("generate", named, "hello")
        assert (said.returncode, said.stdout) == (1, "")
        assert said.stderr.startswith(f"error: {refused}")
        assert "download it yourself, and give its folder" in said.stderr
        assert asking.server.count("get") == 0


def test_a_folder_here_may_have_the_name_of_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("org/fused@v1")
    folder.mkdir(parents=True)
    assert checkpoints.find_folder(str(folder), tmp_path) == folder


def test_offline_it_comes_from_the_cache_or_there_is_one_sentence(
    asking: Asking, answer: str
) -> None:
    offline = Asking(asking.server, asking.folder, HF_HUB_OFFLINE="1")
    with offline.forks:
        assert offline.generate().stdout == answer
        with offline.nothing_kept():
            failed = offline.generate()
    assert not asking.server.requests
    assert (failed.returncode, failed.stdout) == (1, "")
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: org/fused: ")


def test_a_checkpoint_without_its_experts_is_a_sentence(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.checkpoint, tmp_path / "checkpoint")
    (folder / EXPERTS).unlink()
    with pytest.raises(CheckpointError, match=f"there is no {EXPERTS} in it"):
        checkpoints.find(str(folder), tmp_path, world.base).load()


def test_a_base_of_the_hub_counts_where_a_model_may_be_too_large(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checkpoints.find(str(world.checkpoint), tmp_path, world.base)
    monkeypatch.setattr(checkpoints, "base_files", lambda *_: world.base)
    of_hub = replace(found, base_folder=None)  # its download is that of `load`
    assert (
        of_hub._num_bytes()
        == found._num_bytes()
        > (world.base / "model.safetensors").stat().st_size
    )


def test_a_model_that_one_device_does_not_hold_is_spread_where_nothing_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Accelerate makes of it is its own; here the whole machine is one device."""
    asked: list[dict[str, Any]] = []
    own = meteora.load

    def watched(*given: Any, **more: Any) -> Any:
        asked.append({key: more[key] for key in ("device", "device_map")})
        return own(*given, **more)

    monkeypatch.setattr(meteora, "load", watched)
    for most, device in ((0.6, "auto"), (0, "auto"), (0, "cpu")):
        monkeypatch.setattr(machine, "MOST", most)
        checkpoints.find(str(world.checkpoint), tmp_path, world.base, device=device).load()
    on_cpu = {"device": "cpu", "device_map": None}
    assert asked == [on_cpu, {"device": None, "device_map": "auto"}, on_cpu]
