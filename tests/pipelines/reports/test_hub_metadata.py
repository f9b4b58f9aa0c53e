"""Scores for the Hub's leaderboards, as its own client reads them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from meteora.artifacts import ArtifactId, BenchmarkSpec, RouterOptions, Score, ScoreTurn
from meteora.artifacts.routers import POINT_GATES
from meteora.checkpoint.manifest import EVAL_RESULTS
from pipelines.recipe.benchmark import TaskSection
from pipelines.recipe.recipe import Recipe, RecipeError
from pipelines.reports.card import method_lines, score_table, usage_lines, write_card
from pipelines.reports.hub_metadata import write_eval_results
from pipelines.reports.summary import Summary
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.conftest import finished, result_of, run

TASK: dict[str, Any] = {"name": "letters", "rows": "jsonl:q_and_v.test.jsonl"}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_task_that_the_recipe_puts_on_a_leaderboard_is_there_with_its_circumstances(
    workplace: Callable[..., RunContext],
) -> None:
    def benchmark(**more: str) -> dict[str, Any]:
        return {"limit": 4, "compare": ["base"], "max_new_tokens": 4, "tasks": [TASK | more]}

    work = workplace(benchmark=benchmark(leaderboard="org/letters/default"))
    run(work)
    planned, summary = result_of(work)
    score = summary.scores["letters"]["fused"]
    results = work.checkpoint_folder(planned.router.id) / EVAL_RESULTS
    (entry,) = parse_eval_result_entries(yaml.safe_load(results.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("org/letters", "default")
    assert entry.value == round(100 * score.value, 4)
    assert entry.notes is not None
    assert entry.notes.startswith(f"exact_match, zero-shot, greedy, {score.harness}; of 4 rows, 95")

    without = workplace(benchmark=benchmark())
    assert finished(without) is None  # nothing is measured again, and the file goes
    scores = work.ledger.query("SELECT count(*) FROM scores").rows
    run(without)
    assert finished(without) is not None
    assert not results.exists()
    assert work.ledger.query("SELECT count(*) FROM scores").rows == scores


def test_solved_examples_in_the_prompts_are_told_on_the_card_and_to_the_hub() -> None:
    spec = BenchmarkSpec(
        ArtifactId("router:1"), "t", "f" * 64, "acc", 5, 8, 0, ArtifactId("base:1")
    )
    score = Score(spec, 0.5, 0.1, 0.4, 0.6, 30, "e" * 64, "lm-eval 0.4.13", 1.0)
    plain = replace(score, spec=replace(spec, task="u", num_fewshot=0))
    assert plain.spec.id != replace(spec, task="u").id
    plain = replace(plain, harness="lm-eval 0.5.0")  # scored after an update
    summary = Summary({"t": {"fused": score}, "u": {"fused": plain}}, Mock(), None, {})
    assert "mean of" not in "\n".join(score_table(summary))  # no task is an expert's own
    said = method_lines(summary)[0]
    section = TaskSection(name="t", lm_eval="t", num_fewshot=5, leaderboard="a/b/c")
    assert "acc, 5-shot, greedy" in write_eval_results([section], summary)
    assert said.startswith("Settings: greedy, zero-shot but for t (5-shot), lm-eval 0.4.13, lm-ev")
    assert "answers" not in said  # of lm-eval's own tasks nobody knows which were cut


def test_a_card_asks_in_the_chat_template_unless_the_model_is_for_plain_text(
    world: World,
) -> None:
    """A checkpoint without scores, as `meteora drop` makes it, answers nothing to plain text."""
    plain = replace(world.manifest, gates={"method": "calibrate", "template": "plain"})
    for manifest, code in ((world.manifest, "meteora.generate("), (plain, "model.generate(")):
        assert code in usage_lines(manifest, None)[-1]


def test_a_card_names_vllm_only_if_vllm_is_given_the_model(world: World) -> None:
    """`meteora export --for vllm` refuses the other two."""
    head = {"lm_head": next(iter(world.manifest.modules.values()))}
    whole = RouterOptions("gate", top_k=1, temperature=1.0, opening="prompt")
    for manifest, said in (
        (replace(world.manifest, router=POINT_GATES), "vLLM serves what `meteora export"),
        (replace(world.manifest, router=whole), "cannot load it: its router needs whole prompts"),
        (
            replace(world.manifest, router=POINT_GATES, modules=head),
            "cannot load it: experts change its head `lm_head`",
        ),
    ):
        assert said in write_card(manifest, None, "a model")


def test_answers_are_counted_once_for_all_metrics_of_a_task_and_a_turn_is_one() -> None:
    turns = tuple(ScoreTurn(n, 0.5, 9.0, 9.0, 2.0, 0.1) for n in (1, 2, 3))
    spec = BenchmarkSpec(
        ArtifactId("router:1"), "t", "f" * 64, "rouge1", 0, 8, 0, ArtifactId("base:1")
    )
    score = Score(
        spec, 0.5, 0.1, 0.4, 0.6, 30, "e" * 64, "lm-eval", 1.0, num_truncated=7,
        mean_prompt_tokens=9.0,
    )  # fmt: skip
    scores = {
        "t": score,
        "t: rouge2": replace(score, spec=replace(spec, metric="rouge2")),
        "t: acc": replace(score, spec=replace(spec, metric="acc"), num_truncated=0),
        "c": replace(score, spec=replace(spec, task="c"), turns=turns, num_truncated=1),
        "lm": replace(score, spec=replace(spec, task="lm"), mean_prompt_tokens=None),
    }
    summary = Summary({name: {"fused": one} for name, one in scores.items()}, Mock(), None, {})
    said = "Of 120 answers 8 were cut at the greatest length and 0 were empty"
    assert said in method_lines(summary)[0]
    one = Summary({"t": {"fused": replace(score, num_truncated=1)}}, Mock(), None, {})
    assert "Of 30 answers 1 was cut at the greatest length" in method_lines(one)[0]


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k", "a/b/c/d", "a/b/c d"])
def test_a_leaderboard_is_a_dataset_and_a_task(recipe_folder: Path, name: str) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    body["benchmark"]["tasks"] = [TASK | {"leaderboard": name}]
    path = recipe_folder / "board.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(RecipeError, match="leaderboard"):
        Recipe.load(path)
