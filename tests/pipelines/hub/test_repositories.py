"""The real client over real HTTP, against a small Hub on loopback that has the faults asked for."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Generator
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import HfApi, file_download

from meteora.artifacts import AdapterRef, BaseSpec
from meteora.untrusted.findings import AdapterError
from pipelines.hub import adapter, client, repositories, worker
from pipelines.hub.about import HubSource, facts_of
from pipelines.hub.adapter import download, downloaded
from pipelines.hub.card import licence_of
from pipelines.hub.client import Hub, is_loopback
from pipelines.hub.errors import (
    HubAccessError,
    HubConnectionError,
    HubDamageError,
    HubDisabledError,
    HubDiskError,
    HubError,
    HubFilesError,
    HubGatedError,
    HubHashError,
    HubNotFoundError,
    HubOfflineError,
    HubProtocolError,
    HubRateLimitError,
    HubReferenceError,
    HubRevisionError,
    HubServerError,
    HubSizeError,
    HubTimeoutError,
    HubTokenError,
    InsecureEndpointError,
    UnusableRepositoryError,
)
from pipelines.hub.snapshot import locked
from pipelines.workspace import console
from tests.pipelines.hub.hub_server import Fault, HubServer, Repo, running_hub

ROOT = Path(__file__).parents[3]
COMMIT, LATER = "a" * 40, "b" * 40
WEIGHTS = b"w" * 50_000
REF = AdapterRef("someone/adapter", COMMIT)


@pytest.fixture
def server() -> Generator[HubServer]:
    with running_hub() as server:
        server.repos["someone/adapter"] = Repo(
            {
                "README.md": b"---\nlicense: mit\nbase_model: org/base\n---\n# An adapter\n",
                "adapter_config.json": b'{"peft_type": "LORA"}',
                "adapter_model.safetensors": WEIGHTS,
                "modeling_evil.py": b"raise SystemExit",
                "adapter_model.bin": b"\x80\x02pickle",
                "second/adapter_config.json": b'{"peft_type": "LORA", "r": 2}',
                "second/adapter_model.safetensors": b"s" * 100,
            },
            refs={"main": COMMIT, "v1": COMMIT},
            card={"license": "mit", "base_model": "org/base"},
        )
        yield server


@pytest.fixture
def asked(server: HubServer, hub_here: None) -> Hub:  # noqa: ARG001
    """A Hub that is asked from this process."""
    return Hub(server.endpoint, timeout_seconds=20)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What huggingface_hub would wait before it takes up a download, in seconds: not here."""
    waited: list[float] = []
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def asked_apart(server: HubServer) -> Hub:
    """The same as it is asked otherwise, by a process for each request."""
    return Hub(server.endpoint, timeout_seconds=20)


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/1"])
def test_a_name_becomes_a_commit(revision: str, asked: Hub) -> None:
    text = f"someone/adapter{revision}"
    assert repositories.resolve(text, subfolder="second", hub=asked) == replace(
        REF, subfolder="second"
    )


