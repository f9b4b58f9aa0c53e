"""A checkpoint goes to a small Hub and comes back the same model, or nobody sees it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from meteora.artifacts import Publication
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    CONFIG_TEXT,
    EVAL_RESULTS,
    EXPERTS,
    FILES,
    GATES,
    LINEAGE,
    MANIFEST,
    STATISTICS,
    Manifest,
    read_manifest,
)
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.flows import device_lock
from pipelines.hub.client import Hub
from pipelines.hub.errors import HubConflictError, HubReferenceError, HubTokenError
from pipelines.hub.upload import Repository
from pipelines.publishing import publish as publishing
from pipelines.publishing.licences import LicenceError, refuse_forbidden
from pipelines.publishing.publish import Destination, PublicationError, publish
from pipelines.recipe.stage import Stage
from pipelines.reports import card
from pipelines.reports.hub_metadata import hub_ids, shared_licence
from pipelines.workspace.context import RunContext
from pipelines.workspace.environment import SETTINGS
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.conftest import finished, result_of, run
from tests.pipelines.hub.hub_here import HubHere
from tests.pipelines.hub.hub_server import Fault, HubServer
from tests.pipelines.hub.hub_uploads import NAME, GitRepo, repo_of, running_upload_hub
from tests.pipelines.publishing.publish_yard import with_gates
from tests.pipelines.publishing.reload_here import ReloadHere

# huggingface_hub 2.4 hands httpx2 a file as `data`, which that one asks to be called `content`
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "Repository", partial(Repository, pauses=(0.0, 0.0)))


@pytest.fixture(autouse=True)
def _reloaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run publishes by its own processes, it is loaded in one of its own, too."""
    monkeypatch.setattr(publishing, "ChildProcess", ReloadHere)


@pytest.fixture
def server() -> Generator[HubServer]:
    with running_upload_hub() as server:
        yield server


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    folder = tmp_path / "fused"
    shutil.copytree(world.checkpoint, folder)
    (folder / CONFIG).write_text(CONFIG_TEXT)
    (folder / CARD).write_text(f"---\nlicense: mit\n---\n{card.NAME_PLACEHOLDER}\n")
    (folder / LINEAGE).write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def put(server: HubServer, world: World, folder: Path, **asked: Any) -> Publication:
    token, dtype = asked.pop("token", "writer"), asked.pop("dtype", "auto")
    to = Destination(NAME, HubHere(server.endpoint, token), **asked)
    found = FoundCheckpoint(folder, world.base, dtype=dtype)
    made, recorded = publish(Ledger(folder.parent / "home"), found, to, "a-run")
    assert not recorded  # this home did not make it
    return made


def test_it_is_private_and_whole_and_new_gates_leave_the_experts_where_they_are(
    server: HubServer, world: World, folder: Path
) -> None:
    made = put(server, world, folder)
    repo = repo_of(server)
    assert repo.private
    assert set(repo.main) - {".gitattributes"} == set(FILES) - {GATES, STATISTICS}
    assert repo.main[EXPERTS] == (folder / EXPERTS).read_bytes()
    assert repo.main[CARD].decode().endswith(f"\n{NAME}\n")
    assert repo.tags == {made.tag: made.revision}
    assert card.NAME_PLACEHOLDER in (folder / CARD).read_text()

    (folder / MANIFEST).write_text(with_gates(folder, read_manifest(folder)).to_json())
    server.requests.clear()
    put(server, world, folder)
    assert server.count("put") == 1
    assert repo.main[GATES] == (folder / GATES).read_bytes()


def test_results_for_leaderboards_come_and_go_with_the_model(
    server: HubServer, world: World, folder: Path
) -> None:
    (folder / EVAL_RESULTS).parent.mkdir()
    (folder / EVAL_RESULTS).write_text("- {dataset: {id: a/b, task_id: c}, value: 1.0}\n")
    first = put(server, world, folder)
    assert repo_of(server).main[EVAL_RESULTS] == (folder / EVAL_RESULTS).read_bytes()
    assert put(server, world, folder).revision == first.revision
    (folder / EVAL_RESULTS).unlink()
    put(server, world, folder, onto=first.revision)
    assert EVAL_RESULTS not in repo_of(server).main


