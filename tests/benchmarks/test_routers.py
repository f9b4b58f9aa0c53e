"""Other papers' routers do what those papers say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.model.generate import answer_all
from meteora.routing.layer import routed_by, routed_layers
from meteora.routing.routers import Fixed
from tests.benchmarks.mixtures import answer_all_mixed, equal, in_proportion, shares_of, softmax
from tests.benchmarks.peers import arrow, of_one_shape, x_lora
from tests.benchmarks.spectr import SpectR
from tests.conftest import load_peft

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import World

PROMPTS = [[5, 9, 4], [7, 3, 8, 6, 2], [11, 4]]
NEW = 5


def test_each_prompt_of_a_batch_is_answered_by_its_own_shares(world: World) -> None:
    model, tokenizer = meteora.load(world.checkpoint, base_folder=world.base)
    model.generation_config.eos_token_id = None
    shares = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    mixed = answer_all_mixed(model, tokenizer, PROMPTS, NEW, shares=shares)
    for prompt, own, answer in zip(PROMPTS, shares, mixed, strict=True):
        with routed_by(model, lambda _layer, own=own: Fixed(own)):
            (alone,) = answer_all(model, tokenizer, [prompt], NEW)
        assert answer[: len(alone)] == alone


def test_shares_go_to_the_best_adapters_and_sum_to_one() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    found = [
        shares_of(scores, k, weigh)
        for k, weigh in [
            (1, equal), (2, equal), (2, in_proportion), (3, lambda best: softmax(best, 0.1)),
        ]
    ]  # fmt: skip
    expected = [
        [0, 1, 0, 0], [0, 0.5, 0, 0.5], [0, 4 / 7, 0, 3 / 7], [0, 0.66524, 0.09003, 0.24473],
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected), atol=1e-5, rtol=0)


def test_spectr_measures_a_token_along_the_inputs_of_an_adapter(world: World) -> None:
    for layer in routed_layers(world.load()).values():
        x = torch.randn(6, layer.stack.a.shape[1])
        logits = SpectR(layer.stack, RouterOptions("norm", 1, 1.0))(x)
        for e in range(layer.stack.num_choices):
            a, b = layer.stack.pair(e)
            if not len(a):
                assert (logits[:, e] == -torch.inf).all()
                continue
            v = torch.linalg.svd(b @ a).Vh[: len(a)]
            torch.testing.assert_close(logits[:, e], (x @ v.T).norm(dim=-1))


def test_adapters_filled_up_to_one_shape_compute_as_before(world: World, tmp_path: Path) -> None:
    filled = of_one_shape(list(world.adapters.values()), tmp_path)
    ids = torch.tensor(PROMPTS[1:2])
    for name, folder in zip(world.adapters, filled, strict=True):
        torch.testing.assert_close(
            load_peft(world.base, folder)(ids).logits, world.load_peft(name)(ids).logits
        )
    mixtures = [mix(world.load_base(), filled, 1) for mix in (arrow, x_lora)]
    assert all(model(ids).logits.isfinite().all() for model in mixtures)