def test_the_endpoint_of_the_environment_is_asked(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    assert repositories.resolve("someone/adapter", hub=Hub()) == REF


@pytest.mark.parametrize(
    ("text", "subfolder"),
    [
        ("adapter", ""),
        ("../../etc@main", ""),
        ("a/b/c", ""),
        ("a/b@../../x", ""),
        ("a/b@", ""),
        ("a/b", "../x"),
        ("a/b", "/etc"),
        ("a/b", "x/../../y"),
        ("https://huggingface.co/a/b", ""),
        ("a/" + "b" * 200, ""),
        ("a/b\0", ""),
    ],
)
def test_what_names_no_repository_is_refused_before_anyone_is_asked(
    text: str, subfolder: str, server: HubServer, asked: Hub
) -> None:
    with pytest.raises(HubReferenceError):
        repositories.resolve(text, subfolder=subfolder, hub=asked)
    assert not server.requests


def test_a_missing_revision_names_those_that_exist(asked: Hub) -> None:
    with pytest.raises(HubRevisionError, match=r"no branch or tag 'v9'; it has: main, v1"):
        repositories.resolve("someone/adapter@v9", hub=asked)


def test_a_commit_that_is_not_there_is_not_believed(asked: Hub) -> None:
    with pytest.raises(HubRevisionError):
        repositories.resolve(f"someone/adapter@{LATER}", hub=asked)


def test_what_is_no_commit_is_not_taken_for_one(server: HubServer, asked: Hub) -> None:
    server.repos["someone/adapter"].refs["main"] = "../../../etc"
    with pytest.raises(HubProtocolError):
        repositories.resolve("someone/adapter", hub=asked)


def test_only_the_files_of_an_adapter_come(asked_apart: Hub, tmp_path: Path) -> None:
    folder = download(REF, tmp_path, hub=asked_apart)
    assert files_of(folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert licence_of(folder) == "mit"


def test_a_second_download_asks_nobody(
    server: HubServer, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(REF, tmp_path, hub=asked)
    before = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert repositories.resolve(f"someone/adapter@{COMMIT}", hub=asked) == REF
    assert download(REF, tmp_path, hub=asked) == folder
    assert len(server.requests) == before


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_says_what_is_missing(
    name: str, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(HubOfflineError, match="someone/adapter@<commit"):
        repositories.resolve("someone/adapter", hub=asked)
    with pytest.raises(HubOfflineError, match="not here yet"):
        download(REF, tmp_path, hub=asked)


@pytest.mark.parametrize("left", [b"W" + WEIGHTS[1:], WEIGHTS[:10]], ids=["flipped", "cut"])
def test_a_file_that_the_disk_has_changed_is_noticed(
    left: bytes, asked: Hub, tmp_path: Path
) -> None:
    """To try again would not help; nor is it a verdict on the repository."""
    weights = download(REF, tmp_path, hub=asked) / "adapter_model.safetensors"
    weights.write_bytes(left)
    with pytest.raises(HubDamageError, match=r"delete .* and run again") as error:
        download(REF, tmp_path, hub=asked)
    assert not error.value.retry
    assert not isinstance(error.value, UnusableRepositoryError)


def test_a_link_in_place_of_a_file_is_not_followed(asked: Hub, tmp_path: Path) -> None:
    weights = download(REF, tmp_path / "cache", hub=asked) / "adapter_model.safetensors"
    elsewhere = tmp_path / "elsewhere"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    with pytest.raises(HubDamageError, match="is not a file"):
        download(REF, tmp_path / "cache", hub=asked)


def test_killed_before_the_folder_has_its_name_it_is_downloaded_again(
    asked: Hub, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody cleans up
        with pytest.raises(KilledError):
            download(REF, tmp_path, hub=asked)
    assert list(tmp_path.rglob("*.partial"))
    server.requests.clear()
    folder = download(REF, tmp_path, hub=asked)
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert server.count("get") > 0
    assert not list(tmp_path.rglob("*.partial"))


REFUSED = {
    "dora": {"peft_type": "LORA", "use_dora": True},
    "peft_type": {"peft_type": "IA3"},
    "init_changes_base": {"peft_type": "LORA", "init_lora_weights": "pissa"},
    "unknown_key": {"peft_type": "LORA", "use_tomorrow": 1},
    "task_type": {"peft_type": "LORA", "task_type": "SEQ_CLS"},
    "stub": {"base_model": "org/base"},
}


def weights_asked_for(server: HubServer) -> list[str]:
    return [path for _, path, _ in server.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize("code", REFUSED)
def test_a_config_that_is_refused_costs_no_download_of_weights(
    code: str, server: HubServer, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is refused again without asking anybody."""
    files = server.repos["someone/adapter"].files
    files["adapter_config.json"] = json.dumps(REFUSED[code]).encode()
    with pytest.raises(AdapterError, match=f"someone/adapter at aaaaaaaaaaaa.*{code}"):
        download(REF, tmp_path, hub=asked)
    assert not weights_asked_for(server)
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))
    assert server.num_bytes < 1_000 < len(WEIGHTS)
    before = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for again in (partial(download, hub=Hub()), downloaded):
        with pytest.raises(AdapterError, match=code):
            again(REF, tmp_path)
    assert len(server.requests) == before


def test_what_another_policy_takes_is_downloaded_after_all(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    files = server.repos["someone/adapter"].files
    files["adapter_config.json"] = json.dumps(REFUSED["task_type"]).encode()
    with pytest.raises(AdapterError):
        download(REF, tmp_path, hub=asked)
    assert downloaded(REF, tmp_path, modules_to_save="strip") is None
    folder = download(REF, tmp_path, hub=asked, modules_to_save="strip")
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert downloaded(REF, tmp_path) == folder  # whole, so that `read` can name all reasons


def test_a_note_that_a_crash_has_cut_is_as_good_as_none(
    asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(REF, tmp_path, hub=asked)
    facts_of(REF, tmp_path, hub=asked)
    for note in (f"{COMMIT}.json", f"{COMMIT}.about"):
        for left in ("", "[{", '{"a": 1}'):
            (folder.parent / note).write_text(left)
            assert download(REF, tmp_path, hub=asked) == folder
            with monkeypatch.context() as patched:
                patched.setenv("HF_HUB_OFFLINE", "1")
                assert (facts_of(REF, tmp_path, hub=asked) is None) == note.endswith(".about")


@pytest.mark.parametrize(
    ("stated", "licence"),
    [("mit", "mit"), (["mit", "apache-2.0"], "mit, apache-2.0"), ("Ask me. " * 40, "other")],
)
def test_the_hub_s_licence_of_a_card_is_read_like_the_card(
    server: HubServer, asked: Hub, tmp_path: Path, stated: object, licence: str
) -> None:
    server.repos["someone/adapter"].card["license"] = stated
    found = facts_of(REF, tmp_path, hub=asked)
    assert found is not None
    assert found.licence == licence


def test_no_two_subfolders_have_the_same_folder_in_the_cache(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    repo = server.repos["someone/adapter"]
    names = ("a/b", "a--b", "a", "a.claims", "a/b.claims", "d" * 120 + "/" + "e" * 120)
    for name in names:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            repo.files[f"{name}/{file}"] = repo.files[f"second/{file}"]
    found = {download(replace(REF, subfolder=name), tmp_path, hub=asked) for name in names}
    assert len(found) == len(names)
    assert all((folder / "adapter_config.json").is_file() for folder in found)


def test_an_adapter_in_a_subfolder_comes_alone(asked: Hub, tmp_path: Path) -> None:
    folder = download(replace(REF, subfolder="second"), tmp_path, hub=asked)
    assert files_of(folder) == ["adapter_config.json", "adapter_model.safetensors"]
    assert folder.name == "second"


def test_a_branch_that_moves_between_resolving_and_downloading_changes_nothing(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    ref = repositories.resolve("someone/adapter", hub=asked)
    server.repos["someone/adapter"].refs["main"] = LATER
    download(ref, tmp_path, hub=asked)
    paths = [path for kind, path, _ in server.requests if kind in ("head", "get", "tree")]
    assert paths
    assert all(COMMIT in path for path in paths)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_wrong_bytes_of_the_right_size_are_refused(
    name: str, server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    """Weights by their sha256, small files by their git blob id; the client compares neither."""
    repo = server.repos["someone/adapter"]
    server.faults["get"] = Fault(body=b"x" * len(repo.files[name]), path=name)
    with pytest.raises(HubHashError, match=name) as error:
        download(REF, tmp_path, hub=asked)
    assert not error.value.retry
    assert not any(p.name == name for p in tmp_path.rglob("*"))


def test_a_disk_without_room_is_noticed_before_anything_comes(
    server: HubServer, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(HubDiskError, match=r"0\.0 MB left; free some space"):
        download(REF, tmp_path, hub=asked)
    assert server.count("get") == 0


def test_a_body_that_is_too_short_is_refused(server: HubServer, asked: Hub, tmp_path: Path) -> None:
    server.faults["get"] = Fault(body=b"<html>", path=".safetensors")
    with pytest.raises(HubConnectionError) as error:
        download(REF, tmp_path, hub=asked)
    assert error.value.retry


def test_a_body_without_end_is_stopped_at_the_listed_size(
    server: HubServer, asked_apart: Hub, tmp_path: Path
) -> None:
    server.faults["get"] = Fault(endless=True, path=".safetensors")
    with pytest.raises(HubSizeError, match="more than it lists"):
        download(REF, tmp_path, hub=asked_apart)


def test_a_download_that_takes_a_while_shows_how_far_it_is(
    server: HubServer,
    asked: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 60)
    download(REF, tmp_path / "soon", hub=asked)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.05)
    server.seconds_per_body = 0.3
    server.repos["someone/adapter"].files["adapter_model.safetensors"] = b"w" * 3_000_000
    steps: list[tuple[str, int, int]] = []
    run, logs = ContextVar("run", default="none"), []
    run.set("this one")  # as Prefect finds the log of a run
    with console.CONSOLE.listening(
        lambda _: logs.append(run.get()), lambda *step: steps.append(step)
    ):
        download(REF, tmp_path / "late", hub=asked)
    assert set(logs) == {"this one"}
    assert "downloading someone/adapter: 3000 of 3000 kB" in capsys.readouterr().err
    assert steps[-1] == ("downloading someone/adapter", 3_000, 3_000)


LARGE = random.Random(0).randbytes(12 << 20)
"""More than the client writes at once, 10 MB; a break before that makes it begin again."""


def test_a_connection_that_breaks_once_is_taken_up_again(
    server: HubServer, asked: Hub, tmp_path: Path, pauses: list[float]
) -> None:
    server.repos["someone/adapter"].files["adapter_model.safetensors"] = LARGE
    server.faults["get"] = Fault(drop_after=11 << 20, times=1, path=".safetensors")
    folder = download(REF, tmp_path, hub=asked)
    assert (folder / "adapter_model.safetensors").read_bytes() == LARGE
    assert server.num_bytes < 2 * len(LARGE) - (9 << 20)  # what had come was not sent again
    assert len(pauses) == 1


@pytest.mark.usefixtures("pauses")
def test_a_file_that_changes_before_it_is_taken_up_again_is_refused(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    """Its beginning is of other bytes, the rest is right, and so is its size."""
    server.repos["someone/adapter"].files["adapter_model.safetensors"] = LARGE
    other = b"x" * len(LARGE)
    server.faults["get"] = Fault(body=other, drop_after=11 << 20, times=1, path=".safetensors")
    with pytest.raises(HubHashError, match="adapter_model"):
        download(REF, tmp_path, hub=asked)
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_a_connection_that_always_breaks_is_given_up_for_now(
    server: HubServer, asked: Hub, tmp_path: Path, pauses: list[float]
) -> None:
    server.faults["get"] = Fault(drop_after=1_000, path=".safetensors")
    with pytest.raises(HubConnectionError) as error:
        download(REF, tmp_path, hub=asked)
    assert error.value.retry
    assert len(pauses) > 1
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_an_answer_without_a_commit_is_not_a_hubs(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    """With one, too, it is the listed hashes that count; see `wrong_bytes_of_the_right_size`."""
    server.faults["head"] = Fault(status=200, headers={"ETag": '"x"'}, path=".safetensors")
    with pytest.raises(HubError, match="someone/adapter") as error:
        download(REF, tmp_path, hub=asked)
    assert isinstance(error.value, (HubProtocolError, HubConnectionError))


@pytest.mark.parametrize("size", [None, "12", -5, 1e30, True, 10**40])
def test_an_answer_of_other_types_than_a_hubs_is_called_so(
    size: Any, server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    repo = server.repos["someone/adapter"]
    repo.listed_sizes["adapter_config.json"] = size
    with pytest.raises(HubProtocolError, match="where a number from 0 belongs"):
        download(REF, tmp_path, hub=asked)
    repo.refs["main"] = cast("str", None)
    with pytest.raises(HubProtocolError, match="'None' where a text belongs"):
        repositories.resolve("someone/adapter", hub=asked)
    repo.card = {"license": {"name": "mit"}}
    assert facts_of(REF, tmp_path, hub=asked) is None
    repo.card = {"license": ["cc-by-nd-4.0", "mit"]}
    said = facts_of(REF, tmp_path, hub=asked)
    assert said is not None
    assert said.licence == "cc-by-nd-4.0, mit"


def test_what_is_too_large_is_refused_before_a_byte_comes(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.repos["someone/adapter"].listed_sizes["adapter_model.safetensors"] = 1 << 50
    with pytest.raises(HubSizeError, match="give its folder"):
        download(REF, tmp_path, hub=asked)
    assert not server.count("get")


def test_a_place_that_cannot_be_written_is_not_the_hubs_fault(
    asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "staging", lambda _: nullcontext(Path("/dev/null")))
    with pytest.raises(HubDiskError, match="cannot be written"):
        download(REF, tmp_path, hub=asked)


def test_a_folder_of_very_many_files_is_refused_from_its_listing(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.repos["someone/adapter"].files |= {f"file{i}": b"" for i in range(3_000)}
    with pytest.raises(HubSizeError, match="more than 2000 files"):
        download(REF, tmp_path, hub=asked)


def test_names_from_a_repository_become_no_paths(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    evil = ["../escaped", "/escaped", "a/../../escaped", "..\\escaped", "CON", "x\0y"]
    server.repos["someone/adapter"].files |= dict.fromkeys(evil, b"evil")
    folder = download(REF, tmp_path / "cache", hub=asked)
    assert len(files_of(folder)) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("status", "headers", "error_class"),
    [
        (401, {}, HubAccessError),
        (403, {}, HubAccessError),
        (403, {"X-Error-Code": "GatedRepo"}, HubGatedError),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, HubDisabledError),
        (451, {}, HubDisabledError),  # for legal reasons
        (404, {}, HubNotFoundError),
        (404, {"X-Error-Code": "RepoNotFound"}, HubNotFoundError),
        (429, {}, HubRateLimitError),
        (500, {}, HubServerError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_each_refusal_has_its_own_error(
    status: int,
    headers: dict[str, str],
    error_class: type[HubError],
    server: HubServer,
    asked: Hub,
) -> None:
    server.faults["refs"] = Fault(status=status, headers=headers)
    with pytest.raises(error_class, match="someone/adapter") as error:
        repositories.resolve("someone/adapter", hub=asked)
    assert type(error.value) is error_class
    assert error.value.retry == (status in (429, 500))


def test_a_token_that_the_hub_does_not_know_is_called_so(server: HubServer, asked: Hub) -> None:
    """It refuses such a request for a public repository, too: no verdict on an adapter."""
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    server.faults["refs"] = Fault(status=401, headers=headers)
    with pytest.raises(HubTokenError, match="does not know the token that was sent"):
        repositories.resolve("someone/adapter", hub=replace(asked, token="hf_old"))  # noqa: S106


def test_files_from_before_do_not_stand_in_for_an_answer(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    """The client returns the old files of a branch here, and says nothing."""
    download(repositories.resolve("someone/adapter", hub=asked), tmp_path, hub=asked)
    server.faults["refs"] = Fault(status=401)
    with pytest.raises(HubAccessError):
        repositories.resolve("someone/adapter", hub=asked)


def test_a_fault_while_files_come_is_told_by_its_cause(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    """The client says `LocalEntryNotFoundError` for it, and hides the status in the cause."""
    server.faults["head"] = Fault(status=403)
    with pytest.raises(HubAccessError, match="403"):
        download(REF, tmp_path, hub=asked)


def test_a_short_wait_that_the_hub_asks_for_is_waited(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.faults["head"] = Fault(status=429, headers={"Retry-After": "1"}, times=1)
    assert download(REF, tmp_path, hub=asked).is_dir()


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"RateLimit": '"api";r=0;t=290', "Retry-After": "1"}, 290),
        ({"Retry-After": "55"}, 55),
        ({"Retry-After": "86400"}, 0),
        ({"RateLimit": "soon"}, 0),
        ({}, 0),
    ],
)
def test_a_hub_with_too_many_requests_is_asked_again_when_it_says(
    headers: dict[str, str],
    waited: int,
    server: HubServer,
    asked: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client waits for files and listings, and not where it asks for branches."""
    pauses: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=pauses.append))
    server.faults["refs"] = Fault(status=429, headers=headers, times=1)
    with nullcontext() if waited else pytest.raises(HubRateLimitError):
        assert repositories.resolve("someone/adapter", hub=asked) == REF
    assert pauses == [waited] * bool(waited)


HANGS, ASKS_TO_WAIT = Fault(hang=True), Fault(status=429, headers={"Retry-After": "86400"})


@pytest.mark.parametrize("fault", [HANGS, ASKS_TO_WAIT], ids=["hangs", "asks to wait"])
@pytest.mark.parametrize("kind", ["head", "tree", "get"])
def test_nobody_waits_longer_than_the_limit(
    fault: Fault, kind: str, server: HubServer, asked_apart: Hub, tmp_path: Path
) -> None:
    server.faults[kind] = replace(fault)
    begin = time.monotonic()
    with pytest.raises(HubTimeoutError) as error:
        download(REF, tmp_path, hub=replace(asked_apart, timeout_seconds=1))
    assert time.monotonic() - begin < 60  # of a server that never answers
    assert error.value.retry


def test_a_name_that_the_hub_never_answers_is_given_up(server: HubServer, asked_apart: Hub) -> None:
    server.faults["refs"] = Fault(hang=True)
    with pytest.raises(HubTimeoutError, match="did not finish within 1 s"):
        repositories.resolve("someone/adapter", hub=replace(asked_apart, timeout_seconds=1))


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_a_hub_that_is_not_there_may_come_back(asked: Hub, revision: str) -> None:
    with running_hub() as gone:
        endpoint = gone.endpoint
    hub = replace(asked, endpoint=endpoint, timeout_seconds=15)  # the client tries some for 23 s
    with pytest.raises(HubConnectionError, match="cannot be reached") as error:
        repositories.resolve(f"someone/adapter{revision}", hub=hub)
    assert error.value.retry


def test_a_server_that_is_no_hub_is_called_so(server: HubServer, asked: Hub) -> None:
    server.faults["refs"] = Fault(status=200, body=b"<html>log in</html>")
    with pytest.raises(HubProtocolError, match="does not answer as a Hub does"):
        repositories.resolve("someone/adapter", hub=asked)
    server.faults["refs"] = Fault(status=407, body=b"<html>\nlog in\n</html>")
    with pytest.raises(HubError, match="407") as error:
        repositories.resolve("someone/adapter", hub=asked)
    assert "\n" not in str(error.value)


def test_an_answer_that_unpacks_to_more_than_the_memory_it_may_take_is_given_up(
    server: HubServer, asked_apart: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = "from pipelines.hub import worker\nworker.MOST_MEMORY = 300 << 20\nworker.main()\n"
    (tmp_path / "smaller_worker.py").write_text(smaller)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(client, "WORKER", "smaller_worker")
    assert repositories.resolve("someone/adapter", hub=asked_apart).revision == COMMIT
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(400)] + [packer.flush()])
    server.faults["refs"] = Fault(status=200, headers={"Content-Encoding": "gzip"}, body=bomb)
    with pytest.raises(HubProtocolError, match="needs more memory than it may take"):
        repositories.resolve("someone/adapter", hub=asked_apart)


@pytest.mark.parametrize(
    ("kind", "headers"),
    [
        ("head", {"ETag": '"../../../../escaped"', "X-Repo-Commit": COMMIT}),
        ("head", {"ETag": '"/escaped"', "X-Repo-Commit": COMMIT}),
        ("head", {"ETag": '"x"', "X-Repo-Commit": "../../escaped"}),
        ("head", {"Location": "file:///etc/passwd", "X-Repo-Commit": COMMIT, "ETag": '"x"'}),
        ("get", {"Content-Disposition": "attachment; filename=../../escaped"}),
    ],
)
def test_a_hostile_endpoint_changes_nothing_outside_the_folder(
    kind: str,
    headers: dict[str, str],
    server: HubServer,
    asked_apart: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names of a path wherever a server may say one; whatever comes of it, the hash decides."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "of the client"))
    status = 302 if "Location" in headers else 200
    body = b"" if kind == "head" else b"x" * len(WEIGHTS)
    sizes = {"Content-Length": str(len(WEIGHTS))}
    server.faults[kind] = Fault(
        status=status, headers=headers | sizes, body=body, path=".safetensors"
    )
    place = tmp_path / "a" / "b" / "c" / "cache"
    with suppress(HubError):
        folder = download(REF, place, hub=asked_apart)
        assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert server.count(kind)
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(place)]
    assert {path.name for path in outside if path.is_file()} <= {".check_for_update_done"}
    assert not any(
        path.suffix == ".safetensors" and path.read_bytes() != WEIGHTS for path in place.rglob("*")
    )


@pytest.mark.parametrize("endpoint", ["http://example.org", "ftp://example.org", "file:///etc"])
def test_an_endpoint_that_anyone_may_answer_for_is_refused(endpoint: str) -> None:
    with pytest.raises(InsecureEndpointError, match="use https"):
        repositories.resolve("someone/adapter", hub=Hub(endpoint))


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://[::1",
        "https://hub.example:no",
        "http://127.0.0.1:99999",
        "https://",
        "nowhere",
        "x y",
    ],
)
def test_an_endpoint_that_is_no_address_is_one_sentence(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises((HubReferenceError, InsecureEndpointError), match="the endpoint "):
        repositories.resolve("someone/adapter", hub=Hub())


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.7", False), ("me", False)],
)
def test_what_loopback_is(host: str, local: bool) -> None:
    assert is_loopback(host) == local


def test_plain_http_is_allowed_where_it_is_asked_for() -> None:
    assert Hub("http://mirror.lan/", allow_http=True).url() == "http://mirror.lan"


@pytest.mark.parametrize("fault", [Fault(500), Fault(404), Fault(hang=True)])
def test_a_password_in_an_endpoint_is_in_no_message(server: HubServer, fault: Fault) -> None:
    server.faults["refs"] = fault
    host = server.endpoint.removeprefix("http://")
    mirror = Hub(f"http://me:s3cret@{host}", timeout_seconds=1)
    with pytest.raises(HubError, match=host) as told:
        repositories.resolve("someone/adapter", hub=mirror)
    assert "s3cret" not in str(told.value)
    with pytest.raises(InsecureEndpointError, match=r"endpoint http://mirror\.lan is not https"):
        Hub("http://me:s3cret@mirror.lan").url()


def test_a_file_that_this_process_may_not_write_is_no_fault_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, 1_000_000))
    with pytest.raises(OSError, match="`ulimit -f` allows no file of 2,000,000 bytes") as told:
        worker.fetch(HfApi(), "a/b", revision="main", files={"x": 2_000_000}, into="")
    assert worker.describe(told.value)["kind"] == "disk"


