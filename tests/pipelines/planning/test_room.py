"""A prompt that is too long for the base is refused before any work."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers.processors import TemplateProcessing

from meteora.base.loading import load_config, load_tokenizer
from meteora.fitting.sequences import LabelledSequence
from pipelines.data.composites import compose
from pipelines.data.dialogues import draw_dialogues
from pipelines.data.rows import ExamplesError, Row
from pipelines.evaluation.harness import BenchmarkError, Harness, room_of
from pipelines.evaluation.tasks import Task
from pipelines.planning.plan import Plan
from pipelines.planning.room import (
    _lengths,
    check_names,
    check_opening,
    check_room,
    longest,
    with_room,
)
from pipelines.recipe.recipe import RouterSection
from pipelines.stages import build, measure
from pipelines.stages.open_model import opened
from pipelines.workspace.context import RunContext
from tests.conftest import World
from tests.pipelines.cli.command_line import ask
from tests.pipelines.conftest import plan_of, run
from tests.pipelines.stages.test_measure import go

ROWS = {name: [Row(f"{name} {i}?", name) for i in range(3)] for name in ("red", "blue")}
LONG = {"limit": 2, "compare": ["base"], "max_new_tokens": 4, "composite": [{"n": 30, "count": 2}]}
SENTENCE = r"task composite-30: 2 of 2 prompts are too long: the longest has \d+ tokens, but with"


def task(**given: Any) -> Task:
    return Task("any", ("exact_match",), "auto", 8, **given)


@pytest.mark.usefixtures("prefect_server")
def test_an_over_long_composite_ends_a_run_before_its_first_work(
    workplace: Callable[..., RunContext], tmp_path: Path
) -> None:
    work = workplace(benchmark=LONG)
    said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
    assert said.returncode == 1
    assert "the run would stop: task composite-30: 2 of 2 prompts are too long" in said.stdout
    with pytest.raises(BenchmarkError, match=SENTENCE):
        run(work)
    work.ledger.ingest()
    assert work.ledger.query("FROM experts").rows == []


def test_an_over_long_example_is_named_with_its_line_before_gates_are_fitted(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    rows = [{"prompt": "a" * n, "response": "b"} for n in (5, 600, 700)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = body["experts"][0] | {"examples": f"jsonl:{tmp_path / 'long.jsonl'}"}
    work = workplace(experts=[long, body["experts"][1]])
    sentence = (
        r"q_and_v: 2 of 3 examples are too long: the first, .*long.jsonl, line 2, has 60\d tokens"
    )
    said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
    assert said.returncode == 1
    assert re.search(f"the run would stop: expert {sentence}", said.stdout)
    planned = plan_of(work)
    with pytest.raises(ExamplesError, match=sentence):
        measure.check_prompts(work, planned)


def test_what_is_too_long_in_a_cards_data_set_is_left_out(
    workplace: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its owner alone could shorten it."""
    work = workplace()
    planned = plan_of(work)
    planned = replace(planned, card_examples={"q_and_v": "hf:org/rows"})
    short, long = planned.examples["q_and_v"], [Row("a", "b" * 600)] * 3
    planned = replace(planned, examples={**planned.examples, "q_and_v": [*short, *long]})
    measure.check_prompts(work, planned)
    build.stack(work, planned)
    with opened(work, planned) as (model, tokenizer):
        sequences, _ = build._labelled(work, planned, model, tokenizer)
    assert max(len(one.input_ids) for one in sequences) < 600
    said = (
        f"q_and_v: {len(short)} examples of the data set that its card names, hf:org/rows; 3 more"
    )
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "in common" not in told
    planned = replace(planned, examples={**planned.examples, "q_and_v": [short[0], *long]})
    with pytest.raises(ExamplesError, match="q_and_v: 1 of 4 examples of the data set that its"):
        measure.check_prompts(work, planned)