def test_what_comes_back_as_another_model_is_never_shown(
    server: HubServer, world: World, folder: Path
) -> None:
    data = bytearray((folder / EXPERTS).read_bytes())
    data[-4:] = b"\0\0\0\0"
    server.faults["get"] = Fault(body=bytes(data), path=EXPERTS)
    with pytest.raises(PublicationError, match="other bytes"):
        put(server, world, folder)
    assert set(repo_of(server).main) == {".gitattributes"}
    assert not repo_of(server).tags


@pytest.mark.parametrize(
    ("name", "fault", "sentence"),
    [
        (EVAL_RESULTS, Fault(body=b"- {value: 9.0}\n"), f"{EVAL_RESULTS} came back"),
        (LINEAGE, Fault(body=b"[]\n"), f"{LINEAGE} came back"),
        (CARD, Fault(status=404), "cannot be loaded"),
    ],
    ids=["results", "lineage", "card"],
)
def test_a_file_that_no_load_needs_comes_back_too(
    server: HubServer, world: World, folder: Path, name: str, fault: Fault, sentence: str
) -> None:
    (folder / EVAL_RESULTS).parent.mkdir()
    (folder / EVAL_RESULTS).write_text("- {value: 1.0}\n")
    server.faults["get"] = dataclasses.replace(fault, path=name)
    with pytest.raises(PublicationError, match=sentence):
        put(server, world, folder)
    assert set(repo_of(server).main) == {".gitattributes"}


def test_what_cannot_be_loaded_is_never_shown(
    server: HubServer, world: World, folder: Path
) -> None:
    server.faults["get"] = Fault(body=b"{", path=MANIFEST)
    with pytest.raises(PublicationError, match="cannot be loaded"):
        put(server, world, folder)
    assert set(repo_of(server).main) == {".gitattributes"}


