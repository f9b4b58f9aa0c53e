"""Controls on composites that know whose text each token is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import meteora
from meteora.artifacts import MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.model.fused import expert_names, force_expert
from meteora.model.generate import answer_all
from meteora.routing.hooks import recorded_routes
from pipelines.data.composites import (
    Question,
    compose,
    last_number,
    number_questions,
    split_answers,
)
from pipelines.data.rows import Row
from pipelines.evaluation.oracle_routing import use_oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.checkpoint.manifest import Manifest
    from pipelines.data.composites import Composite
    from tests.conftest import World

NAMES = ("all_seven", "attention", "q_and_v")
ROWS = {name: [Row(f"{name} {i * '?'}", f"answer {i}") for i in range(3)] for name in NAMES}


@pytest.fixture(scope="module")
def model(world: World) -> PreTrainedModel:
    return world.load()


@pytest.fixture(scope="module")
def composites() -> list[Composite]:
    return compose(ROWS, 3, 4, seed=0)


def ask(model: PreTrainedModel, ids: torch.Tensor, **more: object) -> tuple[list[str], object]:
    """The expert of each token, and the cache behind them."""
    with torch.inference_mode(), recorded_routes(model) as routes:
        out = model(input_ids=ids, use_cache=True, **more)
    chosen = torch.stack([experts[:, 0] for _, experts in routes.values()])
    assert (chosen == chosen[0]).all()  # every layer follows the oracle
    assert all((weights == 1).all() for weights, _ in routes.values())
    return [expert_names(model)[e] for e in chosen[0].tolist()], out.past_key_values


def test_every_token_of_a_batch_goes_to_the_expert_of_its_question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, composites: list[Composite]
) -> None:
    texts = [composite.prompt for composite in composites]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch.attention_mask == 0).any()
    with use_oracle(model, tokenizer, composites, "oracle"):
        found, _ = ask(model, batch.input_ids, attention_mask=batch.attention_mask)
    length = batch.input_ids.shape[1]
    for i, composite in enumerate(composites):
        first = composite.questions[0].task
        owners = [owner or first for owner in composite.prompt_owners(tokenizer, composite.prompt)]
        assert set(owners) == set(NAMES)
        assert found[i * length : (i + 1) * length][-len(owners) :] == owners


def test_of_prompts_that_are_alike_or_begin_alike_each_has_its_own_experts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tasks may share questions, and a question may be the beginning of another."""
    asked = [
        ("attention", "q_and_v", "r"),
        ("q_and_v", "attention", "r"),
        ("all_seven", "all_seven", "rs"),
    ]
    composites = [
        number_questions([Question(one, Row("p", "1")), Question(other, Row(last, "2"))])
        for one, other, last in asked
    ]
    ids = [torch.tensor([encode_prompt(tokenizer, one.prompt)]) for one in composites]
    with use_oracle(model, tokenizer, composites, "oracle"):
        ends = [ask(model, one)[0][-1] for one in ids]
        firsts = [ask(model, one)[0][0] for one in ids]
    assert ends == [other for _, other, _ in asked]
    assert firsts == [one for one, _, _ in asked]


def test_in_an_answer_the_last_number_names_the_question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, composites: list[Composite]
) -> None:
    composite = composites[0]
    ids = torch.tensor([encode_prompt(tokenizer, composite.prompt)])
    first, second, third = (question.task for question in composite.questions)
    said = [("1. so", first), ("\n", first), ("2. 3", second), ("\n", second), ("3", third)]
    with use_oracle(model, tokenizer, composites, "oracle"):
        _, cache = ask(model, ids)
        for text, owner in said:
            for token in tokenizer(text).input_ids:
                found, cache = ask(model, torch.tensor([[token]]), past_key_values=cache)
                assert found == [owner], text


def test_an_answer_of_a_base_with_a_state_in_place_of_a_cache_is_followed(
    build_base: Callable[[str], Path],
    build_adapter: Callable[..., Path],
    fuse_adapters: Callable[..., Manifest],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    base, names = build_base("mamba"), ("left", "right")
    adapters = {
        name: build_adapter(base, tmp_path / name, seed=seed, r=2, target_modules=["in_proj"])
        for seed, name in enumerate(names)
    }
    fuse_adapters(base, adapters, tmp_path / "fused")
    mamba, _ = meteora.load(tmp_path / "fused", base_folder=base)
    one = number_questions([Question("right", Row(text, "1")) for text in ("a", "b")])
    ids = [encode_prompt(tokenizer, one.prompt)]
    with use_oracle(mamba, tokenizer, [one], "oracle"):
        found = answer_all(mamba, tokenizer, ids, 4)
    with force_expert(mamba, "right"):
        assert found == answer_all(mamba, tokenizer, ids, 4)


def test_one_expert_answers_all_as_it_would_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, composites: list[Composite]
) -> None:
    composite = composites[1]
    ids = torch.tensor([encode_prompt(tokenizer, composite.prompt)])
    with use_oracle(model, tokenizer, composites, "one_expert"):
        found = answer_all(model, tokenizer, ids.tolist(), 8)
        asked, _ = ask(model, ids)
    assert set(asked) == {composite.questions[0].task}
    with force_expert(model, composite.questions[0].task):
        assert found == answer_all(model, tokenizer, ids.tolist(), 8)
    assert not model.base_model._forward_pre_hooks  # and nothing of it stays


def test_a_prompt_that_is_none_of_the_composites_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, composites: list[Composite]
) -> None:
    with (
        use_oracle(model, tokenizer, composites, "oracle"),
        pytest.raises(MeteoraError, match="'Something else' is none of the task's composites"),
    ):
        ask(model, tokenizer("Something else", return_tensors="pt").input_ids)


@given(st.lists(st.sampled_from(["1. a", "2. b", "3. c", "in 2. place", "4", "x"])))
def test_the_last_number_is_that_of_the_last_answer(lines: list[str]) -> None:
    answers = split_answers("\n".join([*lines, ""]), 3)
    assert last_number("\n".join([*lines, ""]), 3) == max(answers, default=0)
