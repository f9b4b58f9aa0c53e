"""The measuring stage, called as a function: all kinds of tasks and controls, and what is told."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock

import pytest
from rich.console import Console

from pipelines.admission import silent_experts
from pipelines.cli import score_table
from pipelines.evaluation.harness import BenchmarkError, Harness
from pipelines.planning.plan import Plan
from pipelines.reports import card
from pipelines.reports.examples import find_examples, trace_examples
from pipelines.reports.queries import run_queries
from pipelines.reports.summary import Summary, summarise
from pipelines.scoring.judges import JudgedError
from pipelines.scoring.outputs import read_outputs
from pipelines.scoring.recompute import recompute_scores
from pipelines.stages import build, measure
from pipelines.stages.open_model import opened
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import plan_of

COMPARE = ["base", "oracle", "one_expert", "random", "linear", "ties", "dare_ties", "experts"]
CONTROLS = ["random", "linear", "ties", "dare_ties"]
TASKS = {"q_and_v", "attention"}


def go(work: RunContext) -> tuple[Plan, Any]:
    """Every stage up to measuring, without a scheduler."""
    planned = plan_of(work)
    build.stack(work, planned)
    return planned, build.fit_gates(work, planned)


def told(work: RunContext, planned: Plan) -> Summary:
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    assert summary is not None
    return summary


def test_every_kind_of_task_and_control_is_measured_compared_and_timed(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {
        "limit": 3,
        "compare": COMPARE,
        "max_new_tokens": 4,
        "composite": [{"n": 2, "count": 2}],
        "speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 6},
    }
    work = workplace(benchmark=body)
    probe = Mock(wraps=silent_experts.probe)
    monkeypatch.setattr(silent_experts, "probe", probe)
    planned, gates = go(work)
    assert summarise(work.ledger, planned, work.base_folder(planned.base)) is None
    measure.measure(work, planned, gates)
    assert probe.call_count == 1  # when the gates were fitted
    assert not measure._is_probed(replace(work, run_id="another"), planned)

    summary = told(work, planned)
    assert summary.systems == ["base", "oracle", "fused", *CONTROLS, "one_expert"]
    composite = summary.scores["composite-2"]
    assert composite.keys() == set(summary.systems)
    assert [part.num_samples for part in composite["fused"].parts] == [2, 2]
    assert composite.keys() == summary.scores["composite-2: composite_attempted"].keys()
    assert {task: set(row) for task, row in summary.matrix.items()} == dict.fromkeys(TASKS, TASKS)
    for task in TASKS:  # each alone on its own task is the oracle
        assert summary.matrix[task][task] == summary.scores[task]["oracle"]
    assert summary.comparisons.keys() == {"base", "oracle", "one_expert", *CONTROLS}
    assert len(summary.comparisons["base"].differences) == 3
    assert len(summary.comparisons["oracle"].differences) == 3
    assert [one.task for one in summary.comparisons["one_expert"].differences] == ["composite-2"]
    assert summary.speed is not None
    files = sum(
        path.stat().st_size for path in work.base_folder(planned.base).glob("*.safetensors")
    )
    assert summary.sizes == {"experts": ANY, "gates": ANY, "statistics": ANY, "base": files}
    assert summary.own == TASKS
    nothing_is_finished_that_lacks_a_result(work, planned, monkeypatch)

    for question, count in (
        ("FROM comparisons", 3 * 6 + 1),
        ("FROM speeds", 2),
        ("FROM merges", 3),
        ("FROM score_parts", 2 * 2 * 8),
        ("FROM scores WHERE templated IS NULL OR mean_prompt_tokens IS NULL", 0),
    ):
        work.ledger.ingest()
        assert len(work.ledger.query(question).rows) == count, question

    # all is held now, so no model is opened again
    monkeypatch.setattr(measure, "opened", None)
    before = work.ledger.records.parts()
    measure.measure(work, planned, gates)
    assert work.ledger.records.parts() == before

    text = "\n".join([*card.score_table(summary), *card.speed_lines(summary)])
    assert "| composite-2 | composite_right | 2 |" in text
    assert "as plain text" in text
    assert "Prefill" in text
    assert re.search(r"Its experts and gates take \d+\.\d MB on disk\.", text)
    warn_of_experts_whose_tokens_go_elsewhere(summary)
    mark_only_what_differs_beyond_chance(summary)


def test_composites_that_show_solved_ones_say_how_many(
    workplace: Callable[..., RunContext],
) -> None:
    composites = [{"n": 2, "count": 2}, {"n": 2, "count": 2, "num_fewshot": 1}]
    body = {"limit": 4, "compare": ["oracle"], "max_new_tokens": 4, "composite": composites}
    work = workplace(benchmark=body)
    planned, gates = go(work)
    measure.measure(work, planned, gates)
    summary = told(work, planned)
    alone, shown = (summary.scores[name] for name in ("composite-2", "composite-2-1shot"))
    assert alone.keys() == shown.keys() == {"fused", "oracle"}
    for system in alone:
        assert (shown[system].mean_prompt_tokens or 0) > (alone[system].mean_prompt_tokens or 0)
    text = "\n".join(card.score_table(summary))
    assert "greedy, zero-shot but for composite-2-1shot (1-shot), as plain text" in text
    work.ledger.ingest()
    asked = work.ledger.query("SELECT DISTINCT task, num_fewshot FROM scores ORDER BY 2, 1").rows
    assert asked[-1] == ("composite-2-1shot", 1)
    assert recompute_scores(work.ledger, 99).findings == ()

    one, *others = work.recipe.experts  # now by another metric, under the same id
    experts = (one.model_copy(update={"metric": "rougeL"}), *others)
    again = replace(work, recipe=work.recipe.model_copy(update={"experts": experts}))
    changed = plan_of(again)
    said = f"composite-2 is recorded with the answers of {one.name} judged by exact_match"
    with pytest.raises(JudgedError, match=said):
        measure.missing(again, changed)
    with pytest.raises(JudgedError, match=said):
        summarise(again.ledger, changed, None)


def test_conversations_are_measured_with_their_controls_and_shown_turn_by_turn(
    workplace: Callable[..., RunContext],
    chat_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controls = ["oracle", "one_expert", "single", "swap", "alora"]
    body = {
        "limit": 3,
        "compare": ["base", *controls],
        "max_new_tokens": 4,
        "batch_size": 2,
        "conversation": [{"n": 3, "count": 3}],
        "system_prompt": "Be brief.",
    }
    work = workplace(base=f"path:{chat_base}", benchmark=body)
    planned, gates = go(work)
    measure.measure(work, planned, gates)
    assert measure.missing(work, planned) == []

    summary = told(work, planned)
    row = summary.scores["conversation-3"]
    assert row.keys() == {"fused", "base", *controls}
    for system, score in row.items():
        assert (score.num_samples, score.spec.system_prompt) == (3, "Be brief.")
        assert sum(part.num_samples for part in score.parts) == 9
        reads = [turn.prompt_tokens - turn.computed_tokens for turn in score.turns]
        assert (sum(reads) > 0) == (system not in {"single", "swap"})
    assert row["swap"].turns[0].prompt_tokens == row["fused"].turns[0].prompt_tokens
    pairs = {
        one.task: other
        for other, comparison in summary.comparisons.items()
        for one in comparison.differences
        if other in controls and other != "oracle"
    }
    assert pairs.keys() == {"conversation-3"}

    work.ledger.ingest()
    for question, count in (
        (f"FROM conversation_turns WHERE router_id = '{planned.router.id}'", 7 * 3),
        ("FROM scores WHERE system_prompt = 'Be brief.'", 2 * 3 + 7),
        ("FROM leaderboard WHERE task = 'conversation-3'", 1),  # controls have no place
        ("FROM leaderboard WHERE oracle_name = 'each span''s own'", 1),
    ):
        assert len(work.ledger.query(question).rows) == count, question
    assert recompute_scores(work.ledger, 99).findings == ()

    text = card.write_card(build.describe(work, planned, gates), summary, "x")
    assert "| conversation-3 | all turns | turn 1 | 2 | 3 | computed | seconds |" in text
    assert "| conversation-3 | conversation_right | 3 |" in text
    score_table.print_scores("x", work.home, planned, summary, {})
    router = planned.router.id[:19]
    shown = capsys.readouterr().out
    assert re.search("conversation-3 +all turns +turn 1 +2 +3 +computed +seconds", shown)
    assert summary.systems == ["base", "oracle", "fused"]  # the others have no other task
    assert "3 conversations of 3 turns, each turn about another task" in shown
    assert "under the system prompt 'Be brief.'" in shown
    assert f"FROM leaderboard WHERE is_latest AND subject_id LIKE '{router}%'" in shown

    trace_a_conversation_as_it_was_asked(work, planned, gates)

    narrow = Console(width=50, file=sys.stdout, markup=False)
    monkeypatch.setattr(score_table, "plain_console", lambda: narrow)
    score_table.print_scores("x", work.home, planned, summary, {})
    shown = capsys.readouterr().out
    assert re.search(r"\n q_and_v +3 +\d\.\d\d .*\n attention +3 ", shown)  # a line a task
    assert f"low, high FROM latest_standings WHERE router_id LIKE '{router}%'" in shown

    unasked = replace(summary, scores={}, comparisons={})
    score_table.print_scores("x", work.home, planned, unasked, {})
    shown = capsys.readouterr().out
    assert shown.startswith("x: no task was asked; give its experts rows as `test:`")
    assert "meteora chat" in shown
    assert "meteora report" not in shown


def test_how_many_prompts_are_answered_together_may_be_left_to_the_memory(
    workplace: Callable[..., RunContext],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {"limit": 4, "compare": ["base", "linear"], "max_new_tokens": 4}
    asked |= {"composite": [{"n": 8, "count": 4}]}
    values = []
    for size in (4, "auto"):
        work = workplace(benchmark=asked | {"batch_size": size})
        planned, gates = go(work)
        held = sum(path.stat().st_size for path in work.base_folder(planned.base).iterdir())
        monkeypatch.setattr(measure, "memory_bytes", lambda _device, held=held: 4 * held)
        measure.measure(work, planned, gates)
        scores = work.ledger.scores_of(one.spec.id for one in planned.measurements)
        values.append({spec_id: score.value for spec_id, score in scores.items()})
        (tmp_path / "home").rename(tmp_path / str(size))
    assert values[0] == values[1]
    said = capsys.readouterr().err
    found = dict(re.findall(r"(\S+): (\d+) prompts? at a time", said))
    assert found.keys() == {*TASKS, "composite-8"}
    assert int(found["composite-8"]) < int(found["q_and_v"]) <= 64


def test_a_base_without_a_chat_template_is_asked_no_conversations(
    workplace: Callable[..., RunContext],
) -> None:
    asked = {"limit": 2, "compare": [], "conversation": [{"n": 2, "count": 1}]}
    work = workplace(benchmark=asked)
    planned, gates = go(work)
    with pytest.raises(BenchmarkError, match="conversations need the roles of a chat template"):
        measure.measure(work, planned, gates)


def trace_a_conversation_as_it_was_asked(work: RunContext, planned: Plan, gates: Any) -> None:
    results = run_queries(work.ledger, planned.router.id)
    first, second = find_examples(work.ledger, results["outputs"], 2)
    assert first.dialogue is not None
    assert second.dialogue is None
    expected = ", then ".join(question.row.response for question in first.dialogue.questions)
    assert first.caption.startswith(f"conversation-3; expected: {expected}; ")
    with opened(work, planned, gates=gates) as (model, tokenizer):
        drawn, single = trace_examples(model, tokenizer, [first, second])
    text = "".join(drawn["data"]["pieces"])
    row = results["outputs"].rows[0]
    asked = read_outputs(work.ledger.blobs.path_of(row["outputs_sha256"]))[0]
    assert "Be brief." in text
    place = 0
    for question, turn in zip(first.dialogue.questions, json.loads(asked["turns"]), strict=True):
        for part in (question.row.prompt, turn["output"].strip()):  # the recorded answers
            place = text.index(part, place)
    text = "".join(single["data"]["pieces"])
    assert (text.count("<user>"), text.count("Be brief.")) == (1, 1)


def nothing_is_finished_that_lacks_a_result(
    work: RunContext, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = type(work.ledger).built
    assert planned.speed is not None
    for needed in (planned.router, planned.routing, planned.comparisons[-1], planned.speed):
        with monkeypatch.context() as patch:
            patch.setattr(
                type(work.ledger),
                "built",
                lambda ledger, one, lost=needed.id: None if one == lost else own(ledger, one),
            )
            assert summarise(work.ledger, planned, None) is None, needed.kind
    scores = work.ledger.scores_of(one.spec.id for one in planned.measurements)
    del scores[planned.measurements[-1].spec.id]
    with monkeypatch.context() as patch:
        patch.setattr(type(work.ledger), "scores_of", lambda _ledger, _ids: scores)
        assert summarise(work.ledger, planned, None) is None


def mark_only_what_differs_beyond_chance(summary: Summary) -> None:
    comparison = summary.comparisons["base"]
    assert summary.mark("q_and_v", "base") == ""  # of three rows nothing can be said
    for p_holm, difference, mark in ((0.06, -0.9, ""), (0.04, -0.9, "-"), (0.04, 0.9, "+")):
        one = replace(comparison.differences[0], p_holm=p_holm, p_value=0.01, difference=difference)
        told = replace(
            summary,
            comparisons={"base": replace(comparison, differences=(one,))},
        )
        assert told.mark(one.task, "base") == mark
        cell = card.cell(told, one.task, "base")
        assert cell.endswith(mark or "]")
        lines = card.loss_lines(told)
        assert [line.startswith(f"Worse than base on {one.task}") for line in lines] == (
            [True] if mark == "-" else []
        )


def warn_of_experts_whose_tokens_go_elsewhere(summary: Summary) -> None:
    assert summary.routing is not None
    first, *rest = (replace(share, accuracy=0.9) for share in summary.routing.by_expert)
    for accuracy, warned in ((0.51, False), (0.49, True)):
        shares = (replace(first, accuracy=accuracy), *rest)
        lines = card.routing_lines(
            replace(summary, routing=replace(summary.routing, by_expert=shares))
        )
        warning = f"Most tokens of {first.expert} go to other experts"
        assert [warning in line for line in lines] == [False, *([True] if warned else [])]


def test_a_run_that_was_stopped_asks_only_what_is_missing(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workplace(benchmark={"limit": 2, "compare": ["base"], "max_new_tokens": 2})
    planned, gates = go(work)
    asked: list[str] = []
    stops_at = [2]
    real = measure.evaluate.evaluate_task

    def stopping(model: Any, tokenizer: Any, task: Any, **settings: Any) -> Any:
        if len(asked) in stops_at:
            raise KeyboardInterrupt
        asked.append(task.name)
        return real(model, tokenizer, task, **settings)

    monkeypatch.setattr(measure.evaluate, "evaluate_task", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(work, planned, gates)
    assert len(measure.missing(work, planned)) == 2
    stops_at.clear()
    measure.measure(work, planned, gates)
    assert len(asked) == 4
    assert measure.missing(work, planned) == []
    assert told(work, planned).mean("fused") is not None


def test_the_same_gates_can_be_measured_on_other_rows(
    workplace: Callable[..., RunContext],
) -> None:
    """Its routing counts are then those of these rows, as are the other facts on its routes."""
    counts = []
    for limit in (3, 2, 2):
        work = workplace(benchmark={"limit": limit, "compare": [], "max_new_tokens": 2})
        planned, gates = go(work)
        measure.measure(work, planned, gates)
        assert work.ledger.built(planned.routing.id) is not None
        assert told(work, planned).scores["q_and_v"]["fused"].num_samples == limit
        work.ledger.ingest()
        (found,) = work.ledger.query("SELECT sum(num_tokens) FROM routing_counts").rows
        counts.append(found)
    assert counts[0] > counts[1] == counts[2]


class StoppedError(Exception):
    """As if the process had been killed in the middle."""


def count_asked(monkeypatch: pytest.MonkeyPatch, fails_after: int = 99) -> list[int]:
    """How many prompts each portion had that reached the model."""
    asked: list[int] = []
    real = Harness.generate

    def watched(self: Harness, prompts: Any, **more: Any) -> Any:
        if len(asked) == fails_after:
            raise StoppedError
        asked.append(len(prompts))
        return real(self, prompts, **more)

    monkeypatch.setattr(Harness, "generate", watched)
    return asked


def test_a_stopped_run_goes_on_at_the_row_and_leaves_nothing_behind(
    workplace: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.resume.BATCHES", 1)
    asked = {"limit": 4, "compare": ["random"], "max_new_tokens": 2, "batch_size": 1}
    work = workplace(benchmark=asked)
    planned, gates = go(work)
    answers = work.home / "answers"
    for stopped_after, left in ((2, 1), (3, 0)):  # first amid fused, then amid random
        with monkeypatch.context() as patch:
            portion = count_asked(patch, fails_after=stopped_after)
            with pytest.raises(StoppedError):
                measure.measure(work, planned, gates)
        assert portion == [1] * stopped_after
        assert len(list(answers.iterdir())) == left
    portion = count_asked(monkeypatch)
    measure.measure(work, planned, gates)
    # of the random router's task nothing is kept: it would draw other choices
    assert len(portion) == 2 * 4 * 2 - 4
    assert not list(answers.iterdir())
