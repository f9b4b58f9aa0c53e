from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from meteora.artifacts import (
    ArtifactId,
    BenchmarkSpec,
    RouterOptions,
    Score,
    canonical_sha256,
)
from meteora.base.chat_template import encode_pair, encode_prompt
from meteora.base.loading import load_folder
from meteora.checkpoint.tensors import Gates
from meteora.model.fused import force_expert, without_experts
from meteora.model.generate import ONE_ANSWER, answer_all
from meteora.routing.gates import insert_gates
from pipelines.data.composites import compose
from pipelines.data.rows import ExamplesError, Row
from pipelines.evaluation import lm_eval_tasks
from pipelines.evaluation.evaluate import TaskResult, evaluate_task
from pipelines.evaluation.harness import LOGGER, BenchmarkError, Harness
from pipelines.evaluation.tasks import Task, check_rows, make_tasks
from pipelines.recipe.benchmark import (
    BenchmarkSection,
    CompositeSection,
    ConversationSection,
    TaskSection,
)
from pipelines.recipe.recipe import ExpertSection
from pipelines.scoring.metrics import ATTEMPTED, METRICS, RIGHT
from pipelines.scoring.outputs import (
    compute_composite_values,
    compute_values,
    read_outputs,
    write_outputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.conftest import World

ROWS = [Row("abc", "x"), Row("a longer prompt", "y"), Row("b", "z")]
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def task(rows: list[Row], *metrics: str, template: str = "auto", max_new_tokens: int = 6) -> Task:
    return Task("letters", metrics or ("exact_match",), template, max_new_tokens, rows=rows)


def score_of(found: TaskResult, metric: str) -> Score:
    subject, base = ArtifactId("router:" + "0" * 64), ArtifactId("base:" + "0" * 64)
    spec = BenchmarkSpec(subject, "letters", "f" * 64, metric, 0, 6, 0, base)
    return found.score(spec, "a" * 64, "cpu")


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(ids, max_new_tokens=length, do_sample=False, **ONE_ANSWER)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("template", ["", CHAT], ids=["plain", "chat"])
def test_the_harness_asks_what_generate_is_asked(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batched and padded by the harness, one by one here: the same greedy answers."""
    monkeypatch.setattr(tokenizer, "chat_template", template or None)
    model = world.load()
    # what a base asks for is not asked of it here
    unusual = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    for name, value in {**unusual, "stop_strings": ["a"], "max_time": 1e-9}.items():
        setattr(model.generation_config, name, value)
    with force_expert(model, "q_and_v"):
        found = evaluate_task(model, tokenizer, task(ROWS), batch_size=2)
        for row, output in zip(ROWS, found.outputs, strict=True):
            assert output["output"] == greedy(model, tokenizer, row.prompt, 6)
            assert output["reference"] == row.response
    lengths = [len(encode_prompt(tokenizer, row.prompt)) for row in ROWS]
    assert [output["prompt_tokens"] for output in found.outputs] == lengths
    score = score_of(found, "exact_match")
    assert (score.mean_prompt_tokens, score.max_prompt_tokens) == (sum(lengths) / 3, max(lengths))
    assert score.templated == bool(template)
    assert score.num_samples == len(ROWS)
    assert score.harness.startswith("lm-eval ")


def test_prompts_that_a_batch_would_mix_are_asked_one_by_one(
    build_base: Callable[[str], Path],
) -> None:
    model, tokenizer = load_folder(build_base("rwkv"))
    found = evaluate_task(model, tokenizer, task([*ROWS, Row("OTHER", "x")]), batch_size=2)
    for output in found.outputs:
        assert output["output"] == greedy(model, tokenizer, output["prompt"], 6)


def test_a_template_without_a_begin_token_gets_none(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for template in (CHAT, None):
        begins.chat_template = template
        harness = Harness(world.load(), begins, batch_size=2)
        lengths = [len(encode_prompt(begins, row.prompt)) for row in ROWS]
        assert harness.prompt_tokens([row.prompt for row in ROWS]) == lengths
        expected = answer_all(world.load(), begins, [encode_prompt(begins, "abc")], 6)[0]
        ((answer, _),) = harness.generate(["abc"], 6)
        assert answer == begins.decode(expected, skip_special_tokens=True)


def test_a_tokenizer_without_an_end_is_asked_too(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.bos_token = None
    found = evaluate_task(world.load(), endless, task(ROWS, "exact_match"), batch_size=2)
    assert len(found.outputs) == len(ROWS)


SYSTEM = "{% if messages[0].role != 'system' %}<sys>Be kind.</s>{% endif %}" + CHAT


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_every_question_is_asked_under_the_system_prompt(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    system: str | None,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", SYSTEM)
    model = world.load()
    asked = replace(task(ROWS), system_prompt=system)
    found = evaluate_task(model, tokenizer, asked, batch_size=2)
    opening = "<sys>Be kind.</s>" if system is None else f"<system>{system}</s>"
    for row, output in zip(ROWS, found.outputs, strict=True):
        text = f"{opening}<user>{row.prompt}</s><assistant>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        (answer,) = answer_all(model, tokenizer, ids.tolist(), 6)
        assert output["output"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert output["prompt_tokens"] == ids.shape[1]
    assert (asked.rows_sha256 == task(ROWS).rows_sha256) == (system is None)

    write_lm_eval_task(tmp_path)
    own = Task(
        "mine", ("acc",), "auto", 4, lm_eval="mine", folder=tmp_path, limit=1, system_prompt=system
    )
    (output,) = evaluate_task(model, tokenizer, own, batch_size=2).outputs
    assert output["prompt"] == f"{opening}<user>a</s><assistant>"


def test_a_template_without_a_system_prompt_is_named(
    world: World, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(task(ROWS), system_prompt="Be brief.")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    for template in (None, refuses):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(BenchmarkError, match="under a system prompt, but the base's chat temp"):
            evaluate_task(world.load(), tokenizer, asked, batch_size=2)


def test_of_lm_eval_s_warnings_only_the_expected_are_silent(
    world: World, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Row("abc", "x", choices=("x", "y"))]
    evaluate_task(world.load(), tokenizer, task(rows, "acc"), batch_size=1)
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    logging.getLogger(LOGGER).warning("something else")
    assert caplog.records[-1].name == LOGGER


def test_a_right_answer_counts_and_progress_is_reported(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = world.load()
    with without_experts(model):
        right = greedy(model, tokenizer, "abc", 3)
        rows = [Row("abc", right), Row("abc ", "certainly not this")]
        done: list[int] = []
        asked = task(rows, "exact_match", "rougeL", max_new_tokens=3)
        found = evaluate_task(model, tokenizer, asked, batch_size=1, advance=done.append)
    score = score_of(found, "exact_match")
    assert score.value == 0.5
    assert [output["exact_match"] for output in found.outputs] == [1.0, 0.0]
    assert score.low < 0.5 < score.high
    assert (score.interval, score_of(found, "rougeL").interval) == ("wilson", "bootstrap")
    assert done == [1, 1]
    assert asked.num_questions == 2


@pytest.mark.parametrize("by_the_model_alone", [False, True])
def test_answers_that_were_cut_and_empty_ones_are_counted(
    world: World, tokenizer: PreTrainedTokenizerBase, by_the_model_alone: bool
) -> None:
    """Which answers end by themselves is found by letting each run on."""
    model: Any = world.load()
    tokenizer = copy.deepcopy(tokenizer)
    rows = [Row(chr(97 + i) * (i + 1), "x") for i in range(6)]
    ids = [torch.tensor([encode_prompt(tokenizer, row.prompt)]) for row in rows]
    first = [int(model(input_ids=one).logits[0, -1].argmax()) for one in ids]
    # whatever the first row is answered with ends its answer now, at once
    if not by_the_model_alone:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0])
    model.generation_config.eos_token_id = first[0]
    found = evaluate_task(model, tokenizer, task(rows, max_new_tokens=4), batch_size=6)
    for one, output in zip(ids, found.outputs, strict=True):
        out = model.generate(one, max_new_tokens=4, do_sample=False, eos_token_id=first[0])
        ended = int(out[0, -1]) == first[0]
        assert output["truncated"] == (not ended)
    score = score_of(found, "exact_match")
    assert score.num_truncated == sum(output["truncated"] for output in found.outputs)
    assert 0 < score.num_truncated < len(rows)
    assert score.num_empty >= (not by_the_model_alone)
    assert score.num_samples == len(rows)


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> float:
    ids = torch.tensor([encode_pair(tokenizer, prompt, answer)[:-1]])
    start = len(encode_prompt(tokenizer, prompt))
    with torch.inference_mode():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :, 0].sum())


def test_choices_are_compared_by_their_log_likelihood(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = world.load()
    rows = [Row("12", "x", ("x", "yy")), Row("a longer one", "zz", ("x", "zz", "w"))]
    asked = task(rows, "acc", "acc_norm")
    done: list[int] = []
    found = evaluate_task(model, tokenizer, asked, batch_size=2, advance=done.append)
    for row, output in zip(rows, found.outputs, strict=True):
        sums = [log_likelihood(model, tokenizer, row.prompt, choice) for choice in row.choices]
        assert output["log_likelihoods"] == pytest.approx(sums, abs=1e-3)
        assert output["acc"] == float(row.choices[sums.index(max(sums))] in row.answers)
    assert sum(done) == asked.num_questions == 5


@pytest.mark.parametrize("ends", [False, True], ids=["joined", "ended"])
def test_a_choice_weighs_all_of_its_tokens_where_its_prompt_is_tokenized_with_it(
    world: World, tokenizer: PreTrainedTokenizerBase, *, ends: bool
) -> None:
    """Where `:` and `-` are one token, or where each text ends with one."""
    vocab = tokenizer.get_vocab()
    vocab[":-"] = vocab.pop("Ā")
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "-")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    joining = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    model, row = world.load(), Row("A:", "-5", ("-5", "5"))
    (weights,) = Harness(model, joining, batch_size=1).log_likelihoods([row])
    for choice, weight in zip(row.choices, weights, strict=True):
        expected = log_likelihood(model, joining, row.prompt, choice)
        assert weight == pytest.approx(expected, abs=1e-3)


def test_rows_without_choices_and_empty_choices_are_refused_where_choices_are_compared() -> None:
    with pytest.raises(ExamplesError, match="has no choices; give its row"):
        check_rows(task(ROWS, "acc"))
    row = Row("q", "a", ("a", ""))
    check_rows(task([row], "exact_match"))
    with pytest.raises(ExamplesError, match="empty choice"):
        check_rows(task([row], "acc"))
    with pytest.raises(ExamplesError, match="has one choice, which is always the likeliest"):
        check_rows(task([Row("q", "a", ("a", "a"))], "acc"))
    row = Row("q", "a", ("a", "b"), ("b",))
    check_rows(task([row], "exact_match"))
    with pytest.raises(ExamplesError, match="every choice of the prompt 'q' is right"):
        check_rows(task([row], "acc"))


def test_rows_of_which_every_answer_is_wrong_are_refused() -> None:
    for metric, answer, sentence in (
        ("exact_match", " ", "' ' is no answer, and exact_match compares with one"),
        ("sentence_bleu", "", "'' is no answer, and sentence_bleu"),
        ("rouge1", "?!", "'?!' is no answer, and rouge1"),
        ("rouge2", "Paris", "is no answer of 2 words or more, and rouge2"),
    ):
        with pytest.raises(ExamplesError, match=re.escape(sentence)):
            check_rows(task([Row("q", answer)], metric))
        with_another = Row("q", answer, references=("in Paris",))
        check_rows(task([with_another], metric))
        score = METRICS[metric].compute
        assert score(answer, Row("q", answer)) == 0 < score("in Paris", with_another)


def test_what_is_no_single_number_is_refused_where_numbers_are_compared() -> None:
    """Of a date or a range the last number alone would be compared, and no answer is `five`."""
    ranges = ("10-20", "10 - 20", "10\N{EN DASH}20 of 30-40", "10 \N{EN DASH} 20")
    dates = ("2021-03-03", "03.03.2021")
    grouped = (
        "1 234",
        "1\N{NARROW NO-BREAK SPACE}234",
        "1\N{RIGHT SINGLE QUOTATION MARK}234",
        "1_000",
    )
    commas = ("3,5", "1.234,5", "1,00,000", "(3,5)", "\u0661\u0662\u066b\u0665")
    powers = ("10^3", "12 m2", "12 km^2", "3 t of CO2")
    for answer in ("3/2", "3 / 2", "12:30", *dates, *ranges, *grouped, *commas, *powers):
        with pytest.raises(ExamplesError, match=re.escape(f"{answer!r} is not one number")):
            check_rows(task([Row("q", answer)], "numeric_match"))
    with pytest.raises(ExamplesError, match="'five' has no number, which numeric_match needs"):
        check_rows(task([Row("q", "five")], "numeric_match"))
    numbers = (
        "2/2 = 1\n#### 1", "With 3:1 it is 12.", "10-5 = 5", "1 - -5", "COVID-19", "3.5.",
        "1,234.5,", "$1,000,000.00", "so ...5", "2 + 2\n4", "12 m\N{SUPERSCRIPT TWO}", "x2", "3, 4",
        "2 of 1.5e3",
    )  # fmt: skip
    for answer in numbers:
        check_rows(task([Row("q", answer)], "numeric_match"))
    check_rows(task([Row("q", "five", references=("5",))], "numeric_match"))


def test_choices_of_a_batch_weigh_what_each_alone_does_where_a_router_reads_whole_prompts(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = world.load()
    torch.manual_seed(0)
    gates = {
        path: (3 * torch.randn(4, entry.in_features), torch.zeros(4))
        for path, entry in world.manifest.modules.items()
    }
    insert_gates(model, Gates(gates), RouterOptions("gate", 1, 1.0, share="turn"))
    rows = [Row("12", "x", ("x", "!!")), Row("a longer one", "w", ("many letters", "w"))]
    one, all_four = (
        evaluate_task(model, tokenizer, task(rows, "acc"), batch_size=size).outputs
        for size in (1, 4)
    )
    for alone, together in zip(one, all_four, strict=True):
        assert together["log_likelihoods"] == pytest.approx(alone["log_likelihoods"], abs=1e-3)


def test_composites_are_scored_answer_by_answer() -> None:
    rows = {name: [Row(f"{name}?", name)] for name in ("red", "blue")}
    (composite,) = compose(rows, 2, 1, seed=0)
    first, second = (question.row.response for question in composite.questions)
    kept = {
        "asked": json.dumps(composite.to_dict()),
        "judged_by": json.dumps({"red": "exact_match", "blue": "rouge1"}),
    }
    outputs = [f"1. {first}\n2. {second}", f"1. {first}", f"2. {second}", "", first]
    found = compute_composite_values([{**kept, "output": output} for output in outputs])
    assert found[RIGHT].values == (1.0, 0.5, 0.5, 0.0, 0.0)
    assert found[ATTEMPTED].values == (1.0, 0.5, 0.5, 0.0, 0.0)
    for part in found[RIGHT].parts:
        assert (part.value, part.num_samples, part.num_attempted) == (0.4, 5, 2)


def test_composites_can_be_scored_again_from_their_outputs(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = world.load()
    rows = {name: [Row(f"{name}{i}", name) for i in range(3)] for name in ("red", "blue")}
    asked = Task(
        "composite-2",
        (RIGHT, ATTEMPTED),
        "auto",
        8,
        composites=compose(rows, 2, 3, seed=0),
        part_metrics={"red": "exact_match", "blue": "rouge1"},
    )
    found = evaluate_task(model, tokenizer, asked, batch_size=2)
    assert {part.name for part in score_of(found, RIGHT).parts} == rows.keys()
    write_outputs(found.outputs, tmp_path / "outputs")
    again = compute_composite_values(read_outputs(tmp_path / "outputs"))
    for metric in (RIGHT, ATTEMPTED):
        assert list(again[metric].values) == [row[metric] for row in found.outputs]


def test_scores_can_be_computed_again_from_their_outputs(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    metrics = ("exact_match", "sentence_bleu", "acc")
    rows = [Row("abc", "a b", ("a b", "c")), Row("bc", "c", ("a b", "c"))]
    found = evaluate_task(world.load(), tokenizer, task(rows, *metrics), batch_size=2)
    write_outputs(found.outputs, tmp_path / "outputs")
    for metric in metrics:
        again = compute_values(read_outputs(tmp_path / "outputs"), [metric])[metric]
        assert again.mean == score_of(found, metric).value


def test_a_task_that_lm_eval_knows_is_asked_as_it_asks_it(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_lm_eval_task(tmp_path)
    asked = Task("mine", ("acc",), "auto", 4, lm_eval="mine", folder=tmp_path, limit=3)
    found = evaluate_task(world.load(), tokenizer, asked, batch_size=2)
    score = score_of(found, "acc")
    assert (score.num_samples, score.num_empty, score.num_truncated) == (3, 0, 0)
    assert (score.mean_prompt_tokens, score.max_prompt_tokens) == (None, None)
    assert score.value == sum(row["acc"] for row in found.outputs) / 3
    assert score.higher_is_better


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5"])
def test_a_value_of_lm_eval_s_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    write_lm_eval_task(tmp_path)
    sample = {"filter": "none", "doc_id": 0, "acc": value}
    monkeypatch.setattr(
        lm_eval_tasks,
        "_evaluate",
        lambda *_: {"samples": {"mine": [sample]}, "higher_is_better": {}},
    )
    asked = Task("mine", ("acc",), "auto", 4, lm_eval="mine", folder=tmp_path, limit=1)
    unasked: Any = None
    with pytest.raises(BenchmarkError, match="gives no acc for every row"):
        lm_eval_tasks.ask_lm_eval_task(unasked, asked)


def test_a_task_that_lm_eval_would_not_ask_so_is_refused_before_it_is_asked(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A mean of log-likelihoods is no perplexity, and a group has no rows of its own."""
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    write_lm_eval_task(tmp_path, tag="few", metric_list=[{"metric": "acc"}, perplexity])
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"group": "all", "task": ["mine", "few"]}))
    for name, metric, said in (
        ("none", "acc", "no task 'none'"),
        ("mine", "bleu", "bleu is none of its metrics .* those that are: acc$"),
        ("mine", "perplexity", "perplexity is no mean over rows .* those that are: acc$"),
        ("all", "acc", "'all' is no task but a group of tasks .* that you mean: mine, few"),
        ("few", "acc", "'few' is no task but a group of tasks .* that you mean: mine"),
    ):
        other = Task("t", (metric,), "auto", 4, lm_eval=name, folder=tmp_path, limit=3)
        asked: list[int] = []
        with pytest.raises(BenchmarkError, match=said):
            evaluate_task(world.load(), tokenizer, other, batch_size=2, advance=asked.append)
        assert asked == []


