"""What a run knows of its recipe, from wherever the recipe is named."""

from pathlib import Path
from typing import Any

import pytest

from meteora.artifacts import canonical_sha256, file_sha256
from pipelines.workspace import context
from pipelines.workspace.context import RunContext

RECIPE = "base: owner/base\nexperts: [{name: a, adapter: owner/a}]\nrouter: {kind: prompt}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "x"


@pytest.mark.parametrize("named", ["recipe.yaml", "./recipe.yaml", "../x/recipe.yaml", "absolute"])
def test_a_recipe_has_one_name_and_one_key_however_it_is_named(
    named: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = folder / "recipe.yaml"
    work = RunContext.open(str(path) if named == "absolute" else named, tmp_path / "home")
    assert work.name == "x"
    assert work.key == f"x-{canonical_sha256(str(path))[:8]}"


def test_a_linked_recipe_is_one_of_the_link_s_folder(folder: Path, tmp_path: Path) -> None:
    """Its paths are relative to that folder, for a run by hand and for one by a schedule."""
    from pipelines.flows import deployments  # noqa: PLC0415  (Prefect, once its server is known)

    (tmp_path / "y").mkdir()
    link = tmp_path / "y" / "recipe.yaml"
    link.symlink_to(folder / "recipe.yaml")
    work = RunContext.open(str(link), tmp_path / "home")
    other = RunContext.open(str(folder / "recipe.yaml"), tmp_path / "home")
    assert (work.name, work.folder) == ("y", link.parent)
    assert work.key != other.key
    asked: Any = deployments.fuse_adapters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(asked), "to_deployment", lambda _flow, **given: given)
        deployed: Any = deployments._deployment(work, None)
    assert RunContext.open(deployed["parameters"]["recipe"], tmp_path / "home").key == work.key


def test_a_run_names_the_recipe_that_it_read_whatever_its_file_says_later(
    folder: Path, tmp_path: Path
) -> None:
    path = folder / "recipe.yaml"
    work, read = RunContext.open(str(path), tmp_path / "home"), file_sha256(path)
    path.write_text(RECIPE + "# later\n")
    assert work.recipe_sha256 == read
    path.unlink()
    assert work.recipe_sha256 == read


def test_a_folder_keeps_its_place_until_the_next_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was killed while the new one was synced had neither."""
    folder, made = tmp_path / "checkpoints" / "x", tmp_path / "scratch" / "x"
    for place, text in ((folder, "old"), (made, "new")):
        place.mkdir(parents=True)
        (place / "file").write_text(text)

    def killed(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            context.put_in_place(made, folder)
    assert (folder / "file").read_text() == "old"
    context.put_in_place(made, folder)
    assert (folder / "file").read_text() == "new"


def test_a_folder_that_another_process_has_just_put_there_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made, others = (tmp_path / name / "x" for name in ("checkpoints", "mine", "others"))
    for place in (made, others):
        place.mkdir(parents=True)
        (place / "file").write_text(place.parent.name)
    rename = Path.rename

    def second(path: Path, to: Path) -> Path:
        if path == made and others.exists():
            rename(others, folder)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", second)
    context.put_in_place(made, folder)
    assert (folder / "file").read_text() == "mine"
