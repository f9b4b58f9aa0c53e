"""The real client publishes over real HTTP to a small Hub that fails where it is told to."""

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from meteora.artifacts import ArtifactId, Publication
from pipelines.hub import upload
from pipelines.hub.bundle import make_bundle, same
from pipelines.hub.client import Hub
from pipelines.hub.errors import (
    HubAccessError,
    HubConflictError,
    HubConnectionError,
    HubError,
    HubHashError,
    HubNotFoundError,
    HubRateLimitError,
    HubServerError,
    HubSizeError,
    HubTokenError,
)
from pipelines.hub.upload import Repository, describe_destination
from pipelines.recipe.publish import STAGING
from pipelines.workspace.context import RunContext
from tests.pipelines.hub.hub_here import HubHere
from tests.pipelines.hub.hub_server import Fault, HubServer
from tests.pipelines.hub.hub_uploads import FIRST, NAME, GitRepo, repo_of, running_upload_hub

NAMES = ("meteora.json", "experts.safetensors", "gates.safetensors", "README.md")
WRITES = ("repos", "branch", "commit", "tag")
STEPS = [(kind, "") for kind in WRITES if kind != "commit"] + [("commit", "main"), ("commit", "-")]


# huggingface_hub 2.4 hands httpx2 a file as `data`, which that one asks to be called `content`
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the worker's environment asks for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def server() -> Generator[HubServer]:
    with running_upload_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "meteora.json").write_text('{"format_version": 1}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "experts.safetensors").write_bytes(b"e" * 100_000)
    (folder / "gates.safetensors").write_bytes(b"g" * 10_000)
    (folder / "notes.txt").write_text("mine")
    return folder


def publish(server: HubServer, folder: Path, by: str = "writer", **asked: Any) -> str:
    repository = Repository(NAME, HubHere(server.endpoint, by), (0.0, 0.0, 0.0))
    settings: dict[str, Any] = {"private": True, "tag": "t1", "check": lambda _commit: None} | asked
    return repository.publish(make_bundle(folder, NAMES), **settings)


def visible(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def whole_or_absent(repo: GitRepo, folder: Path) -> int:
    """How many commits of main hold the checkpoint; none of its commits holds a part of it."""
    commit, count = repo.branches["main"], 0
    while commit:
        held = repo.commits[commit].items() & visible(folder).items()
        assert len(held) in (0, len(visible(folder)))
        count += bool(held)
        commit = repo.parents[commit]
    return count


def test_main_gets_everything_at_once_and_nothing_is_sent_twice(
    server: HubServer, folder: Path
) -> None:
    seen = []
    commit = publish(server, folder, check=seen.append)
    repo = repo_of(server)
    assert repo.private
    assert repo.tags == {"t1": commit}
    assert list(repo.branches) == ["main"]
    assert {name: repo.main[name] for name in NAMES} == visible(folder)
    assert "notes.txt" not in repo.main
    assert whole_or_absent(repo, folder) == 1
    assert server.count("put") == 2
    assert repo.commits[seen[0]] == repo.main  # what was looked at is what was shown
    assert seen != [commit]


def test_the_same_again_writes_nothing(server: HubServer, folder: Path) -> None:
    commit, seen = publish(server, folder), []
    before = len(server.requests)
    assert publish(server, folder, check=seen.append) == commit
    assert seen == [commit]  # whoever showed it may have been killed before it was recorded
    assert {kind for kind, _, _ in server.requests[before:]} == {"revision", "refs", "tree"}


def test_new_gates_leave_the_experts_where_they_are(server: HubServer, folder: Path) -> None:
    first = publish(server, folder)
    (folder / "gates.safetensors").write_bytes(b"h" * 10_000)
    second = publish(server, folder, tag="t2", known={first})
    assert server.count("put") == 3  # experts, gates, other gates
    assert repo_of(server).parents[second] == first
    (folder / "gates.safetensors").unlink()
    seen: list[str] = []
    publish(server, folder, tag="t3", known={first, second}, check=seen.append)
    assert "gates.safetensors" not in repo_of(server).main
    assert repo_of(server).commits[seen[0]] == repo_of(server).main  # also if a file only goes
    assert server.count("put") == 3


@pytest.mark.parametrize("status", [0, 500, 504])
@pytest.mark.parametrize(("kind", "path"), STEPS)
def test_a_lost_reply_hides_what_was_done_and_it_is_not_done_again(
    server: HubServer, folder: Path, kind: str, path: str, status: int
) -> None:
    path = path if path != "-" else f"{STAGING}{make_bundle(folder, NAMES).digest[:16]}"
    server.faults[kind] = fault = Fault(status=status, applied=True, times=1, path=path)
    commit = publish(server, folder)
    assert fault.times == 0
    repo = repo_of(server)
    assert (repo.branches["main"], repo.tags) == (commit, {"t1": commit})
    assert whole_or_absent(repo, folder) == 1
    assert len(repo.commits) == 3


@pytest.mark.parametrize("status", [0, 429, 500, 503])
@pytest.mark.parametrize(("kind", "path"), STEPS)
def test_what_passes_is_tried_again(
    server: HubServer,
    folder: Path,
    kind: str,
    path: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = path if path != "-" else f"{STAGING}{make_bundle(folder, NAMES).digest[:16]}"
    server.faults[kind] = fault = Fault(status=status, times=2, path=path)
    commit = publish(server, folder)
    assert fault.times == 0
    assert capsys.readouterr().err.count("it is tried again") == 2
    assert repo_of(server).branches == {"main": commit}
    assert whole_or_absent(repo_of(server), folder) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, HubAccessError),
        (403, HubAccessError),
        (409, HubConflictError),
        (412, HubConflictError),
        (413, HubSizeError),
        (429, HubRateLimitError),
        (500, HubServerError),
    ],
)
def test_what_stays_is_said_and_main_is_as_it_was(
    server: HubServer, folder: Path, status: int, error: type[HubError]
) -> None:
    publish(server, folder)
    before = repo_of(server).branches["main"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    for path in ("main", ""):
        server.faults = {"commit": Fault(status=status, path=path)}
        with pytest.raises(error) as raised:
            publish(server, folder, tag="t2")
        assert "writer" not in str(raised.value)
        assert repo_of(server).branches["main"] == before
        assert "t2" not in repo_of(server).tags
    server.faults = {}
    publish(server, folder, tag="t2")
    assert repo_of(server).tags["t2"] == repo_of(server).branches["main"]


def test_an_upload_of_bytes_that_is_refused_or_breaks_shows_nothing(
    server: HubServer, folder: Path
) -> None:
    server.faults["put"] = Fault(status=403)
    with pytest.raises(HubAccessError):
        publish(server, folder)
    assert whole_or_absent(repo_of(server), folder) == 0
    server.faults["put"] = broken = Fault(status=500, times=1)  # the client tries these again
    publish(server, folder)
    assert broken.times == 0


def test_a_repository_that_moves_meanwhile_is_left_to_whoever_moved_it(
    server: HubServer, folder: Path
) -> None:
    def somebody_else(_commit: str) -> None:
        repo_of(server).commit_files("main", {"meteora.json": b"theirs"})

    with pytest.raises(HubConflictError, match="--onto"):
        publish(server, folder, check=somebody_else)
    assert repo_of(server).main == {"meteora.json": b"theirs"}


def test_a_branch_that_another_publication_removes_meanwhile_is_told(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, times = Repository._commit, []

    def removed(repository: Repository, branch: str, parent: str, **asked: Any) -> None:
        if branch == "main" or times:
            commit(repository, branch, parent, **asked)
            return
        times.append(branch)
        del repo_of(server).branches[branch]
        raise HubConnectionError("the connection broke")

    monkeypatch.setattr(Repository, "_commit", removed)
    with pytest.raises(HubConflictError, match="another publication has replaced this one"):
        publish(server, folder)
    assert whole_or_absent(repo_of(server), folder) == 0


def test_a_model_that_this_home_did_not_publish_is_replaced_and_plan_and_note_say_so(
    server: HubServer,
    folder: Path,
    workplace: Callable[..., RunContext],
    hub_here: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", "writer")
    work = workplace(publish={"repo": NAME})
    assert describe_destination(work) == "org/model, private"
    first = publish(server, folder)
    replaces = f"replaces revision {first[:12]}, which this home did not publish"
    assert describe_destination(work) == f"org/model, private; {replaces}"
    (folder / "gates.safetensors").write_bytes(b"new")
    assert "replaces" not in capsys.readouterr().err
    second = publish(server, folder, tag="t2")
    assert replaces in " ".join(capsys.readouterr().err.split())
    for revision, verb, whose in (
        (first, "refuses to replace", "did not publish"),
        (second, "replaces", "published"),
    ):
        made = Publication(ArtifactId("router:1"), NAME, revision)
        monkeypatch.setattr(type(work.ledger), "publications", lambda *_, made=made: [made])
        clause = f"{verb} revision {second[:12]}, which this home {whose}"
        assert describe_destination(work) == f"org/model, private; {clause}"


def test_a_plan_does_not_wait_long_for_a_hub_that_does_not_answer(
    server: HubServer, workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(upload, "LOOK_SECONDS", 2.0)
    server.faults["refs"] = Fault(hang=True)
    started = time.monotonic()
    assert describe_destination(workplace(publish={"repo": NAME})) == "org/model, private"
    assert time.monotonic() - started < Hub().timeout_seconds
    server.faults["refs"] = Fault(429, headers={"Retry-After": "300"})
    monkeypatch.setattr(time, "sleep", pytest.fail)
    assert describe_destination(workplace(publish={"repo": NAME})) == "org/model, private"


def test_a_head_that_is_not_known_here_is_replaced_only_when_told_so(
    server: HubServer, folder: Path
) -> None:
    first = publish(server, folder)
    edited = repo_of(server).commit_files("main", repo_of(server).main | {"README.md": b"edited"})
    with pytest.raises(HubConflictError, match=f"--onto {edited}"):
        publish(server, folder, known={first})
    with pytest.raises(HubConflictError, match=f"expected there is {first}"):
        publish(server, folder, known={first, edited}, onto=first)
    assert publish(server, folder, known={first}, onto=edited, tag="t2") != edited
    assert repo_of(server).main["README.md"] == (folder / "README.md").read_bytes()


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint-9/adapter_model.safetensors"])
def test_another_model_is_never_overwritten(server: HubServer, folder: Path, file: str) -> None:
    theirs = {file: b"theirs", "README.md": b"their card"}
    server.repos[NAME] = GitRepo(theirs, private=True)
    with pytest.raises(HubConflictError, match=f"something else.*{file.partition('/')[0]}"):
        publish(server, folder)
    assert repo_of(server).main == theirs


@pytest.mark.parametrize("private", [True, False])
def test_it_becomes_as_private_as_it_was_asked_to_be(
    server: HubServer, folder: Path, private: bool
) -> None:
    publish(server, folder, private=private)
    assert repo_of(server).private == private
    with pytest.raises(HubConflictError, match="is to be published"):
        publish(server, folder, private=not private)


def test_bytes_that_the_hub_did_not_keep_are_never_shown(server: HubServer, folder: Path) -> None:
    for name in ("README.md", "experts.safetensors"):
        server.repos[NAME] = repo = GitRepo(FIRST, private=True, altered={name: b"---\n---\nx"})
        with pytest.raises(HubHashError, match=name):
            publish(server, folder)
        assert repo.main == FIRST
        assert list(repo.branches) == ["main"]


def test_what_fails_its_check_is_never_shown_and_is_not_sent_again(
    server: HubServer, folder: Path
) -> None:
    def refuse(_commit: str) -> None:
        raise HubError("its logits differ")

    with pytest.raises(HubError, match="logits differ"):
        publish(server, folder, check=refuse)
    assert whole_or_absent(repo_of(server), folder) == 0
    assert not repo_of(server).tags
    publish(server, folder)
    assert server.count("put") == 2
    assert whole_or_absent(repo_of(server), folder) == 1


def test_what_failed_its_check_is_removed_once_another_is_shown(
    server: HubServer, folder: Path
) -> None:
    def refuse(_commit: str) -> None:
        raise HubError("its logits differ")

    with pytest.raises(HubError):
        publish(server, folder, check=refuse)
    assert len(repo_of(server).branches) == 2
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    commit = publish(server, folder)
    assert repo_of(server).branches == {"main": commit}


def test_a_tag_that_means_something_else_is_not_moved(server: HubServer, folder: Path) -> None:
    first = publish(server, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    for _ in range(2):
        with pytest.raises(HubConflictError, match="t1 names commit"):
            publish(server, folder, known={first})
        assert repo_of(server).branches == {"main": first}  # so the next one can be published
    assert publish(server, folder, tag="t2", known={first}) != first


def test_a_tag_that_somebody_sets_meanwhile_is_not_taken_for_ours(
    server: HubServer, folder: Path
) -> None:
    def somebody_else(_commit: str) -> None:
        repo_of(server).tags["t1"] = repo_of(server).branches["main"]

    with pytest.raises(HubConflictError, match="t1 names commit"):
        publish(server, folder, check=somebody_else)


def test_writing_needs_a_token_that_may(server: HubServer, folder: Path) -> None:
    with pytest.raises(HubTokenError, match="hf auth login"):
        publish(server, folder, by="")
    assert not server.requests
    with pytest.raises(HubAccessError):
        publish(server, folder, by="reader")
    assert not server.repos


@pytest.mark.slow
def test_it_works_through_the_processes_that_can_be_killed(server: HubServer, folder: Path) -> None:
    """A Hub that takes the commit and never answers is given up, and then found to have it."""
    hub, began = Hub(server.endpoint, "writer"), time.monotonic()
    with pytest.raises(HubNotFoundError):
        hub.ask("is_private", NAME)
    limit = 3 + 3 * (time.monotonic() - began)  # on a busy machine a process takes long to start
    server.faults["commit"] = Fault(hang=True, applied=True, times=1, path="main")
    repository = Repository(NAME, replace(hub, timeout_seconds=limit), (0.0,))
    bundle = make_bundle(folder, NAMES)
    commit = repository.publish(bundle, private=True, tag="t1", check=lambda _commit: None)
    assert repo_of(server).tags == {"t1": commit}
    assert whole_or_absent(repo_of(server), folder) == 1


def test_a_bundle_knows_its_content(folder: Path) -> None:
    one = make_bundle(folder, NAMES)
    (folder / "notes.txt").write_text("not mine")
    assert make_bundle(folder, NAMES).digest == one.digest
    (folder / "README.md").write_text("other")
    assert make_bundle(folder, NAMES).digest != one.digest
    assert same(None, one.files["README.md"]) is False
