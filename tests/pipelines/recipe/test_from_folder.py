"""A folder of adapters becomes a recipe that runs as it is."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from pipelines.recipe.from_folder import ImportingError, write_recipe
from pipelines.recipe.recipe import Recipe
from tests.pipelines.cli.command_line import ask, meteora

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """Three adapters, two of which can be experts; PEFT wrote the base's folder into each."""
    folder = tmp_path / "adapters"
    for name in ("q_and_v", "attention", "patterns"):
        shutil.copytree(world.adapters[name], folder / name)
    shutil.move(folder / "attention", folder / "_at tention")
    (folder / "patterns" / "adapter_model.safetensors").write_bytes(b"")
    return folder


def configure(folder: Path, **change: object) -> None:
    for path in folder.glob("*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_dry_run_takes_it_and_arrow_needs_no_examples(
    world: World, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recipes" / "mine.yaml"
    made = ask("import", folder, "-o", out)
    assert made.stdout == f"{out}\n", made.stderr
    recipe = Recipe.load(out)
    assert {one.name for one in recipe.experts} == {"at-tention", "q_and_v"}
    assert recipe.router.kind == "arrow"
    assert "# left out, ../adapters/patterns: adapter_model.safetensors is empty" in out.read_text()
    said = meteora("run", out, "--dry-run", home=tmp_path / "home")
    assert said.returncode == 0, said.stderr
    assert "q_and_v: path:../adapters/q_and_v" in said.stdout
    assert "router     arrow" in said.stdout
    assert str(world.base) not in said.stderr


def test_rows_beside_the_adapters_make_a_gate_possible(folder: Path) -> None:
    shutil.rmtree(folder / "patterns")
    for name in ("q_and_v", "_at tention"):
        (folder / name / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (folder / "q_and_v" / "test.jsonl").write_text('{"prompt": "c", "response": "d"}\n')
    recipe = write_recipe(folder, folder / "recipe.yaml")
    assert recipe.router.kind == "gate"
    found = {one.name: (one.examples, one.test) for one in recipe.experts}
    assert found["q_and_v"] == ("jsonl:q_and_v/train.jsonl", "jsonl:q_and_v/test.jsonl")
    assert found["at-tention"] == ("jsonl:_at tention/train.jsonl", None)


def test_a_base_on_the_hub_is_taken_from_the_configs(folder: Path, tmp_path: Path) -> None:
    configure(folder, base_model_name_or_path="owner/base", revision="a" * 40)
    assert write_recipe(folder, tmp_path / "one.yaml").base == f"owner/base@{'a' * 40}"
    configure(folder, base_model_name_or_path=None, revision=None)
    with pytest.raises(ImportingError, match="--base owner/name"):
        write_recipe(folder, tmp_path / "two.yaml")
    assert write_recipe(folder, tmp_path / "two.yaml", "owner/base@v1").base == "owner/base@v1"


def test_strangers_text_stays_in_its_comment(folder: Path, tmp_path: Path) -> None:
    configure(folder, base_model_name_or_path="owner/base")
    path = folder / "q_and_v" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "other/base\nrouter: {kind: norm}"
    path.write_text(json.dumps(config))
    assert write_recipe(folder, tmp_path / "one.yaml", "owner/base").router.kind == "arrow"


def test_nothing_is_overwritten_and_nothing_is_made_of_nothing(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(ImportingError, match="is there already"):
        write_recipe(folder, tmp_path / "there.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportingError, match="no adapter in it"):
        write_recipe(tmp_path / "empty", tmp_path / "one.yaml")
