"""The controls that take long, on tiny models: the same script, seconds instead of hours."""

from pathlib import Path

import pytest
import yaml

from meteora.adapters import reader
from pipelines.scoring.outputs import read_outputs
from tests.benchmarks import controls
from tests.benchmarks.peers import save_adapters
from tests.conftest import World

NAMES = ("q_and_v", "attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recipe_folder: Path, world: World) -> Path:
    """The tiny recipe with adapters of one rank on the same layers: PEFT's methods ask for them."""
    made = tmp_path_factory.mktemp("equal")
    (made / "base").symlink_to(world.base)
    saved = save_adapters(world.load_base(), made / "adapters", len(NAMES), r=4)
    for path, name in zip(saved, NAMES, strict=True):
        path.rename(made / "adapters" / name)
        for split in ("train", "test"):
            rows = (recipe_folder / f"{name}.{split}.jsonl").read_text()
            (made / f"{name}.{split}.jsonl").write_text(rows)
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    for expert in body["experts"]:
        expert["adapter"] = f"path:adapters/{expert['name']}"
    body["gates"] = {"method": "calibrate", "examples_per_expert": 4}
    body["benchmark"] |= {"compare": ["base"], "limit": 3, "max_new_tokens": 2}
    (made / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return made


def run(folder: Path, system: str, out: Path, *, steps: int = 2) -> None:
    controls.main(
        [
            *(system, str(folder / "recipe.yaml"), str(folder / "base"), str(out)),
            *("--home", str(folder / "home"), "--steps", str(steps)),
        ]
    )


@pytest.mark.parametrize("system", controls.SYSTEMS)
def test_a_control_is_put_to_the_recipes_own_tasks(
    folder: Path, system: str, tmp_path: Path
) -> None:
    run(folder, system, tmp_path)
    table = (tmp_path / f"{system}.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == list(NAMES)
    for line, name in zip(table[2:], NAMES, strict=True):
        rows = read_outputs(tmp_path / system / f"{name}.parquet")
        assert len(rows) == 3
        mean = sum(row["exact_match"] for row in rows) / 3
        assert line.split("|")[3:5] == [" 3 ", f" {mean:.3f} {line.split('|')[4].split(' ', 2)[2]}"]


def test_one_lora_of_all_tasks_has_as_many_numbers_as_the_experts(
    folder: Path, world: World
) -> None:
    folders = [folder / "adapters" / name for name in NAMES]
    ranks = controls.ranks_stored(folders)
    assert set(ranks.values()) == {8}
    stored = sum(
        module.num_parameters for path in folders for module in reader.read(path).spec.modules
    )
    made = controls.multitask(world.load_base(), ranks)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == stored


@pytest.mark.parametrize("system", ["arrow", "x-lora"])
def test_adapters_of_several_ranks_are_taken(
    recipe_folder: Path, world: World, system: str, tmp_path: Path
) -> None:
    specs = [reader.read(world.adapters[name]).spec for name in NAMES]
    modules = [{(module.path, module.r) for module in spec.modules} for spec in specs]
    assert modules[0] != modules[1]
    run(recipe_folder, system, tmp_path)
    for name in NAMES:
        assert read_outputs(tmp_path / system / f"{name}.parquet")


def test_a_table_tells_what_differs_beyond_chance() -> None:
    from pipelines.evaluation.evaluate import TaskResult  # noqa: PLC0415
    from pipelines.evaluation.tasks import Task  # noqa: PLC0415
    from pipelines.scoring.outputs import RowValues  # noqa: PLC0415

    def answered(values: list[float]) -> TaskResult:
        rows = tuple({"exact_match": value} for value in values)
        found = RowValues(tuple(values), graded=False)
        return TaskResult({"exact_match": found}, rows, templated=False, wall_seconds=1.0)

    asked = {
        name: (Task(name, ("exact_match",), "auto", 4), answered(values))
        for name, values in {"far": [0.0] * 20, "near": [1.0, 0.0], "unasked": [1.0]}.items()
    }
    lines = controls.table("arrow", asked, {"far": [1.0] * 20, "near": [1.0, 1.0]}).splitlines()
    assert "| far | exact_match | 20 | 0.000 [0.000, 0.161] | 1.000 | +1.000 | 0.000 |" in lines
    assert "| near | exact_match | 2 | 0.500 [0.095, 0.905] | 1.000 | +0.500 | 1.000 |" in lines
    assert lines[-1].endswith("|  |  |  |")
