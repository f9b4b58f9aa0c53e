"""A recipe in which an expert has no examples."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import meteora
from meteora.checkpoint.manifest import CARD, read_manifest
from pipelines.cli import score_table
from pipelines.recipe.recipe import Recipe, RecipeError
from pipelines.stages import edit
from pipelines.stages.edit import GrowthError
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import result_of, run

MIXED = {"kind": "gate", "without_examples": "arrow"}


def experts(folder: Path) -> list[dict[str, str]]:
    found = yaml.safe_load((folder / "recipe.yaml").read_text())["experts"]
    del found[1]["examples"]
    return found


@pytest.mark.usefixtures("prefect_server")
def test_it_is_told_by_its_weights_and_card_and_summary_say_so(
    workplace: Callable[..., RunContext], recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = workplace(
        experts=experts(recipe_folder),
        router=MIXED,
        benchmark={"limit": 1, "compare": [], "max_new_tokens": 1},
    )
    run(work)
    planned, summary = result_of(work)
    assert planned.router.stand_ins == ("attention",)
    folder = work.checkpoint_folder(planned.router.id)
    assert "No examples were given for attention" in (folder / CARD).read_text()
    score_table.print_scores("x", folder, planned, summary, {})
    assert "No examples were given for attention" in capsys.readouterr().out
    assert read_manifest(folder).router.stand_in == "arrow"
    meteora.load(folder, base_folder=recipe_folder / "base")
    with pytest.raises(GrowthError, match="attention had no examples"):
        edit.drop(work.ledger, folder, "q_and_v")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router": {"kind": "gate"}}, "choose router.kind: prompt"),
        ({"router": {"kind": "arrow", "without_examples": "arrow"}}, "is for gates"),
        ({"router": {"kind": "uniform", "top_k": 2}}, "router.top_k and router.temperature change"),
        ({"gates": {"method": "joint"}}, "goes with gates.method: calibrate"),
    ],
)
def test_what_does_not_go_together_is_refused(
    recipe_folder: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    body |= {"experts": experts(recipe_folder), "router": MIXED} | changed
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)
