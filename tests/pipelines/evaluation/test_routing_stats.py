"""Where tokens go, how surely, and how soon: each against what is known or counted by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch

from meteora.artifacts import NULL, RouterOptions
from meteora.base.chat_template import encode_pair
from meteora.model.fused import force_expert, make_router
from meteora.model.trace import trace
from meteora.routing.layer import routed_by
from meteora.routing.routers import Router
from pipelines.data.rows import Row
from pipelines.evaluation import routing_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.conftest import World

ROWS = [Row("some words", "and more"), Row("x", "y"), Row("the third of them", "z")]
TOKENS = sum(len(row.prompt) + len(row.response) + 1 for row in ROWS)  # a byte each, and </s>


@pytest.fixture
def model(world: World) -> PreTrainedModel:
    return world.load()


def test_with_one_expert_forced_every_token_of_every_module_goes_to_it_surely(
    world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """However rows are batched and padded."""
    forced = list(world.adapters).index("attention")
    with force_expert(model, "attention"):
        found = routing_stats.measure_routing(model, tokenizer, ROWS, batch_size=2)
    assert found.keys() == world.manifest.modules.keys()
    for path, sums in found.items():
        expected = [0] * 4
        expected[forced] = TOKENS
        assert sums.counts.tolist() == expected
        detail = sums.detail(path)
        assert (detail.entropy_bits, detail.weight, detail.agreement) == (0.0, 1.0, 1.0)


def test_a_router_that_weighs_all_alike_has_the_largest_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for path, sums in routing_stats.measure_routing(model, tokenizer, ROWS, batch_size=3).items():
        detail = sums.detail(path)
        assert detail.entropy_bits == pytest.approx(math.log2(4))
        assert detail.weight == pytest.approx(1 / 4)


def test_details_are_those_of_a_trace_counted_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        found = routing_stats.measure_routing(model, tokenizer, ROWS, batch_size=2)
        traces = [
            trace(model, tokenizer, encode_pair(tokenizer, row.prompt, row.response))
            for row in ROWS
        ]
    chosen = torch.cat([one.chosen[:, :, 0] for one in traces], dim=1)  # [M, T]
    weights = torch.cat([one.weights[:, :, 0] for one in traces], dim=1)
    majority = torch.stack([(chosen == e).sum(0) for e in range(4)]).argmax(0)
    for m, path in enumerate(traces[0].modules):
        detail = found[path].detail(path)
        assert found[path].counts.tolist() == chosen[m].bincount(minlength=4).tolist()
        assert detail.weight == pytest.approx(weights[m].mean().item(), abs=1e-5)
        assert detail.agreement == pytest.approx((chosen[m] == majority).double().mean().item())
        assert 0 < detail.entropy_bits < 2
    assert len({sums.detail("").agreement for sums in found.values()}) > 1


def test_a_forced_expert_follows_at_once_where_its_own_text_begins_and_never_elsewhere(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tests = {"attention": ROWS, "q_and_v": [Row("q", "v"), Row("other", "words")]}
    composites = routing_stats.composites_of(tests)
    done: list[int] = []
    with force_expert(model, "attention"):
        found = routing_stats.measure_switches(model, tokenizer, composites, advance=done.append)
    assert sum(done) == len(composites)
    delays = {(one.expert, one.delay_tokens) for one in found}
    assert delays == {("attention", 0), ("q_and_v", None)}
    # two questions a prompt, each asked and answered once
    assert sum(one.count for one in found) == 4 * len(composites)
    assert {one.in_answer for one in found} == {False, True}


def test_tokens_for_which_the_base_has_no_room_do_not_count(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "max_position_embeddings", 12)
    found = routing_stats.measure_routing(model, tokenizer, ROWS, batch_size=2)
    expected = sum(min(12, len(encode_pair(tokenizer, r.prompt, r.response))) for r in ROWS)
    assert {sums.num_tokens for sums in found.values()} == {expected}
    composites = routing_stats.composites_of({"attention": ROWS, "q_and_v": ROWS})
    assert routing_stats.measure_switches(model, tokenizer, composites) == ()


@pytest.mark.parametrize(("rows", "number"), [(1, 2), (6, 12), (24, 48), (60, 48)])
def test_of_few_rows_as_many_composites_are_made(rows: int, number: int) -> None:
    tests = {name: [Row(f"{name} {i}", "words") for i in range(rows)] for name in ("a", "b")}
    composites = routing_stats.composites_of(tests)
    assert len(composites) == number
    asked = Counter(question.row for one in composites for question in one.questions)
    assert len(asked) == min(2 * rows, 2 * number)
    assert max(asked.values()) <= 2


def test_one_task_alone_has_no_switches() -> None:
    tests = {"attention": ROWS, "q_and_v": [Row("no answer", "1. one\n2. reads as two")]}
    assert routing_stats.composites_of(tests) == []


class ByLength(Router):
    """The longer a prompt, the more its tokens are the base's, the last choice."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = tokens.new_zeros(len(tokens), self.num_choices)
        logits[:, -1] = len(tokens)
        return logits


def test_the_base_is_told_from_the_experts_by_its_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_stats, "expert_names", lambda _model: ["a", "b", "c", NULL])
    own, rows_without_expert = (
        [Row("x", ""), Row("xxx", "")],
        [Row("xx", ""), Row("xxxx", ""), Row("xxx", "")],
    )
    options = RouterOptions("norm", 1, 1.0)
    with routed_by(model, lambda layer: ByLength(layer.num_choices, options)):
        found = routing_stats.measure_abstention(model, tokenizer, own, rows_without_expert)
    assert (found.num_own, found.num_nobodys) == (2, 3)
    assert found.auroc == pytest.approx((3 + 1.5) / 6)  # a tie counts as a half
    base = [math.exp(n) / (math.exp(n) + 3) for n in (1, 3, 2, 4, 3)]
    assert found.own_share == pytest.approx(sum(base[:2]) / 2)
    assert found.nobodys_share == pytest.approx(sum(base[2:]) / 3)


def test_a_run_of_tokens_ends_where_the_task_changes_or_there_is_none() -> None:
    owners = [None, "a", "a", "b", None, "b", "a"]
    assert routing_stats._runs(owners) == [(1, 3), (3, 4), (5, 6), (6, 7)]
