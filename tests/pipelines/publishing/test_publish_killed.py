"""Whoever publishes is killed, at every request that changes the Hub and when it is recorded."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoFile, RepoFolder

from meteora.checkpoint.manifest import EXPERTS
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.hub.hub_server import Fault, git_sha1
from tests.pipelines.hub.hub_uploads import FIRST, NAME, GitRepo, running_upload_hub
from tests.pipelines.process_tree import descendants, ends
from tests.pipelines.publishing.publish_yard import Yard, environment, remember, write

ROOT = Path(__file__).parents[3]
CHILD = ("-m", "tests.pipelines.publishing.publish_child")


@pytest.fixture(scope="module")
def yard(world: World, tmp_path_factory: pytest.TempPathFactory) -> Generator[Yard]:
    folder = tmp_path_factory.mktemp("yard")
    routers = remember(Ledger(folder / "empty"), world)
    for which, router_id in routers.items():
        write(folder / which, which, world, router_id)
    with (
        running_upload_hub() as server,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *CHILD, folder / "new", world.base],
            cwd=ROOT,
            env=os.environ | environment(server) | {"TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        yield Yard(server, process, folder, world.base, routers)


@pytest.fixture(params=["first", "again"])
def place(yard: Yard, request: pytest.FixtureRequest) -> Yard:
    """A Hub without the repository, or with the old checkpoint in it, published from here."""
    yard.begin(None, yard.folder / "empty")
    if request.param == "again":
        assert yard.put("old") is None
        start = yard.folder / "published"
        shutil.copytree(yard.home, start, dirs_exist_ok=True)
        yard.begin(yard.repo, start)
    return yard


def readers_saw(yard: Yard, *allowed: dict[str, bytes]) -> None:
    """Check all that main and the tags ever showed, and that the Hub's own list says the same."""
    if NAME not in yard.server.repos:
        return
    commit = yard.repo.branches["main"]
    assert listed(yard) == hashes(yard.repo.main)
    while commit:
        assert yard.repo.commits[commit] in (FIRST, *allowed)
        commit = yard.repo.parents[commit]
    assert all(yard.repo.commits[commit] in allowed for commit in yard.repo.tags.values())


def listed(yard: Yard) -> dict[str, str]:
    """The hash of each file of main, as a reader gets it from the Hub."""
    api = HfApi(endpoint=yard.server.endpoint, token="writer")  # noqa: S106
    found = list(api.list_repo_tree(NAME))
    for entry in list(found):
        if isinstance(entry, RepoFolder):
            found += api.list_repo_tree(NAME, entry.path)
    files = [entry for entry in found if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def hashes(content: dict[str, bytes]) -> dict[str, str]:
    return {
        path: sha256(data).hexdigest() if path.endswith(".safetensors") else git_sha1(data)
        for path, data in content.items()
    }


def is_published(yard: Yard, *, dropped: str = "") -> None:
    """Check that main holds the new checkpoint, sent once, and that nothing else is left.

    Args:
        dropped: The request that was dropped with whoever sent it.
    """
    before = yard.held or GitRepo(FIRST)
    repo = yard.repo
    assert repo.main == yard.content("new")
    assert list(repo.branches) == ["main"]
    assert len(repo.commits) == len(before.commits) + 2  # one that staged it, one that showed it
    assert repo.branches["main"] in repo.tags.values()
    sent = yard.server.count("put") - dropped.startswith("put ")
    assert sent == len(repo.large) - len(before.large)
    first, *earlier = yard.recorded()
    assert first == (yard.routers["new"], repo.branches["main"])
    assert len(earlier) == (0 if yard.held is None else 1)
    assert not list(yard.folder.glob("meteora-publish-*"))


def kill_and_publish_again(yard: Yard, **strike: Any) -> str | None:
    """Check what readers saw after a kill and after the next publication; tell what it fell on."""
    allowed = [yard.content("new"), *([yard.content("old")] if yard.held else [])]
    yard.begin(yard.held, yard.start)
    killed_at = yard.put("new", **strike)
    readers_saw(yard, *allowed)
    if killed_at is not None:
        assert yard.put("new") is None
        readers_saw(yard, *allowed)
    is_published(yard, dropped="" if killed_at is None or strike["applied"] else killed_at)
    return killed_at


@pytest.mark.parametrize("strike", [1, 2], ids=["staged", "shown"])
def test_killed_after_either_commit_it_is_published_once(place: Yard, strike: int) -> None:
    killed_at = kill_and_publish_again(place, strike=strike, of={"commit"}, applied=True)
    assert killed_at is not None
    assert killed_at.endswith("/main") == (strike == 2)


@pytest.mark.slow
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_killed_at_any_request_readers_see_old_or_new_and_the_next_one_ends_it(
    place: Yard, applied: bool
) -> None:
    struck: list[str] = []
    while killed_at := kill_and_publish_again(place, strike=len(struck) + 1, applied=applied):
        struck.append(killed_at.split(" ")[0])
    kinds = Counter(struck)
    assert kinds >= Counter({"branch": 2, "preupload": 1, "batch": 1, "commit": 2, "tag": 1})
    assert (kinds["repos"], kinds["put"]) == ((0, 1) if place.held else (1, 2))


@pytest.mark.parametrize("die", ["before", "after"])
def test_killed_when_it_is_recorded_it_is_recorded_once(place: Yard, die: str) -> None:
    assert place.put("new", die=die) == die
    assert place.put("new") is None
    is_published(place)


@pytest.mark.slow
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_something_else_published_after_a_kill_leaves_nothing_of_what_was_killed(
    yard: Yard, applied: bool
) -> None:
    strike = 0
    killed_at: str | None = ""
    while killed_at is not None:
        yard.begin(None, yard.folder / "empty")
        killed_at = yard.put("old", strike=(strike := strike + 1), applied=applied)
        assert yard.put("new") is None
        readers_saw(yard, yard.content("old"), yard.content("new"))
        assert yard.repo.main == yard.content("new")
        assert list(yard.repo.branches) == ["main"]
    assert strike > 8


@pytest.mark.slow
def test_what_a_killed_command_had_started_ends_and_what_it_left_is_cleared_away(
    yard: Yard,
) -> None:
    """By the processes of a real publication, while what it sent is downloaded anew."""
    yard.begin(None, yard.folder / "empty")
    yard.server.faults = {"get": Fault(hang=True, path=EXPERTS)}
    command = [sys.executable, "-m", "pipelines.cli", "publish", yard.folder / "new", NAME]
    command += ["--base", yard.base, "--home", yard.home]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment(yard.server)
    ) as publisher:
        while not any(kind == "get" and EXPERTS in path for kind, path, _ in yard.server.requests):
            assert publisher.poll() is None
            time.sleep(0.1)
        started = descendants(publisher.pid)
        publisher.kill()
    assert started
    assert all(map(ends, started))
    assert yard.repo.main == FIRST
    (left,) = (yard.home / "tmp").iterdir()
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, 0), follow_symlinks=False)
    with Ledger(yard.home).running("another"):
        assert not left.exists()
    yard.server.faults = {}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment(yard.server), check=True)
    is_published(yard)
