from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from meteora.encode import encode_prompt
from meteora.model import force_expert, without_experts
from pipelines import benchmark
from pipelines.examples import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import World

ROWS = [Row("abc", "x"), Row("a longer prompt", "y"), Row("b", "z")]


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(ids, max_new_tokens=length, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("output", "reference", "value"),
    [
        ("42", "42", 1.0),
        ("  42\n", "42", 1.0),
        ("a  b", "a b", 1.0),
        ("e\u0301", "\u00e9", 1.0),
        ("", "42", 0.0),
        ("42.", "42", 0.0),
        ("it is 42", "42", 0.0),
    ],
)
def test_exact_match_forgives_white_space_and_nothing_else(
    output: str, reference: str, value: float
) -> None:
    assert benchmark.exact_match(output, reference) == value


def test_the_interval_is_the_one_in_the_textbook() -> None:
    """Values from Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for successes, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert benchmark.wilson(successes, total) == pytest.approx((low, high), abs=1e-4)


def test_the_harness_asks_what_generate_is_asked(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Batched and padded by the harness, one by one here: the same greedy answers."""
    model = world.load()
    with force_expert(model, "q_and_v"):
        found = benchmark.measure(model, tokenizer, "letters", ROWS, max_new_tokens=6, batch_size=2)
        for row, output in zip(ROWS, found.outputs, strict=True):
            text = greedy(model, tokenizer, row.prompt, 6)
            assert output["output"] == text
            assert output["reference"] == row.response
    assert found.num_samples == len(ROWS)
    assert found.harness.startswith("lm-eval ")


def test_a_right_answer_counts_and_the_rows_are_told(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = world.load()
    with without_experts(model):
        right = greedy(model, tokenizer, "abc", 3)
        rows = [Row("abc", right), Row("abc ", "certainly not this")]
        told: list[int] = []
        found = benchmark.measure(
            model, tokenizer, "half", rows, max_new_tokens=3, batch_size=1, advance=told.append
        )
    assert found.value == 0.5
    assert [output["exact_match"] for output in found.outputs] == [1.0, 0.0]
    assert found.low < 0.5 < found.high
    assert told == [1, 1]


def test_routes_are_counted_for_every_token_and_module(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With one expert forced every token goes to it, however rows are batched and padded."""
    model = world.load()
    names = list(world.adapters)
    with force_expert(model, "attention"):
        counts = benchmark.count_routes(model, tokenizer, ROWS, batch_size=2)
    tokens = sum(len(row.prompt) + len(row.response) + 1 for row in ROWS)  # a byte each, and </s>
    assert counts.keys() == world.manifest.modules.keys()
    for by_expert in counts.values():
        assert by_expert[names.index("attention")] == tokens
        assert sum(by_expert) == tokens
