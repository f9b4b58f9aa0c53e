"""The systems that a routed model is compared with are what they are called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from meteora.artifacts import ArtifactId, MergeSpec, RouterSpec, SpeedSpec
from meteora.model.fused import without_experts
from meteora.routing.layer import routed_layers
from pipelines.evaluation.speed import time_model, working_bytes
from pipelines.evaluation.systems import merge_deltas, use_merge, use_router
from tests.conftest import World, peft_is_behind

FUSED = ArtifactId("fused:" + "0" * 64)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def merge(method: str, *, density: float = 1.0, weight: float = 1.0, seed: int = 0) -> MergeSpec:
    return MergeSpec(FUSED, method, weight, density, seed)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_a_linear_merge_is_what_peft_merges_into_the_weights(world: World) -> None:
    """PEFT merges one adapter after the other into the base; their sum is a merge of weight 1."""
    model = world.load()
    expected = {path: layer.weight.clone() for path, layer in routed_layers(model).items()}
    for name in world.adapters:
        with peft_is_behind():
            alone = world.load_peft(name).merge_and_unload()
        for path, so_far in expected.items():
            own = alone.get_submodule(path).weight
            expected[path] = so_far + own - world.load_base().get_submodule(path).weight
    before = logits(model)
    with use_merge(model, merge("linear")):
        found = logits(model)
    for path, layer in routed_layers(model).items():
        delta = merge_deltas(layer, merge("linear"))
        torch.testing.assert_close(layer.weight + delta, expected[path], atol=1e-5, rtol=1e-5)
    plain = world.load_base()
    for path, weight in expected.items():
        plain.get_submodule(path).weight.data = weight
    torch.testing.assert_close(found, logits(plain), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)  # and nothing of it stays


def test_a_merge_of_a_tiny_weight_is_nearly_the_base(world: World) -> None:
    model = world.load()
    with without_experts(model):
        base = logits(model)
    with use_merge(model, merge("linear", weight=1e-9)):
        torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=1e-4)


def test_ties_keeps_the_largest_numbers_and_the_majoritys_signs(world: World) -> None:
    """As Yadav et al. (2023) define it, written out for one layer."""
    layer = next(iter(routed_layers(world.load()).values()))
    parts = zip(
        layer.stack.a.split(layer.stack.ranks),
        layer.stack.b.split(layer.stack.ranks, dim=1),
        layer.stack.scaling,
        strict=True,
    )
    deltas = [scaling * b @ a for a, b, scaling in parts if len(a)]
    trimmed = []
    for delta in deltas:
        kept = int(0.2 * delta.numel())
        least = delta.abs().flatten().topk(kept).values[-1]
        trimmed.append(torch.where(delta.abs() >= least, delta, 0))
    stack = torch.stack(trimmed)
    sign = stack.sum(0).sign()
    agree = (stack.sign() == sign) & (stack != 0)
    expected = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    found = merge_deltas(layer, merge("ties", density=0.2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_dare_drops_by_its_seed(world: World) -> None:
    model = world.load()
    runs = []
    for seed in (0, 0, 1):
        with use_merge(model, merge("dare_ties", density=0.5, seed=seed)):
            runs.append(logits(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_random_router_draws_anew_for_each_token_and_layer_and_by_its_seed(world: World) -> None:
    model = world.load()
    runs = []
    for seed in (0, 0, 1):
        with use_router(model, RouterSpec(FUSED, "random", 1, 1.0, seed=seed)):
            layers = list(routed_layers(model).values())
            drawn = [layer.router(torch.zeros(64, 1)) for layer in layers if layer.router]
            runs.append(drawn)
            assert len({tuple(one.argmax(-1).tolist()) for one in drawn}) == len(layers)
            chosen = drawn[0].argmax(-1)
            assert len(set(chosen.tolist())) == layers[0].num_choices
    assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_model_is_timed_against_its_base(world: World) -> None:
    model = world.load()
    spec = SpeedSpec(ArtifactId("router:0"), ArtifactId("base:0"), 24, 4, 2, 3)
    rounds: list[int] = []
    made = time_model(model, spec, stored_bytes=7, advance=rounds.append)
    assert [rate.phase for rate in made.rates] == ["prefill", "decode"]
    for rate in made.rates:
        assert rate.fused_tokens_per_second > 0
        assert rate.low <= rate.ratio <= rate.high
    assert len(rounds) == spec.rounds + 1  # the first is not counted
    plain = world.load_base()
    held = {tensor.data_ptr(): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    assert made.base_bytes == sum(tensor.nbytes for tensor in held.values())
    stacks = [(layer.stack.a, layer.stack.b) for layer in routed_layers(model).values()]
    assert made.added_bytes >= sum(a.nbytes + b.nbytes for a, b in stacks)
    assert made.base_working_bytes
    assert made.fused_working_bytes
    assert made.stored_bytes == 7


def test_a_base_with_a_state_in_place_of_a_cache_is_timed(
    build_base: Callable[[str], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_base("mamba"))
    spec = SpeedSpec(ArtifactId("router:0"), ArtifactId("base:0"), 3, 2, 1, 3)
    assert all(rate.fused_tokens_per_second > 0 for rate in time_model(model, spec, 0).rates)


def test_working_memory_is_what_a_forward_allocates_at_one_time() -> None:
    class Doubling(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_asked: Any) -> torch.Tensor:
            one = input_ids.repeat(1, 1000)  # 800 kB
            two = one + 1  # 800 kB more
            del one
            return two * 2  # and again, when one is gone

    ids = torch.ones(1, 100, dtype=torch.long)
    found = working_bytes(Doubling(), ids)  # ty: ignore[invalid-argument-type]
    assert found == pytest.approx(1_600_000, abs=64)  # a scalar is put into a tensor, too