def test_a_token_goes_out_only_when_it_is_given(
    server: HubServer, asked_apart: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    repositories.resolve("someone/adapter", hub=asked_apart)
    assert [token for _, _, token in server.requests] == [""]
    repositories.resolve("someone/adapter", hub=replace(asked_apart, token="hf_given"))  # noqa: S106
    assert server.requests[-1][2] == "Bearer hf_given"


def test_a_token_is_in_no_message(server: HubServer, asked: Hub) -> None:
    secret = replace(asked, token="hf_given")  # noqa: S106
    server.faults["refs"] = Fault(status=400, headers={"X-Error-Message": "bad hf_given"})
    with pytest.raises(HubError) as error:
        repositories.resolve("someone/adapter", hub=secret)
    assert "hf_given" not in f"{error.value} {secret!r}"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, "pickle"),
        (
            {"one/adapter_config.json": b"{}", "two/x": b"", "rng_state_0.pth": b""},
            "subfolder: one, two",
        ),
        ({"model.safetensors": b"", "training_args.bin": b""}, "it holds model.safetensors"),
    ],
    ids=["pickle", "subfolders", "other"],
)
def test_a_repository_without_an_adapter_says_what_it_has(
    files: dict[str, bytes], sentence: str, server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.repos["someone/adapter"].files = files
    with pytest.raises(HubFilesError, match=sentence):
        download(REF, tmp_path, hub=asked)


def in_a_process(*lines: str) -> subprocess.Popen[bytes]:
    setup = (
        "from pathlib import Path",
        "from meteora.artifacts import AdapterRef",
        "from pipelines.hub import adapter, client, repositories",
    )
    return subprocess.Popen([sys.executable, "-c", "\n".join(setup + lines)], cwd=ROOT)


def test_two_processes_at_once_download_once(server: HubServer, tmp_path: Path) -> None:
    server.seconds_per_body = 0.3
    call = (
        f"adapter.download({REF!r}, Path({str(tmp_path)!r}), hub=client.Hub({server.endpoint!r}))"
    )
    both = [in_a_process(call) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert server.count("get") == 3  # one for each file


def test_nobody_waits_longer_for_another_process_than_a_download_may_take(
    server: HubServer, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.hub.client.MIN_BYTES_PER_SECOND", 1e18)
    with (
        locked(tmp_path / "someone--adapter" / COMMIT, 0),
        pytest.raises(HubTimeoutError, match=r"has been downloading it for 0\.1 s; wait for it"),
    ):
        download(REF, tmp_path, hub=replace(asked, timeout_seconds=0.1))
    assert server.count("get") == 0
    assert download(REF, tmp_path, hub=asked).is_dir()


def test_a_base_comes_without_code_and_without_pickles(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    wanted = ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
    unwanted = ["modeling_x.py", "pytorch_model.bin", "consolidated.safetensors", "x.gguf"]
    server.repos["org/base"] = Repo(dict.fromkeys(wanted + unwanted, b"data"))
    repositories.download_base(BaseSpec("org/base", COMMIT), tmp_path / "base", hub=asked)
    assert files_of(tmp_path) == [f"base/{name}" for name in wanted]


def test_a_base_that_was_stopped_goes_on_with_the_files_that_are_not_whole(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    names = ["config.json", *shards]
    server.repos["org/base"] = Repo({name: name.encode() for name in names})
    server.faults["get"] = Fault(status=404, path=shards[2])
    spec, out = BaseSpec("org/base", COMMIT), tmp_path / "base"
    with pytest.raises(HubNotFoundError):
        repositories.download_base(spec, out, hub=asked)
    server.faults.clear()
    (out / shards[1]).write_bytes(b"x" * len(shards[1]))  # the disk lost it
    (out / "old.bin").write_bytes(b"of an earlier listing")
    server.requests.clear()
    repositories.download_base(spec, out, hub=asked)
    paths = [path for kind, path, _ in server.requests if kind == "get"]
    assert [Path(path).name for path in paths] == shards[1:]
    assert files_of(tmp_path) == [f"base/{name}" for name in names]
    assert all((out / name).read_bytes() == name.encode() for name in names)
    server.requests.clear()
    repositories.download_base(spec, out, hub=asked)
    assert server.count("get") == 0


def test_a_base_without_safetensors_is_refused(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.repos["org/base"] = Repo({"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(HubFilesError, match="safetensors"):
        repositories.download_base(BaseSpec("org/base", COMMIT), tmp_path / "base", hub=asked)


def test_what_the_hub_says_of_a_repository_is_kept(
    server: HubServer, asked: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = HubSource("someone", "mit", ("org/base",), 7, ("lora",))
    assert facts_of(REF, tmp_path / "one", hub=asked) == said
    server.faults["revision"] = Fault(status=500)
    assert facts_of(REF, tmp_path / "two", hub=asked) is None
    assert facts_of(REF, tmp_path / "one", hub=asked) == said
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert facts_of(REF, tmp_path / "one", hub=asked) == said


def test_what_a_card_makes_the_hub_say_is_short_and_printable(
    server: HubServer, asked: Hub, tmp_path: Path
) -> None:
    server.repos["someone/adapter"].card = {
        "license": ["\x1b[31mmit\ud800" + "x" * 9_000],
        "base_model": ["a/b\nc"] * 900,
    }
    said = facts_of(REF, tmp_path, hub=asked)
    assert said is not None
    assert said.licence == "other"
    assert said.base_models == ("a/b�c",) * 20


def test_discovered_adapters_are_pinned(server: HubServer, asked: Hub) -> None:
    tag = "base_model:adapter:org/base"
    server.repos["a/one"] = Repo({}, card={"tags": [tag, "gsm8k"]})
    server.repos["a/two"] = Repo({}, card={"tags": [tag]})
    assert len(repositories.discover("org/base", hub=asked)) == 2
    found = repositories.discover("org/base", tags=["gsm8k"], hub=asked)
    assert found == [AdapterRef("a/one", COMMIT)]


def test_the_worker_ends_with_who_asked(server: HubServer) -> None:
    server.faults["refs"] = Fault(hang=True)
    asking = in_a_process(
        f"repositories.resolve('someone/adapter', hub=client.Hub({server.endpoint!r}))"
    )
    while not server.count("refs"):
        assert asking.poll() is None  # or nobody would ever ask
        time.sleep(0.02)
    (worker,) = children_of(asking.pid)
    asking.kill()
    asking.wait()
    give_up = time.monotonic() + 10
    while worker.exists() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not worker.exists()


def children_of(pid: int) -> list[Path]:
    """Linux's own list of them."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [Path(f"/proc/{child}") for child in text.split()]
