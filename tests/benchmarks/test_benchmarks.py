"""The benchmarks run: every variant, at sizes where the figures mean nothing."""

import importlib
import json
import shutil
from argparse import Namespace

import pytest
import torch

import meteora
from meteora.base.chat_template import Template
from pipelines.hub.card import datasets_of
from pipelines.recipe.recipe import Recipe
from store.ledger import Ledger
from tests.benchmarks import cards, fuse, many_rows, parts
from tests.benchmarks.bigbench import SHIPPED, read
from tests.benchmarks.store_home import Size, make_home
from tests.meteora.serving.served_world import gated
from tests.pipelines.conftest import CHAT_TEMPLATE
from tests.quickstart.make import NUM_TEST, TRAININGS, seen_in_training

TINY = {
    "layer": "--hidden 64 --intermediate 96 --layers 1 --experts 3 --tokens 5 --rounds 1",
    "model": "--hidden 64 --intermediate 96 --layers 1 --experts 3 --tokens 5 --rounds 1 --new 2",
    "fuse": "--adapters 2 --layers 1 --rank 1 --rounds 1",
    "twins": "--hidden 32 --experts 3 --ranks 2 mixed --tokens 1 5 --rounds 1",
}


@pytest.mark.parametrize("name", ["layer", "model", "twins"])
@pytest.mark.parametrize(
    "device",
    [
        "nonsense",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name, device, monkeypatch, capsys):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, *TINY[name].split(), "--device", device])
    with pytest.raises(SystemExit) as refused:
        module.main()
    assert refused.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --device: '{device}' is not there, or torch {torch.__version__}" in said
    assert "name one of cpu" in said


@pytest.mark.parametrize(
    "name", ["layer", "model", "twins", pytest.param("fuse", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_benchmark_prints_a_table_or_json(name, as_json, monkeypatch, capsys):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    asked = ["--json"] * as_json
    monkeypatch.setattr("sys.argv", [name, *TINY[name].split(), *asked])
    module.main()
    out = capsys.readouterr().out
    if not as_json:
        assert "| --- |" in out
        assert "- torch: " in out
    elif name == "twins":
        rows = [json.loads(line) for line in out.splitlines()]
        assert len(rows) == 2 * 2 * 2
        assert all(row["floor"] > 1 for row in rows)
    elif name == "fuse":
        assert json.loads(out)["stack_cpu_speed_of_a_copy"] > 0
    else:
        rows = {row["variant"]: row for row in json.loads(out)["rows"]}
        assert rows["bare base"]["prefill"] == 1
        assert {"meteora", "Arrow (PEFT)", "X-LoRA (PEFT)", "loop over experts"} <= rows.keys()
        assert all(row["floor"] >= 1 for row in rows.values())


@pytest.mark.parametrize("turns", [1, 2])
def test_the_right_expert_is_forced_where_a_part_of_the_prompt_says_so(
    turns, world, tmp_path, monkeypatch, capsys
):
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _, tokenizer = meteora.load(world.checkpoint, base_folder=base)
    model = gated(world, "point", Template.of(tokenizer))
    monkeypatch.setattr(meteora, "load", lambda _: (model, tokenizer))
    found, decide = [], parts.Parts.decide

    def recorded(self, logits_of, tokens):
        logits = decide(self, logits_of, tokens)
        is_forced = torch.isin(self.part, torch.tensor(self.forced))
        found.append((is_forced, logits.argmax(-1).view_as(self.part) == self.experts[:, None]))
        return logits

    monkeypatch.setattr(parts.Parts, "decide", recorded)
    task = tmp_path / "tasks" / "q_and_v"
    task.mkdir(parents=True)
    (task / "test.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    asked = ["parts", str(world.checkpoint), str(task.parent), "--rows", "1", "--only", "answer"]
    asked += ["--turns", str(turns), "--conversations", "2"]
    monkeypatch.setattr("sys.argv", asked)
    parts.main()
    rows = capsys.readouterr().out
    assert f"| {parts.ORACLE} |" in rows
    assert "| answer |" in rows
    assert all(right[forced].all() for forced, right in found)
    assert {bool(one) for forced, _ in found for one in forced.flatten()} == {True, False}


def test_more_rows_than_ship_begin_with_those_that_ship(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["many_rows", str(tmp_path), "--rows", str(NUM_TEST + 1)])
    many_rows.main()
    for task in TRAININGS:
        train, test = (f"tasks/{task}/{split}.jsonl" for split in ("train", "test"))
        assert (tmp_path / train).read_text() == (SHIPPED / train).read_text()
        *first, last = (tmp_path / test).read_text().splitlines()
        assert first == (SHIPPED / test).read_text().splitlines()
        assert last not in [*first, *(SHIPPED / train).read_text().splitlines()]
    asked = {file.stem: Recipe.load(file).benchmark for file in tmp_path.glob("*.yaml")}
    assert [asked[name].system_prompt for name in ("default", "none")] == [None, ""]
    assert len(asked) == len(many_rows.ASKED_UNDER) + 1


def test_data_sets_that_cards_name_have_new_rows_of_their_tasks(tmp_path):
    sets = cards.rows_by_name()
    for task, name in cards.OWN.items():
        rows = sets[name]
        prompts = {row["prompt"] for row in rows}
        assert len(prompts) == len(rows) == cards.NUM_ROWS
        assert not prompts & seen_in_training(task)
        for split in ("train", "test"):
            assert not prompts & {
                row["prompt"] for row in read(SHIPPED / f"tasks/{task}/{split}.jsonl")
            }
        assert {row["prompt"] for row in sets[cards.MIXED]} >= prompts
    recipe = Recipe.load(cards.write_case(tmp_path, "one mixed"))
    assert {expert.examples for expert in recipe.experts} == {"auto"}
    named = {task: datasets_of(tmp_path / "one_mixed" / task) for task in cards.OWN}
    assert named == {task: (name,) for task, name in cards.OWN.items()} | {
        cards.HURT: (cards.MIXED,)
    }


def test_the_smallest_home_has_one_of_each_kind(tmp_path):
    assert not any(Size(*few).is_enough for few in [(24, 166), (25, 165), (1, 1000)])
    smallest = Size(num_artifacts=25, num_scores=166)
    assert smallest.is_enough
    num_records = make_home(tmp_path, smallest)
    assert Ledger(tmp_path).ingest().num_records == num_records


@pytest.mark.slow
def test_stacking_holds_less_than_two_of_the_largest_module():
    """Fourteen modules of a 7B model, 160 MB, which a process has to itself."""
    asked = Namespace(adapters=64, layers=2, rank=8, dtype="bfloat16", rounds=1)
    assert fuse.measure(asked)["stack_peak_over_largest_module"] < 2
