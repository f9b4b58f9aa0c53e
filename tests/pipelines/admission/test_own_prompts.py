"""Experts without examples write prompts themselves, if they were trained on prompts, too."""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
import shutil
from itertools import count
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import pytest
import torch
import yaml

from pipelines.admission.card_examples import NoCardExamplesError
from pipelines.recipe.recipe import Recipe
from pipelines.workspace.context import RunContext, new_run_id
from store.ledger import Ledger
from tests.pipelines.conftest import (
    ALPHABETS,
    CHAT_TEMPLATE,
    prompts_in,
    result_of,
    run,
    train_experts,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITER, SILENT = ALPHABETS
"""One expert that was trained on whole conversations, and one on answers alone."""
ANSWERS = {WRITER: "+++", SILENT: "==="}
LETTERS = ascii_lowercase + digits


@pytest.fixture(scope="module")
def folder(
    build_base: Callable[[str], Path],
    fuse_adapters: Callable[..., object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A base with a chat template, both adapters, a checkpoint of both, and rows to test on."""
    folder = tmp_path_factory.mktemp("writing")
    shutil.copytree(build_base("llama_64"), folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    teach_conversations(folder / "base")
    train_experts(folder / "base", folder, answers=ANSWERS, on_whole={WRITER}, steps=100, peak=5e-3)
    adapters = {name: folder / name for name in ALPHABETS}
    fuse_adapters(folder / "base", adapters, folder / "fused")
    for name, letters in ALPHABETS.items():
        rows = [{"prompt": t, "response": ANSWERS[name]} for t in prompts_in(letters, 9, 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def teach_conversations(base: Path) -> None:
    """Train the base itself: in a user's place it writes letters and digits."""
    from transformers import AutoModelForCausalLM

    from meteora.base.loading import load_tokenizer
    from pipelines.data.rows import Row
    from pipelines.stages.train_adapters import fit, lessons
    from tests.quickstart.make import whole

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    prompts = (text for seed in count() for text in prompts_in(LETTERS, seed, 64))
    batches = lessons(load_tokenizer(base), (Row(text, text[0]) for text in prompts), 32)
    fit(model, whole(batches), steps=200, peak=1e-2, what="the base")
    model.save_pretrained(base)


@pytest.fixture
def fused(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import meteora

    return meteora.load(folder / "fused", base_folder=folder / "base")


@pytest.fixture
def open_recipe(folder: Path, tmp_path: Path) -> Callable[..., RunContext]:
    """A function that opens a recipe over both experts, whose cards name no examples."""

    def open_it(*names: str, **changed: Any) -> RunContext:
        experts = [
            {
                "name": name,
                "adapter": f"path:{name}",
                "examples": "auto",
                "test": f"jsonl:{name}.jsonl",
            }
            for name in names
        ]
        body = {
            "base": "path:base",
            "experts": experts,
            "gates": {"examples_per_expert": 24},
            "benchmark": {"limit": 4, "compare": ["oracle"], "max_new_tokens": 6},
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(body | changed, sort_keys=False))
        return RunContext(Ledger(tmp_path / "home"), Recipe.load(path), path, new_run_id())

    return open_it


def test_an_expert_that_has_learnt_prompts_writes_some(
    fused: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    from pipelines.admission.own_prompts import LEAST_GAIN, write_prompts

    model, tokenizer = fused
    state = torch.get_rng_state()
    written = write_prompts(model, tokenizer, [*ALPHABETS], 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert written[SILENT] == []
    own = [one.prompt for one in written[WRITER]]
    assert len({*own}) == len(own) >= 30
    assert sum({*text} <= {*ALPHABETS[WRITER]} for text in own) >= 0.9 * len(own)
    assert {one.response for one in written[WRITER]} == {ANSWERS[WRITER]}
    assert min(one.score for one in written[WRITER]) >= LEAST_GAIN
    assert write_prompts(model, tokenizer, [*ALPHABETS], 40) == written
    assert write_prompts(model, tokenizer, [WRITER], 40, seed=1) != {WRITER: written[WRITER]}


def test_prompts_and_their_answers_fit_into_the_base_s_context(
    fused: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some bases fail behind their last position; a text may have more tokens than were drawn."""
    from meteora.base.chat_template import encode_prompt
    from pipelines.admission import own_prompts

    monkeypatch.setattr(own_prompts, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(own_prompts, "_are_questions", lambda *_: True)
    model, tokenizer = fused
    room = len(encode_prompt(tokenizer, "a" * 14)) + 6
    model.config.max_position_embeddings = room
    last: list[int] = []
    cast("Any", model).model.rotary_emb.register_forward_pre_hook(
        lambda _module, _args, given: last.append(int(given["position_ids"].max())),
        with_kwargs=True,
    )
    written = own_prompts.write_prompts(model, tokenizer, [*ALPHABETS], 40)
    assert written[WRITER]
    assert max(last) < room


def test_prompts_that_a_batch_would_mix_are_written_one_by_one(
    fused: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    from meteora.base.chat_template import Template
    from pipelines.admission import own_prompts

    model, tokenizer = fused
    monkeypatch.setattr(model.config, "model_type", "rwkv")
    generate = Mock(wraps=own_prompts.generate_ids)
    monkeypatch.setattr(own_prompts, "generate_ids", generate)
    own_prompts._sample(model, tokenizer, Template.of(tokenizer), 3)
    assert [len(call.args[2]) for call in generate.call_args_list] == [1, 1, 1]


def test_without_a_chat_template_nobody_knows_where_a_prompt_ends(
    fused: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    from pipelines.admission.own_prompts import write_prompts

    model, tokenizer = fused
    tokenizer.chat_template = None
    assert write_prompts(model, tokenizer, [WRITER], 4) == {WRITER: []}


@pytest.mark.usefixtures("prefect_server")
def test_gates_are_fitted_to_what_an_expert_writes(
    open_recipe: Callable[..., RunContext], capfd: pytest.CaptureFixture[str]
) -> None:
    """The expert that writes answers has a stand-in."""
    work = open_recipe(*ALPHABETS, router={"without_examples": "norm"})
    run(work)
    said = capfd.readouterr().err
    assert f"{SILENT}: these adapters write no questions" in said
    assert "prompts that experts wrote: " in said
    plan, _ = result_of(work)
    assert [*plan.examples] == [WRITER]
    assert plan.router.stand_ins == (SILENT,)
    texts = [row.prompt for row in plan.examples[WRITER]]
    assert 12 <= len(texts) <= 24
    asked = {row.prompt for rows in plan.own_tests.values() for row in rows}
    assert not asked & {*texts}
    shares = work.ledger.query("SELECT expert, num_prompts FROM pool_shares WHERE num_prompts > 0")
    assert shares.rows[0] == (WRITER, max(count for _, count in shares.rows))


def test_few_different_texts_are_an_answer_said_again() -> None:
    from pipelines.admission.own_prompts import _are_questions
    from pipelines.data.claims import Claim

    written = [Claim("=" * n, SILENT, 0, score=15.0, lead=1.0) for n in range(4)]
    assert [n for n in range(5) if _are_questions(written[:n], 16)] == [4]


@pytest.mark.usefixtures("prefect_server")
def test_an_expert_that_writes_no_prompts_is_named(open_recipe: Callable[..., RunContext]) -> None:
    said = rf"expert {SILENT}: no examples: its card names no data set of the Hub; and of the"
    with pytest.raises(NoCardExamplesError, match=said):
        run(open_recipe(SILENT))
