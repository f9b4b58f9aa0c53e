"""Experts without examples get theirs from a pool: from the recipe to the ledger."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from meteora.artifacts import NULL
from meteora.checkpoint.manifest import CARD, read_manifest
from meteora.model.generate import answer_all
from pipelines.data.claims import Claim
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.flows.up_to_date import look
from pipelines.planning import examples as planned_examples
from pipelines.planning.plan import Plan, make_plan
from pipelines.planning.resolve import complete
from pipelines.planning.row_faults import faults_of_rows
from pipelines.recipe.recipe import Recipe, RecipeError
from pipelines.stages import build
from pipelines.stages.pool import divide_pool
from pipelines.workspace.context import RunContext, new_run_id
from store.ledger import Ledger
from tests.pipelines.conftest import (
    ALPHABETS,
    Knowing,
    finished,
    plan_of,
    print_steps,
    prompts_in,
    result_of,
    run,
)


@pytest.fixture
def open_recipe(knowing: Knowing, tmp_path: Path) -> Callable[..., RunContext]:
    """A function that opens a recipe over the two experts, without examples, and a pool."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "base").symlink_to(knowing.base)
    (folder / "adapters").symlink_to(knowing.checkpoint.parent)
    pool = [text for letters in ALPHABETS.values() for text in prompts_in(letters, 0, 24)]
    random.Random(0).shuffle(pool)
    experts = []
    for name, letters in ALPHABETS.items():
        tests = [{"prompt": text, "response": text[-1] * 3} for text in prompts_in(letters, 9, 4)]
        write(folder / f"{name}.jsonl", tests)
        experts.append(
            {"name": name, "adapter": f"path:adapters/{name}", "test": f"jsonl:{name}.jsonl"}
        )
    write(folder / "pool.jsonl", [{"prompt": text} for text in pool])
    body = {
        "base": "path:base",
        "experts": experts,
        "gates": {"pool": "jsonl:pool.jsonl", "examples_per_expert": 12},
        "benchmark": {"limit": 4, "compare": ["oracle"], "max_new_tokens": 6},
    }

    def open_it(**changed: Any) -> RunContext:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(body | changed, sort_keys=False))
        return RunContext(Ledger(tmp_path / "home"), Recipe.load(path), path, new_run_id())

    return open_it


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("prefect_server")
def test_a_run_deals_the_pool_once_and_fits_gates_to_it(
    open_recipe: Callable[..., RunContext], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = [one.model_dump(exclude_none=True) for one in open_recipe().recipe.experts]
    work = open_recipe(experts=[first, {**second, "examples": "auto"}])
    print_steps(work)
    assert "12 examples an expert at most, of jsonl:pool.jsonl" in capfd.readouterr().out
    run(work)
    said = capfd.readouterr().err
    why = f"{second['name']} has no examples of its own: its card names no data set of the Hub"
    assert said.count("no examples of its own") == said.count(why) == 1
    assert "of 48 prompts of the pool: " in said
    assert f" to {second['name']}; 0 to no expert" in said
    plan, _ = result_of(work)
    assert plan.pool is not None
    for name, rows in plan.examples.items():
        assert 2 <= len(rows) <= 12
        assert {letter for row in rows for letter in row.prompt} <= {*ALPHABETS[name]}
    ask = work.ledger.query
    assert ask("SELECT sum(num_prompts), count(*) FROM pool_shares").rows == [(48, 3)]
    made_from = "SELECT kind FROM lineage WHERE artifact_id = ? AND relation = 'made from'"
    assert ("pool",) in ask(made_from.replace("?", f"'{plan.router.id}'")).rows
    folder = work.checkpoint_folder(plan.router.id)
    assert "have prompts without labels" in (folder / CARD).read_text()
    assert read_manifest(folder).gates["pool_id"] == plan.pool.id
    ((fused, oracle),) = ask("SELECT avg(value), avg(oracle_value) FROM leaderboard").rows
    assert fused >= oracle - 0.25 > 0  # of eight rows two are another expert's at most

    other = open_recipe(router={"top_k": 2})  # the same pool and stack: the prompts are dealt
    capfd.readouterr()
    run(other)
    assert "asking every expert" not in capfd.readouterr().err
    assert finished(other)


def test_an_expert_that_no_prompt_belongs_to_is_named(
    open_recipe: Callable[..., RunContext],
) -> None:
    def claims(expert: str, count: int) -> list[Claim]:
        texts = prompts_in(ALPHABETS[expert], 0, count)
        return [Claim(text, expert, 0, 1.0, 1.0, "x") for text in texts]

    work = open_recipe()
    planned = plan_of(work)

    def made(recipe: Recipe, *claims: Claim) -> Plan:
        with patch("pipelines.planning.plan.recorded_claims", return_value=claims):
            return make_plan(replace(work, recipe=recipe), planned.base, planned.experts)

    lows = claims("low", 5)
    with pytest.raises(ExamplesError, match=r"expert high: of the 6 prompts of gates.pool 1 are"):
        made(work.recipe, *lows, *claims("high", 1))
    assert not made(work.recipe, *lows, *claims("high", 2)).router.stand_ins
    lenient = open_recipe(router={"without_examples": "arrow"})
    whole = made(lenient.recipe, *lows)
    assert whole.router.stand_ins == ("high",)
    assert not whole.pool_prompts
    with pytest.raises(ExamplesError, match="expert low: of the 0 prompts"):
        made(lenient.recipe)  # nothing to fit any gate to
    with_base = open_recipe(router={"without_examples": "arrow", "null": True})
    nobodys = [Claim(f"0 1 {number}", "", 1, 0.0, 0.0) for number in range(20)]
    whole = made(with_base.recipe, *lows, *nobodys)
    assert Row("0 1 2", "") in whole.examples[NULL]
    assert sum(row.prompt.startswith("0 1 ") for row in whole.examples[NULL]) == 12


def test_a_plan_waits_for_its_pool(open_recipe: Callable[..., RunContext]) -> None:
    """Though a row of several experts names one that has no examples yet."""
    work = open_recipe()
    part = {"prompt": [{"text": "a b"}], "response": [{"text": "a", "expert": "high"}]}
    (work.folder / "spans.jsonl").write_text(json.dumps(part))
    spans = {"spans": "jsonl:spans.jsonl", **work.recipe.gates.model_dump(exclude_unset=True)}
    work = open_recipe(gates=spans)
    planned = plan_of(work)
    assert len(planned.pool_prompts) == 48
    assert not planned.examples
    mixed = open_recipe(gates={**spans, "composites": [2]}, router={"null": True})
    assert plan_of(mixed).pool_prompts == planned.pool_prompts
    (work.folder / "three.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a{p}", "response": p * 3}) + "\n" for p in "abc")
    )
    low, high = (one.model_dump(exclude_unset=True) for one in work.recipe.experts)
    experts = [low | {"examples": "jsonl:three.jsonl"}, high]
    shown = open_recipe(
        experts=experts, gates={**spans, "composites": [{"n": 2, "num_fewshot": 1}]}
    )
    assert plan_of(shown).pool_prompts  # with the examples that `high` gets, three are enough
    assert not faults_of_rows(shown, planned.base, read_rows)
    work = open_recipe(gates=spans)
    found = look(work)
    assert found.summary is None
    assert found.plan is not None
    assert found.plan.pool_prompts == planned.pool_prompts
    build.stack(work, planned)
    divide_pool(work, planned)
    divide_pool(work, planned)  # it was done
    whole = complete(work, planned)
    assert not whole.pool_prompts
    assert whole.router.pool_id == planned.pool.id if planned.pool else False
    assert whole.router.examples_sha256


