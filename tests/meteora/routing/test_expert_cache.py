"""Experts in the mapped file, the hot ones copied: the same results, within the budget."""

import copy
import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.placement import PlacementError
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import EXPERTS, MANIFEST
from meteora.kernels import gather_grouped
from meteora.kernels.stack import ExpertStack, mean_of_all, own_choices
from meteora.model.fused import expert_cache, force_expert, make_router
from meteora.routing.expert_cache import ExpertCache
from meteora.routing.layer import MoELoRALinear, routed_by, routed_layers
from meteora.routing.routers import Fixed, Gate
from tests.meteora.routing.test_layer import Allocations

TOP_2 = RouterOptions("gate", 2, 1.0)

IDS = torch.tensor([[5, 8, 13, 21, 34, 55], [3, 1, 4, 1, 5, 9]])


def by_norm(model):
    return routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 1.0), layer))


def pair_of(num_bytes):
    return lambda: (torch.zeros(num_bytes // 2, dtype=torch.uint8),) * 2


def test_the_least_recently_used_makes_room():
    cache = ExpertCache(100)
    assert cache.miss_rate == 0
    for key in "ab":
        cache.fetch(key, pair_of(40))
    cache.fetch("a", pair_of(40))  # now b is the one that was used least recently
    cache.fetch("c", pair_of(60))
    assert (cache.held_bytes, cache.hits, cache.misses) == (100, 1, 3)
    cache.fetch("a", pair_of(40))
    assert cache.hits == 2
    cache.fetch("b", pair_of(40))
    assert cache.misses == 4
    assert cache.miss_rate == 4 / 6
    assert "4 misses: 66.7%" in repr(cache)


def test_threads_that_need_one_expert_read_it_once():
    cache = ExpertCache(100)

    def load():
        waiting.append(other.submit(cache.fetch, "a", load))
        time.sleep(0.05)
        return pair_of(40)()

    waiting = []
    with ThreadPoolExecutor(1) as other:
        pair = cache.fetch("a", load)
        assert waiting[0].result() is pair
    assert (cache.held_bytes, cache.hits, cache.misses) == (40, 1, 1)
    assert copy.deepcopy(cache).budget_bytes == 100


def test_a_budget_below_zero_is_refused_before_anything_is_read():
    with pytest.raises(PlacementError, match="experts cannot be held in -1 bytes"):
        meteora.load("nowhere", expert_cache_bytes=-1)


def test_what_is_larger_than_the_budget_passes_through():
    cache = ExpertCache(10)
    cache.fetch("small", pair_of(8))
    for _ in range(2):
        a, _b = cache.fetch("large", pair_of(40))
        assert a.nbytes == 20
        assert cache.held_bytes == 8
    assert cache.misses == 3


@pytest.mark.parametrize("budget", [0, 3_000, 1 << 20])
def test_results_are_those_without_a_cache_whatever_its_budget(world, budget):
    plain, cached = world.load(), world.load(expert_cache_bytes=budget)
    cache = expert_cache(cached)
    assert cache
    with torch.no_grad(), by_norm(plain), by_norm(cached):
        for _ in range(2):
            got, expected = cached(IDS).logits, plain(IDS).logits
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert cache.held_bytes <= budget
        out = [
            model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
            for model in (plain, cached)
        ]
    assert torch.equal(*out)
    assert cache.misses
    assert (cache.hits == 0) == (budget < 1 << 20)  # in turns, all are gone before they come again
    assert expert_cache(plain) is None


def test_only_what_is_used_is_copied_and_only_once(world):
    """One expert of `q_and_v`: each of its modules is missed once, and then it is there."""
    model = world.load(expert_cache_bytes=1 << 20)
    cache, name = expert_cache(model), "q_and_v"
    assert cache
    e = list(world.adapters).index(name)
    owned = [entry for entry in world.manifest.modules.values() if entry.ranks[e]]
    with torch.no_grad(), force_expert(model, name):
        for run in (1, 2, 3):
            model(IDS)
            assert (cache.misses, cache.hits) == (len(owned), (run - 1) * len(owned))
    sizes = sum(entry.ranks[e] * (entry.in_features + entry.out_features) for entry in owned)
    assert cache.held_bytes == 4 * sizes
    # copies of their own, and no views that would hold the whole file
    assert cache.held_bytes == sum(
        tensor.untyped_storage().nbytes() for pair in cache._held.values() for tensor in pair
    )


def test_the_copies_follow_the_model_to_another_dtype(world):
    model = world.load(expert_cache_bytes=1 << 20)
    with torch.no_grad(), force_expert(model, "attention"):
        model(IDS)
        got = model.double()(IDS).logits
        with force_expert(plain := world.load().double(), "attention"):
            torch.testing.assert_close(got, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def layer_with(cache, *, ranks=(1, 2, 3), num_in=12, num_out=10):
    return MoELoRALinear(
        nn.Linear(num_in, num_out),
        ExpertStack(
            torch.randn(sum(ranks), num_in) / num_in**0.5,
            torch.randn(num_out, sum(ranks)),
            ranks,
            [1.0] * len(ranks),
            mapped=True,
        ),
        Gate(torch.randn(len(ranks), num_in), torch.zeros(len(ranks)), TOP_2),
        cache=cache,
    )


def test_gates_learn_through_the_cache():
    """The same gradient as without, in a layer whose experts come and go."""
    a, b, gate = torch.randn(6, 12), torch.randn(10, 6), torch.randn(3, 12)
    x, projection, grads = torch.randn(7, 12), nn.Linear(12, 10), []
    for cache in (None, ExpertCache(500)):
        router = Gate(gate.clone(), torch.zeros(3), TOP_2)
        stack = ExpertStack(a, b, [1, 2, 3], [1.0, 2.0, 0.5], mapped=cache is not None)
        layer = MoELoRALinear(projection, stack, router, cache=cache)
        layer(x).square().mean().backward()
        grads.append(router.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_choice_of_all_experts_is_copied_as_any_other(num_tokens):
    """Their mean, whose ranks have several scalings."""
    a, b, x = torch.randn(6, 12), torch.randn(10, 6), torch.randn(num_tokens, 12)
    choices, projection = [*own_choices([1, 2, 3]), mean_of_all([1, 2, 3])], nn.Linear(12, 10)
    gate, found = torch.randn(4, 12), []
    for cache in (None, ExpertCache(500)):
        stack = ExpertStack(a, b, [1, 2, 3], [1.0, 2.0, 0.5], choices, mapped=cache is not None)
        router = Gate(gate, torch.tensor([0.0, 0.0, 0.0, 9.0]), TOP_2)
        layer = MoELoRALinear(projection, stack, router, cache=cache)
        with torch.no_grad():
            found.append(layer(x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("budget", [500, 1 << 20])
def test_no_expert_leaves_for_the_mean_of_all(budget):
    """Each prompt's opening goes to it, at each layer; its uses count neither way."""
    ranks, projection, cache = [1, 2, 3], nn.Linear(12, 10), ExpertCache(budget)
    a, b, x = torch.randn(6, 12), torch.randn(10, 6), torch.randn(3, 12)
    choices = [*own_choices(ranks), mean_of_all(ranks)]
    stack = ExpertStack(a, b, ranks, [1.0] * 3, choices, mapped=True)
    layer = MoELoRALinear(projection, stack, cache=cache)
    for choice in [2, 3, 2, 3, 2]:
        layer.router = Fixed(torch.eye(4)[choice])
        with torch.no_grad():
            layer(x)
    assert (cache.hits, cache.misses) == (2, 1)


def test_gates_learn_from_what_was_copied_in_inference_mode():
    layer, x = layer_with(ExpertCache(1 << 20)), torch.randn(7, 12)
    with torch.inference_mode():
        layer(x)
    layer(x).square().mean().backward()
    assert layer.router.weight.grad.any()
    assert layer.cache.misses == 3


def test_a_layer_whose_experts_are_all_gone_asks_for_none():
    cache, x = ExpertCache(500), torch.randn(7, 12)
    layer = layer_with(cache, ranks=[0, 0, 0])
    torch.testing.assert_close(layer(x), layer.projection(x))
    assert (cache.hits, cache.misses) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_holds_single_experts_and_no_copies_of_weights_or_tokens(dtype, monkeypatch):
    monkeypatch.setattr(gather_grouped, "ROWS_AT_ONCE", 16)
    num_tokens, size, ranks = 512, 512, [4] * 6
    layer = layer_with(ExpertCache(0), ranks=ranks, num_in=size, num_out=size).to(dtype)
    x = torch.randn(num_tokens, size).to(dtype)
    with torch.no_grad(), Allocations() as seen:
        layer(x)
    output = num_tokens * size * dtype.itemsize
    outputs = 1 + (layer.stack.a.dtype != dtype)  # beside a 16-bit base the sums have 32 bits
    assert sum(number >= output for number in seen.sizes) <= 2 * outputs - 1
    rest = [number for number in seen.sizes if number < output]
    assert max(rest) <= max(num_tokens * sum(ranks) * 8, 16 * size * 4)


@pytest.fixture
def many(world, tmp_path):
    """A checkpoint of 512 experts on every module."""
    num_experts, r = 512, 4
    modules = {
        path: dataclasses.replace(entry, ranks=(r,) * num_experts, scaling=(0.5,) * num_experts)
        for path, entry in world.manifest.modules.items()
    }
    first = world.manifest.experts[0]
    manifest = dataclasses.replace(
        world.manifest,
        experts=tuple(dataclasses.replace(first, name=f"e{e}") for e in range(num_experts)),
        modules=modules,
        router=RouterOptions("uniform", 1, 1.0),
    )
    num_ranks = num_experts * r
    pairs = (
        (torch.randn(num_ranks, one.in_features) / 9, torch.randn(one.out_features, num_ranks) / 9)
        for one in modules.values()
    )
    tensors.write_experts(tmp_path / EXPERTS, modules, torch.float32, pairs)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def sent_to(chosen):
    """A router that sends every token to a few of the experts."""
    weights = torch.zeros(512)
    weights[chosen] = 1 / len(chosen)
    return lambda _layer: Fixed(weights)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc where memory comes from")
def test_512_experts_are_mapped_and_not_read(world, many):
    model, _ = meteora.load(many, base_folder=world.base, expert_cache_bytes=1 << 16)
    mapped = [
        [int(bound, 16) for bound in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(many / EXPERTS))
    ]
    for layer in routed_layers(model).values():
        for tensor in (layer.stack.a, layer.stack.b):
            assert any(low <= tensor.data_ptr() < high for low, high in mapped)


def test_512_experts_answer_from_a_cache_of_a_few(world, many):
    plain, _ = meteora.load(many, base_folder=world.base)
    model, _ = meteora.load(many, base_folder=world.base, expert_cache_bytes=1 << 16)
    cache, num_modules = expert_cache(model), len(routed_layers(model))
    assert cache
    with torch.no_grad():
        for chosen in ([3, 400], [3, 400], [511]):
            with routed_by(plain, sent_to(chosen)), routed_by(model, sent_to(chosen)):
                got, expected = model(IDS).logits, plain(IDS).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.held_bytes <= 1 << 16
    assert (cache.misses, cache.hits) == (3 * num_modules, 2 * num_modules)