def test_it_is_compared_on_the_device_and_in_the_dtype_that_are_named(
    server: HubServer, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    reload = publishing._reload

    def watched(request: dict[str, Any], hub: Hub) -> dict[str, Any]:
        asked.append(request)
        return reload(request, hub)

    monkeypatch.setattr(publishing, "_reload", watched)
    put(server, world, folder, dtype="bfloat16")
    assert [(one["device"], one["dtype"]) for one in asked] == [("auto", "bfloat16")]


def test_what_is_for_nobody_else_stays_here(
    server: HubServer, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (folder / CARD).read_text()
    home = folder.parent / "home"
    for secret in ("hf_" + "a" * 30, str(home / "adapters"), f"--home {home}", "writer"):
        (folder / CARD).write_text(text + secret)
        with pytest.raises(PublicationError, match=CARD):
            put(server, world, folder)
    (folder / CARD).write_text(text)
    (folder.parent / "a-key").write_text("BEGIN PRIVATE KEY")
    (folder / STATISTICS).symlink_to(folder.parent / "a-key")  # no load reads it
    with pytest.raises(PublicationError, match=f"{STATISTICS} is a link to .*a-key"):
        put(server, world, folder)
    (folder / STATISTICS).unlink()
    for name in (CARD, LINEAGE):
        other = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\xff" + other)
        with pytest.raises(PublicationError, match=f"{name}: it is not a text in UTF-8"):
            put(server, world, folder)
        (folder / name).rename(folder.parent / "a-letter")
        (folder / name).symlink_to(folder.parent / "a-letter")
        with pytest.raises(PublicationError, match=f"{name} is a link to .*a-letter"):
            put(server, world, folder)
        (folder / name).unlink()
        (folder / name).write_bytes(other)
    (folder.parent / "theirs").mkdir()
    (folder.parent / "theirs" / "meteora.yaml").touch()
    (folder / EVAL_RESULTS).parent.symlink_to(folder.parent / "theirs")
    with pytest.raises(PublicationError, match=f"{EVAL_RESULTS} is a link to .*theirs"):
        put(server, world, folder)
    (folder / EVAL_RESULTS).parent.unlink()
    (folder / LINEAGE).write_text(json.dumps({"uri": "/home/jürgen/adapters"}))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "home", lambda: Path("/home/jürgen"))
        with pytest.raises(PublicationError, match=LINEAGE):
            put(server, world, folder)
    (folder / LINEAGE).write_text("{}\n")
    for home in (Path.home(), Path("/")):  # in a container a user may have the root as home
        monkeypatch.setattr(Path, "home", lambda home=home: home)
        with pytest.raises(HubTokenError):
            put(server, world, folder, token="")
    monkeypatch.chdir(folder.parent)
    to, found = Destination(NAME, HubHere()), FoundCheckpoint(folder, world.base)
    with pytest.raises(HubTokenError):  # `.` is in every text
        publish(Ledger(Path()), found, to, "a-run")
    (folder / CARD).write_text(f"{text}{folder}")
    with pytest.raises(PublicationError, match=CARD):
        publish(Ledger(Path()), found, to, "a-run")
    assert not server.requests
    with pytest.raises(HubReferenceError, match="not owner/name"):
        publish(Ledger(folder), found, Destination("../model", HubHere()), "a-run")


def test_a_licence_that_forbids_it_stops_it_unless_it_is_allowed(
    server: HubServer, world: World, folder: Path
) -> None:
    def licensed(licence: str, source: str = "someone/adapter") -> Manifest:
        first, *others = world.manifest.experts
        first = dataclasses.replace(first, licence=licence, source=source)
        return dataclasses.replace(world.manifest, experts=(first, *others))

    for licence in ("mit", "apache-2.0", "cc-by-nc-4.0", "llama3.2", "derivatives are allowed"):
        refuse_forbidden(licensed(licence))
    refuse_forbidden(licensed("", "path:mine"))
    for licence, told in (
        ("cc-by-nd-4.0", "cc-by-nd-4.0"),
        ("cc-by-nc-nd-4.0-igo", "cc-by-nc-nd-4.0-igo"),
        ("CC-BYNCND", "CC-BYNCND"),
        ("BYND4.0", "BYND4.0"),
        ("other", "other"),
        ("none", "none"),
        ("n/a", "n/a"),
        ("", "none"),
    ):
        with pytest.raises(LicenceError, match=f"all_seven.*--allow-licence {told}"):
            refuse_forbidden(licensed(licence))
        refuse_forbidden(licensed(licence), [told])
    for licence in (
        "CC BY-NC-ND 4.0",
        "Creative Commons BY-ND",
        "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0",
        "non-derivative use",
        "no  derivatives",
        "cc_by_nd mine",
        "cc-by-nd-4.0, mit",
        "mit, other",
        "all rights reserved",
    ):
        with pytest.raises(LicenceError, match=f"--allow-licence '{licence}'"):
            refuse_forbidden(licensed(licence, "path:mine"))
    (folder / MANIFEST).write_text(licensed("cc-by-nc-nd-4.0").to_json())
    with pytest.raises(LicenceError):
        put(server, world, folder)
    assert not server.requests


@pytest.mark.usefixtures("prefect_server")
def test_a_recipe_publishes_what_it_made_and_only_what_is_new(
    server: HubServer,
    workplace: Callable[..., RunContext],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the processes of a real run; then its card's own lines run in another."""
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", "writer")
    work = workplace(
        publish={"repo": NAME}, benchmark={"limit": 4, "compare": [], "max_new_tokens": 4}
    )
    uses = []

    @contextmanager
    def held(*slots: str) -> Generator[None]:
        uses.append(slots)
        yield

    monkeypatch.setattr(device_lock, "held", held)
    assert list(run(work, apart=True)) == [*Stage]
    assert len(uses) == 2  # the device of gates and benchmark, and again to load what is published
    repo = repo_of(server)
    assert f"published as {NAME}@{repo.branches['main']}" in capfd.readouterr().err
    assert set(repo.main) - {".gitattributes"} == set(FILES)
    answer = work.ledger.query("SELECT repo_id, revision, kind FROM publications")
    assert answer.rows == [(NAME, repo.branches["main"], "router")]

    planned, _ = result_of(work)
    folder = work.checkpoint_folder(planned.router.id)
    to = Destination(NAME, HubHere(server.endpoint, "writer"))
    server.requests.clear()
    found = FoundCheckpoint(folder, world.base)
    publish(work.ledger, found, to, work.run_id)
    assert not {kind for kind, _, _ in server.requests} & {"commit", "put", "tag", "get"}
    assert len(work.ledger.publications(NAME)) == 1

    _the_card_is_true(repo.main[CARD].decode(), world, tmp_path)
    _what_is_asked_anew_is_done_once(work, repo, to, world)

    (folder / CARD).write_text((folder / CARD).read_text() + "\nnew\n")
    assert finished(work) is None
    repo.commit_files("main", repo.main | {CARD: b"edited there"})
    with pytest.raises(HubConflictError, match=f"--onto {repo.branches['main']}"):
        publish(work.ledger, found, to, work.run_id)


def _what_is_asked_anew_is_done_once(
    work: RunContext, repo: GitRepo, to: Destination, world: World
) -> None:
    """Another visibility, a tag, a file that is not published: then nothing is left to do."""
    planned, _ = result_of(work)
    assert work.recipe.publish is not None
    folder, commit = work.checkpoint_folder(planned.router.id), repo.branches["main"]
    found = FoundCheckpoint(folder, world.base)
    for private, tag in ((False, ""), (True, ""), (True, "v1"), (True, "v2")):
        repo.private = private
        section = work.recipe.publish.model_copy(update={"private": private, "tag": tag})
        recipe = work.recipe.model_copy(update={"publish": section})
        asked = dataclasses.replace(work, recipe=recipe)
        assert finished(asked) is None
        other = dataclasses.replace(to, private=private, tag=tag)
        publish(work.ledger, found, other, work.run_id)
        assert finished(asked) is not None
        assert tag in {"", *repo.tags}
    (folder / "notes.txt").write_text("mine")
    publish(work.ledger, found, to, work.run_id)
    assert finished(work) is not None
    assert repo.branches == {"main": commit}
    work.ledger.ingest()
    assert len(work.ledger.query("FROM publications").rows) == 1


def _the_card_is_true(text: str, world: World, tmp_path: Path) -> None:
    data: Any = ModelCard(text).data
    assert data.library_name == "meteora-pipelines"
    assert data.pipeline_tag == "text-generation"
    found = {(result.dataset_name, result.metric_type) for result in data.eval_results}
    assert found == {("q_and_v", "exact_match"), ("attention", "exact_match")}
    assert all(result.dataset_args == {"num_samples": 4} for result in data.eval_results)

    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 4  # three with a chat template
    code = code.replace("FOLDER_OF_THE_BASE", str(world.base))
    # a user's own process, in which we have set nothing
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment["HF_HOME"] = str(tmp_path / "empty")
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("What is 12 plus 30?")


@pytest.mark.parametrize(
    ("stated", "licence", "name"),
    [
        ("mit", "mit", None),
        ("Apache-2.0", "apache-2.0", None),
        ("agpl-3.0-or-later", "other", "agpl-3.0-or-later"),
        ("Apache License 2.0", "other", "of-its-base-and-adapters"),
        ("mit, apache-2.0", "other", "of-its-base-and-adapters"),
        ("other", "other", "of-its-base-and-adapters"),
    ],
)
def test_a_card_has_a_licence_that_the_hub_takes(
    stated: str, licence: str, name: str | None, world: World
) -> None:
    """It refuses a commit with another; adapters on this disk, and mirrors, have any."""
    manifest = dataclasses.replace(
        world.manifest,
        base=dataclasses.replace(world.manifest.base, licence=stated),
        experts=tuple(dataclasses.replace(e, licence=stated) for e in world.manifest.experts),
    )
    found = shared_licence(manifest)
    assert (found["license"], found.get("license_name")) == (licence, name)


def test_an_expert_that_lies_on_the_hub_is_linked_at_its_commit(world: World) -> None:
    first, *others = world.manifest.experts
    first = dataclasses.replace(
        first, source="someone/adapter/sub", revision="a" * 40, licence="mit", r="8"
    )
    manifest = dataclasses.replace(world.manifest, experts=(first, *others))
    assert hub_ids(manifest) == ["someone/adapter"]
    assert shared_licence(manifest) == {
        "license": "other",
        "license_name": "of-its-base-and-adapters",
    }
    row = next(line for line in card._sources(manifest) if "all_seven" in line)
    assert f"/someone/adapter/tree/{'a' * 40})" in row
    assert json.dumps(row)