@pytest.mark.parametrize("changed", [[], ["one more"]], ids=["none left", "one more"])
def test_a_pool_that_changes_while_it_is_dealt_ends_the_run(
    open_recipe: Callable[..., RunContext], changed: list[str]
) -> None:
    work = open_recipe()
    planned = plan_of(work)
    build.stack(work, planned)
    divide_pool(work, planned)
    write(
        work.folder / "pool.jsonl", [{"prompt": t} for t in (*planned.pool_prompts[5:], *changed)]
    )
    with pytest.raises(ExamplesError, match=r"jsonl:pool.jsonl: it was changed while"):
        complete(work, planned)


def test_a_dealing_that_is_killed_leaves_no_record_and_keeps_the_answers_it_has(
    open_recipe: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = open_recipe()
    planned = plan_of(work)
    build.stack(work, planned)
    assert planned.pool is not None
    asked: list[int] = []

    def answer(*arguments: Any) -> list[list[int]]:
        asked.append(len(arguments[2]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer_all(*arguments)

    monkeypatch.setattr("pipelines.data.pool.answer_all", answer)
    with pytest.raises(KeyboardInterrupt):
        divide_pool(work, planned)
    assert not work.holds(planned.pool.id)
    (log,) = (work.home / "answers").iterdir()
    key, answers, _seconds = json.loads(log.read_text())
    log.write_text(json.dumps([key, answers, 1000.0]) + "\n")
    divide_pool(work, planned)
    assert asked == [12] * 3  # of two experts, the first is not asked again
    ((seconds,),) = work.ledger.query("SELECT wall_seconds FROM pools").rows
    assert seconds > 1000.0  # with the time of the process before
    assert not [*(work.home / "answers").iterdir()]
    whole = complete(work, planned)
    assert not whole.pool_prompts
    assert not work.ledger.verify().findings

    monkeypatch.undo()
    at_once = replace(work, ledger=Ledger(tmp_path / "other"))
    planned = plan_of(at_once)
    build.stack(at_once, planned)
    divide_pool(at_once, planned)
    assert complete(at_once, planned).examples == whole.examples


@pytest.mark.parametrize("count", [2, 3])
def test_an_expert_with_examples_keeps_them(
    open_recipe: Callable[..., RunContext], count: int
) -> None:
    work = open_recipe()
    own = prompts_in(ALPHABETS["low"], 0, 24)[:count]
    write(work.folder / "own.jsonl", [{"prompt": p, "response": "x"} for p in own])
    experts = [section.model_dump(exclude_none=True) for section in work.recipe.experts]
    experts[0]["examples"] = "jsonl:own.jsonl"
    work = open_recipe(experts=experts)
    planned = plan_of(work)
    assert len(planned.pool_prompts) == 48 - count
    for most in (4, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planned_examples, "MAX_PROMPTS", most)
            fewer = plan_of(work)
        known = len(fewer.known_prompts["low"])
        assert (known, known + len(fewer.pool_prompts)) == (min(most // 2, count), most)
    build.stack(work, planned)
    divide_pool(work, planned)
    whole = complete(work, planned)
    assert [row.prompt for row in whole.examples["low"]] == own
    assert len(whole.examples["high"]) == 12


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"pool": "jsonl:none.jsonl"}, "there is no such file", id="no file"),
        pytest.param({"pool": "jsonl:low.jsonl"}, "task low: .* is also a prompt of", id="tests"),
        pytest.param(
            {"pool": "jsonl:one.jsonl"}, "beside the examples it has 1 prompt;", id="too few"
        ),
        pytest.param({"pool": "jsonl:bad.jsonl"}, r'{"prompt": "…"} is needed', id="no prompt"),
    ],
)
def test_a_pool_that_cannot_be_used_is_refused_before_any_work(
    open_recipe: Callable[..., RunContext], changed: dict[str, str], said: str
) -> None:
    work = open_recipe(gates=changed)
    write(work.folder / "one.jsonl", [{"prompt": "a b"}, {"prompt": "a  b"}])
    write(work.folder / "bad.jsonl", [{"question": "a"}])
    with pytest.raises(ExamplesError, match=said) as refused:
        plan_of(work)
    assert faults_of_rows(work, None, read_rows) == [str(refused.value)]


def test_a_pool_is_for_those_whose_cards_may_name_nothing(
    open_recipe: Callable[..., RunContext],
) -> None:
    sections = [s.model_dump(exclude_none=True) for s in open_recipe().recipe.experts]
    work = open_recipe(experts=[{**section, "examples": "auto"} for section in sections])
    assert len(plan_of(work).pool_prompts) == 48


def test_a_dry_run_names_a_pool_that_is_not_there_where_a_run_would_read_it(
    open_recipe: Callable[..., RunContext], capfd: pytest.CaptureFixture[str]
) -> None:
    pool = {"pool": "jsonl:none.jsonl"}
    print_steps(open_recipe(gates=pool))
    said = capfd.readouterr().out
    assert said.count("the run would stop: ") == 1
    assert "none.jsonl: there is no such file" in said
    print_steps(open_recipe(gates=pool, router={"kind": "arrow"}))
    assert "the run would stop" not in capfd.readouterr().out


def test_a_pool_that_nobody_needs_is_refused(open_recipe: Callable[..., RunContext]) -> None:
    sections = [s.model_dump(exclude_none=True) for s in open_recipe().recipe.experts]
    for section in sections:
        section["examples"] = "jsonl:low.jsonl"
    with pytest.raises(RecipeError, match="every expert has some; take it out"):
        open_recipe(experts=sections)
