"""A damaged base is noticed before a result is made from it, and `verify` names it."""

import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from meteora.artifacts import BaseSpec
from meteora.base.sources import weights_sha256
from pipelines.flows.up_to_date import look
from pipelines.stages.build import build_base
from pipelines.stages.open_model import opened
from pipelines.workspace import bases
from pipelines.workspace.checkpoints import base_at_hand
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.cli.command_line import meteora
from tests.pipelines.conftest import base_of, plan_of
from tests.pipelines.hub.hub_server import HubServer, Repo, running_hub

COMMIT = "a" * 40
SPEC = BaseSpec("org/base", COMMIT)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub(world: World) -> Generator[HubServer]:
    with running_hub() as server:
        files = {path.name: path.read_bytes() for path in world.base.iterdir()}
        server.repos["org/base"] = Repo(files, refs={"main": COMMIT})
        yield server


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the first test, with its base, for the others."""
    return tmp_path_factory.mktemp("kept") / "home"


@pytest.fixture
def work(hub: HubServer, kept: Path, workplace: Callable[..., RunContext]) -> RunContext:
    """A recipe whose base is on the Hub, in a home that has it."""
    work = workplace(base="org/base", hub={"endpoint": hub.endpoint})
    if kept.exists():
        shutil.copytree(kept, work.home, dirs_exist_ok=True)
    else:
        base_of(work)
        shutil.copytree(work.home, kept)
    return work


@pytest.fixture
def folder(work: RunContext) -> Path:
    return work.base_folder(SPEC)


def overwrite(path: Path, *, touched: bool = True) -> None:
    """Change some bytes in the middle of a file, as a bad disk or another program does."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        file.write(bytes(64))
    if not touched:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def unsealed(folder: Path) -> None:
    """Make it what an earlier version wrote: writable, and without a note."""
    (folder / bases.NOTE).unlink()
    for path in folder.iterdir():
        path.chmod(0o644)


def test_a_new_base_is_read_only_and_can_be_deleted(work: RunContext, folder: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    assert work.ledger.weights_of(SPEC.id) == weights_sha256(folder)
    shutil.rmtree(folder)
    assert not folder.exists()


def test_an_unchanged_base_is_not_hashed_again(
    work: RunContext, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    real = bases.file_sha256
    monkeypatch.setattr(bases, "file_sha256", lambda path: hashed.append(path) or real(path))
    bases.require_sound(work.ledger, SPEC)
    assert not hashed
    os.utime(folder / WEIGHTS)  # another time and the same bytes: hashed once
    bases.require_sound(work.ledger, SPEC)
    assert folder / WEIGHTS in hashed
    hashed.clear()
    bases.require_sound(work.ledger, SPEC)
    assert not hashed


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_other_bytes_are_refused_by_all_that_load_the_base(
    work: RunContext, folder: Path, name: str
) -> None:
    plan = plan_of(work)
    overwrite(folder / name)
    sentence = f"the bytes of {name} have changed since the base was made; delete this folder"
    with pytest.raises(bases.DamagedBaseError, match=sentence):
        look(work)
    with pytest.raises(bases.DamagedBaseError, match=sentence):
        opened(work, plan).__enter__()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ 'no' }}"),
            "chat_template.jinja is no file of this base",
        ),
        (lambda folder: (folder / WEIGHTS).rename(folder / "x.safetensors"), "is missing"),
    ],
    ids=["missing", "added", "renamed"],
)
def test_a_file_more_or_less_is_refused(
    work: RunContext, folder: Path, change: Callable[[Path], object], sentence: str
) -> None:
    change(folder)
    with pytest.raises(bases.DamagedBaseError, match=sentence):
        bases.require_sound(work.ledger, SPEC)


def test_a_base_of_an_earlier_version_is_checked_and_sealed(work: RunContext, folder: Path) -> None:
    unsealed(folder)
    assert look(work).built is not None
    assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o444
    assert (folder / bases.NOTE).is_file()


def test_its_damage_is_found_by_the_hash_in_the_ledger(work: RunContext, folder: Path) -> None:
    unsealed(folder)
    overwrite(folder / WEIGHTS)
    with pytest.raises(bases.DamagedBaseError, match="the bytes of its weights have changed"):
        bases.require_sound(work.ledger, SPEC)
    assert not (folder / bases.NOTE).exists()


def test_a_note_that_cannot_be_read_counts_as_none(work: RunContext, folder: Path) -> None:
    for text in ("", "[1]", '[{"path": 1}]', "{}"):
        (folder / bases.NOTE).chmod(0o644)
        (folder / bases.NOTE).write_text(text)
        bases.require_sound(work.ledger, SPEC)


def test_a_deleted_base_is_brought_again(work: RunContext, folder: Path) -> None:
    overwrite(folder / WEIGHTS)
    shutil.rmtree(folder)
    assert build_base(work, SPEC).spec == SPEC
    bases.require_sound(work.ledger, SPEC)


def test_verify_hashes_a_base_whose_time_did_not_change(work: RunContext, folder: Path) -> None:
    said = meteora("verify", home=work.home)
    assert said.returncode == 0, said.stdout
    overwrite(folder / WEIGHTS, touched=False)
    bases.require_sound(work.ledger, SPEC)  # by its size and time it is as it was
    said = meteora("verify", home=work.home)
    assert said.returncode == 1
    (finding, _total) = said.stdout.splitlines()
    assert finding.startswith(f"base bases/{folder.name}: the bytes of {WEIGHTS} have changed")
    assert f"it touches {SPEC.id[:17]}" in finding


def test_commands_on_a_checkpoint_refuse_a_damaged_base(
    work: RunContext, folder: Path, world: World, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(world.checkpoint, tmp_path / "checkpoint")
    manifest = checkpoint / "meteora.json"
    text = manifest.read_text()
    text = text.replace(world.manifest.base.repo_id, SPEC.base_model)
    manifest.write_text(text.replace(world.manifest.base.revision, SPEC.base_revision))
    assert base_at_hand(checkpoint, work.home) == folder
    overwrite(folder / WEIGHTS)
    records = sorted(work.home.glob("records/*/*"))
    for words in (
        ["generate", checkpoint, "hello"],
        ["add", checkpoint, "new", world.adapters["q_and_v"], "jsonl:none.jsonl"],
    ):
        said = meteora(*words, home=work.home)
        assert (said.returncode, said.stdout) == (1, "")
        assert f"error: {folder}: the bytes of {WEIGHTS} have changed" in said.stderr
        assert "Traceback" not in said.stderr
    assert sorted(work.home.glob("records/*/*")) == records


def test_a_base_behind_a_link_is_left_alone(world: World, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    link = bases.base_at(tmp_path, SPEC.id)
    link.parent.mkdir()
    link.symlink_to(world.base)
    bases.require_sound(ledger, SPEC)
    assert not (world.base / bases.NOTE).exists()