def test_a_card_that_names_rows_which_its_adapter_does_not_know_is_told(
    workplace: Callable[..., RunContext],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the examples that a recipe names: these are the user's own choice."""
    work = workplace()
    planned = plan_of(work)
    two = replace(planned, card_examples={"q_and_v": "hf:org/rows"})
    three = replace(two, fused=replace(two.fused, names=(*two.fused.names, "other")))
    build.stack(work, planned)
    said = "note: q_and_v: by its weights it knows 25% of the first prompts of the data set"

    with opened(work, planned) as (model, tokenizer):

        def told_of(plan: Plan, q_and_v: float, attention: float) -> str:
            found = {"q_and_v": q_and_v, "attention": attention, "other": 1.0}
            monkeypatch.setattr(build, "known_shares", lambda *_: found)
            build._say_unknown(plan, plan.examples, model, tokenizer)
            return " ".join(capsys.readouterr().err.split())

        assert said in told_of(three, 0.25, 1.0)
        assert told_of(three, 0.75, 1.0) == ""
        assert told_of(three, 1.0, 0.25) == ""  # the recipe names its examples
        assert told_of(three, 0.25, 0.25) == ""  # both may have learnt one task
        assert told_of(two, 0.25, 1.0) == ""
        asked: list[object] = []
        monkeypatch.setattr(build, "_say_unknown", lambda plan, *_: asked.append(plan))
        for plan in (planned, two):
            build._labelled(work, plan, model, tokenizer)
        assert asked == [two]


def test_examples_that_several_experts_have_in_common_are_told(
    workplace: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    work = workplace()
    planned = plan_of(work)
    mine, others = (planned.examples[name] for name in ("q_and_v", "attention"))
    spaced = replace(mine[0], prompt=f" {mine[0].prompt}\n")
    examples = {"q_and_v": [*mine, *mine], "attention": [*others, spaced, mine[1]]}
    build.stack(work, planned)
    with opened(work, planned) as (model, tokenizer):
        build._labelled(work, replace(planned, examples=examples), model, tokenizer)
    assert (
        "note: q_and_v, attention have 2 examples in common, by which gates cannot tell them apart"
    ) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"template": "chat"}, "the base's tokenizer has none; choose `template: plain`"),
        (
            {"system_prompt": "Be brief."},
            "asks under a system prompt, but the base's chat template",
        ),
        ({"conversation": [2]}, "task conversation-2: conversations need the roles of a chat"),
    ],
)
def test_what_needs_a_chat_template_is_refused_before_gates_are_fitted(
    workplace: Callable[..., RunContext], tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    work = workplace(benchmark={"limit": 1, "compare": [], **asked})
    dry = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
    assert dry.returncode == 1
    assert said in dry.stdout
    planned = plan_of(work)
    with pytest.raises(BenchmarkError, match=said):
        measure.check_prompts(work, planned)


def test_conversations_that_a_template_does_not_take_are_refused_before_any_work(
    chat_base: Path,
) -> None:
    config, tokenizer = load_config(chat_base), load_tokenizer(chat_base)
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    talks = task(dialogues=draw_dialogues(ROWS, 2, 1, seed=0))
    with pytest.raises(
        BenchmarkError, match=r"its conversations are not possible with this base: .*one turn"
    ):
        check_room([talks], config, tokenizer)


def test_composites_that_the_oracle_cannot_route_are_refused_before_gates_are_fitted(
    workplace: Callable[..., RunContext], chat_base: Path, tmp_path: Path
) -> None:
    shouting = "{{ messages[0].content | upper }}"
    (chat_base / "chat_template.jinja").write_text(shouting)
    settings = {"limit": 2, "max_new_tokens": 4, "composite": [{"n": 2}]}
    said = "template changes what a prompt says"
    for compare, refused in (["base"], False), (["oracle"], True):
        work = workplace(base=f"path:{chat_base}", benchmark={**settings, "compare": compare})
        dry = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
        assert (said in dry.stdout) == refused, dry.stderr
        with pytest.raises(ExamplesError, match=said) if refused else nullcontext():
            measure.check_prompts(work, plan_of(work))


def test_turns_without_a_chat_template_are_refused_before_gates_are_fitted(
    workplace: Callable[..., RunContext], tmp_path: Path
) -> None:
    turn = {"expert": "q_and_v", "prompt": "abba", "response": "a"}
    (tmp_path / "turns.jsonl").write_text(json.dumps({"turns": [turn]}) + "\n")
    work = workplace(gates={"spans": f"jsonl:{tmp_path / 'turns.jsonl'}"})
    said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
    assert said.returncode == 1
    assert re.search("the run would stop: .*line 1: turns need a chat template", said.stdout)
    planned = plan_of(work)
    with pytest.raises(ExamplesError, match="line 1: turns need a chat template"):
        measure.check_prompts(work, planned)


def test_a_benchmark_asks_nothing_where_one_task_is_too_long(
    workplace: Callable[..., RunContext],
) -> None:
    work = workplace(benchmark=LONG)
    planned, gates = go(work)
    for refuse in (
        lambda: measure.check_prompts(work, planned),
        lambda: measure.measure(work, planned, gates),
    ):
        with pytest.raises(BenchmarkError, match=SENTENCE):
            refuse()
    assert not work.ledger.scores_of(one.spec.id for one in planned.measurements)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_prompts_are_as_long_as_the_harness_finds_them(
    world: World, chat_base: Path, system: str | None
) -> None:
    model = world.load_base()
    for folder, template in ((chat_base, "auto"), (chat_base, "plain"), (world.base, "auto")):
        if system and (folder != chat_base or template == "plain"):
            continue
        tokenizer = load_tokenizer(folder)
        composites = compose(ROWS, 3, 2, seed=0)
        asked = Task("any", ("rouge1",), template, 8, composites=composites, system_prompt=system)
        harness = Harness(model, tokenizer, batch_size=1, template=template, system_prompt=system)
        assert _lengths(asked, tokenizer) == harness.prompt_tokens([c.prompt for c in composites])


def test_a_begin_token_counts_only_where_the_harness_adds_one(
    world: World, chat_base: Path
) -> None:
    tokenizer = load_tokenizer(chat_base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for template in ("auto", "plain"):
        asked = Task("any", ("rouge1",), template, 8, rows=ROWS["red"])
        harness = Harness(world.load(), tokenizer, batch_size=1, template=template)
        assert _lengths(asked, tokenizer) == harness.prompt_tokens([r.prompt for r in ROWS["red"]])


@pytest.mark.usefixtures("prefect_server")
def test_a_finished_model_is_not_timed_beyond_the_context_of_its_base(
    workplace: Callable[..., RunContext],
) -> None:
    asked = {"limit": 1, "compare": [], "max_new_tokens": 1}
    run(workplace(benchmark=asked))
    speed = {"prompt_tokens": 510, "new_tokens": 3}
    with pytest.raises(BenchmarkError, match="prompts of 510 tokens and answers of 3 are too long"):
        run(workplace(benchmark=asked | {"speed": speed}))


def test_conversations_are_refused_where_their_questions_alone_are_too_long(
    chat_base: Path,
) -> None:
    config, tokenizer = load_config(chat_base), load_tokenizer(chat_base)
    short, long = (task(dialogues=draw_dialogues(ROWS, turns, 2, seed=0)) for turns in (3, 40))
    check_room([short], config, tokenizer)
    with pytest.raises(BenchmarkError, match=r"task any: 2 of 2 prompts are too long"):
        check_room([short, long], config, tokenizer)


def test_the_longest_prompt_counts_with_its_answers(world: World, chat_base: Path) -> None:
    config, tokenizer = load_config(world.base), load_tokenizer(world.base)
    rows = [Row("a" * n, "x") for n in (5, 30, 7)]
    assert longest(task(rows=rows), config, tokenizer) == 30 + 8
    asked = Task("any", ("acc",), "auto", 8, lm_eval="any", limit=3)
    assert longest(asked, config, tokenizer) == config.max_position_embeddings
    chat = load_tokenizer(chat_base)
    talks = task(dialogues=draw_dialogues(ROWS, 3, 2, seed=0))
    assert longest(talks, config, chat) == max(_lengths(talks, chat)) + 3 * 8


def test_mixed_prompts_without_room_are_left_out_and_counted(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    room = room_of(load_config(world.base))
    fits, long = (LabelledSequence((5,) * n, (0,) * n) for n in (room, room + 1))
    assert with_room(room, [fits]) == [fits]
    assert not capfd.readouterr().err
    assert with_room(room, [fits, long]) == [fits]
    assert f"1 of 2 mixed prompts have more than the {room} tokens" in capfd.readouterr().err


def test_a_name_that_lm_eval_does_not_know_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    mine = Task("mine", ("acc",), "auto", 8, lm_eval="mine", folder=tmp_path)
    check_names([task(rows=ROWS["red"]), mine])
    said = r"no task 'mime' in .* \(did you mean 'mine'\?\); it has mine$"
    with pytest.raises(BenchmarkError, match=said):
        check_names([mine, replace(mine, lm_eval="mime")])
    with pytest.raises(BenchmarkError, match=r"no folder .*/none, where the task 'mine'"):
        check_names([replace(mine, folder=tmp_path / "none")])


def test_a_metric_that_a_task_of_lm_eval_lacks_is_refused_before_any_work(tmp_path: Path) -> None:
    """By the YAML alone: the function is in no file, and the rows are nowhere."""
    metrics = """[{metric: exact_match}, {metric: f1, aggregation: !function mine.f1}]"""
    texts = {
        "sums": f"output_type: generate_until\nmetric_list: {metrics}\n",
        "choices": "output_type: multiple_choice\n",
        "own": "metric_list: [{metric: !function mine.acc}]\n",
        "malformed": "metric_list: acc\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    sums, choices, *others = (
        Task(name, ("acc",), "auto", 8, lm_eval=name, folder=tmp_path) for name in texts
    )
    check_names([replace(sums, metrics=("exact_match",)), choices, *others])
    with pytest.raises(BenchmarkError, match=r"acc is none of its metrics .*: exact_match$"):
        check_names([sums])
    with pytest.raises(BenchmarkError, match=r"f1 is no mean over rows .*: exact_match$"):
        check_names([replace(sums, metrics=("exact_match", "f1"))])
    with pytest.raises(BenchmarkError, match=r"bleu is none of its metrics .*: acc, acc_norm$"):
        check_names([replace(choices, metrics=("bleu",))])


def test_a_template_with_the_date_has_no_opening_that_gates_can_know(
    workplace: Callable[..., RunContext], chat_base: Path, recipe_folder: Path
) -> None:
    template = chat_base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    work = workplace(base=f"path:{chat_base}", router={"opening": "prompt"}, benchmark={"limit": 2})
    said = ask("run", work.path, "--dry-run", "--home", recipe_folder / "home")
    assert "the run would stop: the base's chat template has today's date in every" in said.stdout
    with pytest.raises(ExamplesError, match="would not know the prompts of tomorrow"):
        measure.check_prompts(work, plan_of(work))
    tokenizer = load_tokenizer(chat_base)
    for section in (RouterSection(share="turn"), RouterSection(opening="shared")):
        check_opening(section.options((), fitted=True), tokenizer)


def test_choices_are_counted_as_answers_are(world: World) -> None:
    config, tokenizer = load_config(world.base), load_tokenizer(world.base)
    rows = [Row("a" * 510, "x", ("x", "yy"))]
    chosen = Task("any", ("acc",), "auto", 8, rows=rows)
    check_room([chosen], config, tokenizer)
    with pytest.raises(BenchmarkError, match=r"1 of 1 prompts .* has 510 tokens"):
        check_room([task(rows=rows)], config, tokenizer)
    longer = [Row("a" * 511, "x", ("x", "yy"))]
    with pytest.raises(BenchmarkError, match=r"has 511 tokens, but with an answer of 2"):
        check_room([replace(chosen, rows=longer)], config, tokenizer)