def test_solved_examples_are_in_the_prompt_only_where_the_recipe_says_so(
    world: World, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """What the YAML says is not what was recorded: zero."""
    write_lm_eval_task(tmp_path, num_fewshot=2)
    asked = Task("mine", ("acc",), "plain", 4, lm_eval="mine", folder=tmp_path, limit=2)
    for number in (0, 1):
        found = evaluate_task(
            world.load(), tokenizer, replace(asked, num_fewshot=number), batch_size=2
        )
        assert [row["prompt"].count("\n\n") for row in found.outputs] == [number] * 2


def test_a_task_of_lm_eval_s_form_is_another_one_once_its_files_are(tmp_path: Path) -> None:
    asked = Task("mine", ("acc",), "auto", 4, lm_eval="mine", limit=3)
    assert asked.rows_sha256 == canonical_sha256({"lm_eval": "mine", "limit": 3})
    write_lm_eval_task(tmp_path)
    own = replace(asked, folder=tmp_path)
    seen = {asked.rows_sha256, own.rows_sha256}
    write_lm_eval_task(tmp_path, doc_to_text="Q: {{q}}")
    seen.add(replace(own).rows_sha256)
    (tmp_path / "rows.jsonl").write_text('{"q": "e", "a": 1}\n')
    seen.add(replace(own).rows_sha256)
    (tmp_path / "notes.md").write_text("of no account")
    seen.add(replace(own).rows_sha256)
    assert len(seen) == 4


def test_an_answer_to_lm_eval_s_task_has_its_own_length_or_the_recipe_s(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipe's was recorded, and lm-eval's was asked for."""
    write_lm_eval_task(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 7},
        metric_list=[{"metric": "exact_match"}],
    )
    generate, lengths, hashes = Harness._model_generate, [], set()

    def watched(
        harness: Harness, context: torch.Tensor, max_length: int, *asked: Any, **more: Any
    ) -> torch.Tensor:
        lengths.append(max_length - context.shape[1])
        return generate(harness, context, max_length, *asked, **more)

    monkeypatch.setattr(Harness, "_model_generate", watched)
    model = world.load()
    context_length = model.config.max_position_embeddings
    for named in (None, 3, 4, context_length):
        section = TaskSection(
            lm_eval="mine", folder=str(tmp_path), metric="exact_match", max_new_tokens=named
        )
        asked = make_tasks([], BenchmarkSection(tasks=(section,), limit=1), tmp_path)["mine"]
        hashes.add(asked.rows_sha256)
        refused = pytest.raises(BenchmarkError, match="with the prompt; lower it")
        with refused if named == context_length else nullcontext():
            evaluate_task(model, tokenizer, asked, batch_size=2)
    assert lengths == [7, 3, 4]
    assert len(hashes) == 4


def test_an_answer_to_a_composite_may_be_as_long_as_those_to_its_questions(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    parts = [
        ExpertSection(name=name, adapter="path:a", test="jsonl:t.jsonl", max_new_tokens=own)
        for name, own in (("long", 200), ("short", None))
    ]
    asked = BenchmarkSection(composite=(CompositeSection(n=3),))
    limits = [
        make_tasks(of, asked, tmp_path)["composite-3"].max_new_tokens for of in (parts, parts[1:])
    ]
    assert limits == [600, 3 * asked.max_new_tokens]
    for none in (asked, BenchmarkSection(conversation=(ConversationSection(n=3),))):
        with pytest.raises(ExamplesError, match="there are no tasks"):
            make_tasks([], none, tmp_path)


def test_mixes_ask_no_more_questions_than_there_are_rows_unless_they_are_told_to(
    tmp_path: Path,
) -> None:
    parts = []
    for name in ("one", "two"):
        rows = (json.dumps({"prompt": f"{name} {n}", "response": "b"}) + "\n" for n in range(7))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        parts.append(ExpertSection(name=name, adapter="path:a", test=f"jsonl:{name}.jsonl"))
    for count, numbers in ((None, (5, 7)), (9, (9, 9))):
        asked = BenchmarkSection(
            composite=(CompositeSection(n=3, count=count),),
            conversation=(ConversationSection(n=2, count=count),),
        )
        tasks = make_tasks(parts, asked, tmp_path)
        composites, dialogues = tasks["composite-3"].composites, tasks["conversation-2"].dialogues
        assert (len(composites), len(dialogues)) == numbers


def test_mixes_ask_no_row_of_a_small_task_again_and_again(tmp_path: Path) -> None:
    parts = []
    for name, num_rows in (("big", 100), ("small", 10)):
        answers = ["b", "b\n2. c"]  # the second fits into no composite
        rows = ({"prompt": f"{name} {n}", "response": answers[n >= 8]} for n in range(num_rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts.append(ExpertSection(name=name, adapter="path:a", test=f"jsonl:{name}.jsonl"))
    asked = BenchmarkSection(
        composite=(CompositeSection(n=2),), conversation=(ConversationSection(n=2),)
    )
    tasks = make_tasks(parts, asked, tmp_path)
    for mix, number in (("composite-2", 8), ("conversation-2", 10)):
        prompts = tasks[mix].composites or tasks[mix].dialogues
        rows = Counter(question.row for prompt in prompts for question in prompt.questions)
        assert (len(prompts), max(rows.values())) == (number, 1)


def write_lm_eval_task(tmp_path: Path, **more: object) -> None:
    """A task of lm-eval's own form, in a folder, with rows on disk: no network is needed."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"q": "{q}", "a": {i % 2}}}\n' for i, q in enumerate("abcd")))
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "mine",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_target": "a",
                "doc_to_choice": ["x", "y"],
                "metric_list": [{"metric": "acc"}],
            }
            | more
        )
    )
