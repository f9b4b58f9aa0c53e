"""A recipe of adapters alone: each prompt goes to the expert whose updates stand out on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import meteora
from meteora.artifacts import NULL, MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.manifest import CARD, GATES, STATISTICS, read_manifest
from meteora.model.fused import expert_names
from meteora.routing.layer import routed_layers
from meteora.routing.prompt_router import PromptRouter
from meteora.serving.served_folder import export_for_vllm
from pipelines.recipe.recipe import Recipe, RecipeError
from pipelines.stages import edit
from pipelines.stages.edit import GrowthError
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import print_steps, result_of, run


def alone(folder: Path) -> list[dict[str, str]]:
    """The experts of a recipe, without examples."""
    found = yaml.safe_load((folder / "recipe.yaml").read_text())["experts"]
    return [{key: one[key] for key in one if key != "examples"} for one in found]


@pytest.mark.usefixtures("prefect_server")
def test_adapters_alone_become_a_model_that_chooses_by_the_prompt(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    work = workplace(
        experts=alone(recipe_folder),
        router={"kind": "prompt", "null": True},
        benchmark={"limit": 1, "compare": ["oracle"], "max_new_tokens": 1},
    )
    run(work)
    planned, summary = result_of(work)
    folder = work.checkpoint_folder(planned.router.id)
    assert set(summary.sizes) >= {"experts", "gates"}
    assert not (folder / STATISTICS).exists()
    card = (folder / CARD).read_text()
    assert "prompt, top_k 1" in card
    assert "Its router is not trained; the scores show" in card  # it was fitted to no task's rows
    assert "token's hidden state" not in card
    manifest = read_manifest(folder)
    assert manifest.gates["method"] == "background"
    assert manifest.files[GATES] == summary.gates.weights_sha256

    model, tokenizer = meteora.load(folder, base_folder=recipe_folder / "base")
    assert expert_names(model)[-1] == NULL
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, "what is this?")])).logits
    assert logits.isfinite().all()
    assert all(isinstance(one.router, PromptRouter) for one in routed_layers(model).values())
    with pytest.raises(GrowthError, match="here: the router `prompt`"):
        edit.drop(work.ledger, folder, planned.fused.names[0])
    with pytest.raises(MeteoraError, match="its router is 'prompt', and vLLM is given"):
        export_for_vllm(folder, recipe_folder / "base", tmp_path / "served")


def test_a_dry_run_has_its_time_and_room(
    workplace: Callable[..., RunContext],
    recipe_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {}
    for kind in ("prompt", "norm"):
        work = workplace(experts=alone(recipe_folder), router={"kind": kind})
        print_steps(work)
        stages[kind] = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert "gates" in stages["prompt"]
    assert "gates" not in stages["norm"]


@pytest.mark.parametrize("key", ["share", "opening", "margin"])
def test_what_is_for_gates_is_refused(recipe_folder: Path, tmp_path: Path, key: str) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    value = {"share": "layer", "opening": "own", "margin": 1.0}[key]
    body |= {"experts": alone(recipe_folder), "router": {"kind": "prompt", key: value}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(RecipeError, match=f"router.{key} is for gates"):
        Recipe.load(path)
