"""`template: plain` means the same for the gates and for the benchmark."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import meteora
from meteora.artifacts import SHARED, RouterBuild
from meteora.base.chat_template import encode_pair
from meteora.checkpoint.manifest import read_manifest
from pipelines.data.rows import ExamplesError
from pipelines.planning.plan import Plan
from pipelines.reports.summary import summarise
from pipelines.stages import build, measure
from pipelines.stages.open_model import opened
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import plan_of
from tests.pipelines.stages.conftest import dropped_and_added

QUICK = {"limit": 2, "compare": ["base"], "max_new_tokens": 2}
PROMPT = {"router": {"opening": "prompt"}}


def go(work: RunContext) -> tuple[Plan, RouterBuild]:
    planned = plan_of(work)
    build.stack(work, planned)
    return planned, build.fit_gates(work, planned)


def test_gates_are_fitted_to_plain_text_where_a_benchmark_asks_it(
    workplace: Callable[..., RunContext], chat_base: Path
) -> None:
    _, bare = go(workplace(benchmark=QUICK, **PROMPT))
    chat, templated = go(workplace(base=f"path:{chat_base}", benchmark=QUICK, **PROMPT))
    asked = {"base": f"path:{chat_base}", "benchmark": {**QUICK, "template": "plain"}, **PROMPT}
    work = workplace(**asked)
    plain, gates = go(work)
    assert gates.num_tokens == bare.num_tokens < templated.num_tokens
    assert gates.heldout_accuracy == pytest.approx(bare.heldout_accuracy)
    assert plain.router == replace(chat.router, template="plain")
    assert plain.router.id != chat.router.id
    with opened(work, plain) as (model, tokenizer):
        sequences, template = build._labelled(work, plain, model, tokenizer)
        assert tokenizer.chat_template  # it is left alone
    row = plain.examples["q_and_v"][0]
    tokenizer.chat_template = None
    assert sequences[0].input_ids == tuple(encode_pair(tokenizer, row.prompt, row.response))
    assert template is not None
    assert not template.opening

    measure.measure(work, plain, gates)
    work.ledger.ingest()
    assert work.ledger.query("SELECT DISTINCT templated FROM scores").rows == [(False,)]


def test_conversations_that_are_asked_for_on_a_base_without_a_template_are_said_to_be_left_out(
    workplace: Callable[..., RunContext], capfd: pytest.CaptureFixture[str]
) -> None:
    said = "note: the base has no chat template: gates are fitted without conversations"
    go(workplace(benchmark=QUICK))
    assert said not in capfd.readouterr().err
    go(workplace(benchmark=QUICK, gates={"conversations": [2]}))
    assert said in " ".join(capfd.readouterr().err.split())


def test_a_base_whose_tokenizer_is_in_python_is_fitted_and_measured_without_places_of_tokens(
    workplace: Callable[..., RunContext],
    chat_base: Path,
    python_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (chat_base / name).unlink()
    python_tokenizer.save_pretrained(chat_base)
    gates = {"conversations": [2]}
    work = workplace(base=f"path:{chat_base}", benchmark=QUICK, gates=gates)
    planned, made = go(work)
    measure.measure(work, planned, made)
    assert summarise(work.ledger, planned, work.base_folder(planned.base))
    said = " ".join(capfd.readouterr().err.split())
    no_places = "the base's tokenizer gives no places of its tokens"
    assert f"note: {no_places}: gates are fitted without conversations" in said
    assert f"note: switches are not measured: {no_places} in a text" in said

    def unexpected(*_: object, **__: object) -> None:
        pytest.fail("the base is loaded")

    monkeypatch.setattr(build, "opened", unexpected)
    work = workplace(base=f"path:{chat_base}", benchmark=QUICK, gates={"composites": [2]})
    with pytest.raises(ExamplesError, match="which composites, conversations and spans need"):
        go(work)


def test_a_checkpoint_on_plain_text_says_so_and_grows_on_plain_text(
    workplace: Callable[..., RunContext], chat_base: Path, recipe_folder: Path
) -> None:
    benchmark = {**QUICK, "template": "plain"}
    work = workplace(base=f"path:{chat_base}", benchmark=benchmark)
    planned, gates = go(work)
    measure.measure(work, planned, gates)
    folder = build.write_checkpoint(work, planned, gates)
    made = read_manifest(folder).gates
    assert made["template"] == "plain"
    assert not made.keys() & {"conversations", "system_prompts"}  # plain text has no roles
    grown = dropped_and_added(folder, chat_base, recipe_folder, work.home)
    assert read_manifest(grown).gates["template"] == "plain"
    model, _ = meteora.load(grown, base_folder=chat_base)
    assert meteora.expert_names(model) == ["q_and_v", "attention", SHARED]
