"""Layers of one input compute A x once: the same results, whatever is done to the model."""

import copy
import dataclasses
import pickle

import pytest
import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST
from meteora.kernels import gather_grouped
from meteora.kernels.dispatch import IN_TORCH
from meteora.model.fused import force_expert, without_experts
from meteora.routing.gates import gates_of, share_first_matmuls
from meteora.routing.hooks import recorded_logits, recorded_routes
from meteora.routing.layer import routed_layers, share_first_matmul
from meteora.routing.routers import Decision, Follower, Gate
from tests.meteora.routing.test_layer import Allocations, decodes_through_one_graph, make

TOP_2 = RouterOptions("gate", 2, 1.0)

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
IDS = torch.tensor([[5, 8, 13, 21, 34, 55], [3, 1, 4, 1, 5, 9]])


def follow(model):
    """One random gate for q, k and v, and one for gate and up, as `meteora run` fits them."""
    torch.manual_seed(3)
    follows, leaders = {}, {}
    for path, layer in routed_layers(model).items():
        size = layer.num_choices, layer.stack.a.shape[1]
        parent, _, name = path.rpartition(".")
        point = parent, {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name)
        if point in leaders:
            leader = leaders[point]
            layer.router = Follower(leader[1], layer.num_choices, TOP_2)
            follows[path] = leader[0]
        else:
            decision = Decision()
            leaders[parent, name] = path, decision
            gate = Gate(
                torch.randn(size),
                torch.randn(size[0]),
                TOP_2,
                decision=decision,
            )
            layer.router = gate.requires_grad_(requires_grad=False)
    return follows


@pytest.fixture
def models(world):
    """The same model without and with a shared first matmul."""
    plain, shared = world.load(), world.load()
    follow(plain)
    share_first_matmuls(routed_layers(shared), follow(shared))
    return plain, shared


@pytest.fixture
def dots(monkeypatch):
    """How many first matmuls of the gather kernel were computed."""
    calls = []

    def counted(*args, found=gather_grouped.chosen_dots):
        calls.append(args)
        return found(*args)

    monkeypatch.setattr(gather_grouped, "chosen_dots", counted)
    return calls


def gates(model):
    return [m.router for m in routed_layers(model).values() if isinstance(m.router, Gate)]


def matmul_of(layer):
    assert layer.shared
    return layer.shared.matmul


def with_kernel(kernel, *models):
    for model in models:
        for layer in routed_layers(model).values():
            layer.kernel = kernel


def equal(plain, shared):
    with torch.no_grad():
        torch.testing.assert_close(shared(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_results_are_those_of_layers_on_their_own(models, kernel, mode):
    """Experts of different ranks, and some that lack k or v."""
    with_kernel(kernel, *models)
    plain, shared = models
    with mode():
        torch.testing.assert_close(shared(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["dense", "gather"])
def test_it_does_in_16_bits_too(models, kernel):
    """There the projection is added to the experts' sum, and not the sum to it."""
    with_kernel(kernel, *models)
    found = []
    for model in models:
        with torch.no_grad():
            found.append(model.bfloat16()(IDS).logits)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_a_point_computes_once(models, dots):
    with_kernel("gather", *models)
    counts = []
    for model in models:
        with torch.no_grad():
            model(IDS)
        counts.append(len(dots))
        dots.clear()
    num_points = len(gates(models[1]))
    assert counts == [len(routed_layers(models[0])), num_points]
    assert num_points < counts[0]
    shares = [layer.shared for layer in routed_layers(models[1]).values() if layer.shared]
    assert all(
        share.matmul._now.handover is None for share in shares
    )  # nothing of the pass is held longer


def test_each_layers_a_is_held_once(models):
    """As rows of the point's: what moves is joined again, and nothing keeps the old."""
    layers = routed_layers(models[1])
    for model in (models[1], models[1].double(), copy.deepcopy(models[1])):
        with torch.no_grad():
            model(IDS)
        found = routed_layers(model)
        storages = {found[path].stack.a.untyped_storage().data_ptr() for path in (Q, K, V)}
        assert len(storages) == 1
        size = sum(found[path].stack.a.nbytes for path in (Q, K, V))
        assert found[Q].stack.a.untyped_storage().nbytes() == size
    assert matmul_of(layers[K]) is matmul_of(layers[Q])


@pytest.mark.parametrize("begun", [False, True])
def test_a_pickled_model_is_the_same_elsewhere(models, begun):
    """Also where a pass had come to an end between the layers of a point."""
    plain, shared = models
    with_kernel("gather", *models)
    with torch.no_grad():
        shared(IDS)
        if begun:
            routed_layers(shared)[Q](torch.randn(2, 6, 32))
    sent = pickle.loads(pickle.dumps(shared))  # noqa: S301
    equal(plain, sent)
    storages = {
        routed_layers(sent)[path].stack.a.untyped_storage().data_ptr() for path in (Q, K, V)
    }
    assert len(storages) == 1


@pytest.mark.parametrize("kernel", ["dense", "gather"])
@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("sparse_numbers", [0, gather_grouped.SPARSE_NUMBERS])
@pytest.mark.parametrize("mean", [False, True])
def test_layers_without_ranks_have_their_place_in_a_point(
    kernel, gone, sparse_numbers, mean, dots, monkeypatch
):
    monkeypatch.setattr(gather_grouped, "SPARSE_NUMBERS", sparse_numbers)
    ranks = [[3, 1], [2, 0], [0, 5]]
    ranks[gone] = [0, 0]
    alone = [make(ranks=own, seed=seed, kernel=kernel, mean=mean) for seed, own in enumerate(ranks)]
    decision, x = Decision(), torch.randn(4, 12)
    first = alone[0].router
    for layer in alone:
        layer.router = Follower(decision, layer.num_choices, TOP_2)
    alone[0].router = Gate(first.weight.data, first.bias.data, TOP_2, decision=decision)
    together = copy.deepcopy(alone)
    share_first_matmul(together)
    with torch.no_grad():
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other(x), one(x), rtol=1e-5, atol=1e-5)
    for _, rows, index, *_ in dots:  # nothing is read from behind the rows
        assert (index < max(1, len(rows))).all()


@pytest.mark.parametrize("kernel", ["dense", "gather"])
def test_a_pass_holds_tokens_times_the_ranks_of_all_and_no_copies(kernel):
    """Of q, k and v together; the A's were joined before."""
    num_tokens, size, ranks = 256, 512, [4] * 6
    layers = [make(size, size, ranks=ranks, seed=seed, kernel=kernel) for seed in range(3)]
    decision = Decision()
    layers[0].router.decision = decision
    for layer in layers[1:]:
        layer.router = Follower(decision, len(ranks), TOP_2)
    share_first_matmul(layers)
    x = torch.randn(num_tokens, size)
    with torch.no_grad(), Allocations() as seen:
        for layer in layers:
            layer(x)
    output = num_tokens * size * 4
    # each projection's own output, and in the gather kernel what one call of 256 rows adds to it
    assert sum(number >= output for number in seen.sizes) == (3 if kernel == "dense" else 6)
    assert max(n for n in seen.sizes if n < output) <= 3 * num_tokens * sum(ranks) * 8 < output


def test_what_is_moved_changed_or_copied_is_followed(models):
    plain, shared = models
    with torch.no_grad():
        for model in models:
            routed_layers(model)[K].stack.a.mul_(2)
    equal(plain, shared)
    with torch.no_grad():
        for model in models:
            layer = routed_layers(model)[V]
            layer.stack.a = layer.stack.a * 3
    equal(plain, shared)
    copied = copy.deepcopy(shared)
    with torch.no_grad():
        routed_layers(shared)[Q].stack.a.zero_()
    equal(plain, copied)
    equal(plain.double(), copied.double())


def test_what_is_moved_is_not_held_twice_by_a_kernel_that_shares_nothing(models):
    with_kernel("gather", *models)
    equal(*models)
    with_kernel("grouped", *models)
    for model in models:
        model.to(torch.float64)
    equal(*models)
    matmul = matmul_of(routed_layers(models[1])[Q])
    assert (len(matmul._a), len(matmul._choice_scaling), matmul._table) == (0, 0, None)
    with_kernel("gather", *models)
    equal(*models)


def test_a_layer_that_is_called_with_something_else_computes_for_itself(models):
    """Another input, another decision, or after the others are through."""
    layers = routed_layers(models[1])
    one, other = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    alone = routed_layers(models[0])
    with torch.no_grad():
        for x in (one, other):
            alone[Q](x)
            expected = [alone[path](x) for path in (K, V, K)]
            layers[Q](x)
            for path, found in zip((K, V, K), expected, strict=True):
                torch.testing.assert_close(layers[path](x), found, rtol=1e-5, atol=1e-5)
        layers[Q](one)
        alone[Q](one)
        torch.testing.assert_close(layers[K](other), alone[K](other), rtol=1e-5, atol=1e-5)
        layers[Q](one)
        layers[K].router = alone[K].router = Gate(
            torch.randn(4, 32), torch.zeros(4), RouterOptions("gate", 1, 1.0)
        )
        torch.testing.assert_close(layers[K](one), alone[K](one), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_kernel_of_its_own_keeps_it(models, monkeypatch):
    plain, shared = models
    with_kernel("gather", *models)
    routed_layers(shared)[K].kernel = "dense"
    asked = []

    def counted(*args, found=IN_TORCH["dense"], **into):
        asked.append(args)
        return found(*args, **into)

    monkeypatch.setitem(IN_TORCH, "dense", counted)
    equal(plain, shared)
    assert asked


def test_forced_experts_and_the_bare_base_are_what_they_were(models, world):
    plain, shared = models
    with force_expert(plain, "q_and_v"), force_expert(shared, "q_and_v"):
        equal(plain, shared)
    with without_experts(shared):
        equal(world.load_base(), shared)
    equal(plain, shared)


@pytest.mark.parametrize("recorded", [recorded_logits, recorded_routes])
def test_what_is_recorded_is_the_same(models, recorded):
    found = []
    for model in models:
        with torch.no_grad(), recorded(model) as seen:
            model(IDS)
        found.append(seen)
    assert found[0].keys() == found[1].keys()
    for path, expected in found[0].items():
        torch.testing.assert_close(found[1][path], expected)


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_gates_learn_as_before(models, kernel):
    with_kernel(kernel, *models)
    grads = []
    for model in models:
        for gate in gates(model):
            gate.requires_grad_()
        model(IDS).logits.square().mean().backward()
        grads.append([gate.weight.grad for gate in gates(model)])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_was_joined_in_inference_mode_can_be_trained(models):
    model, layer = models[1], routed_layers(models[1])[K]
    layer.stack.a = layer.stack.a.clone()
    with torch.inference_mode():
        model(IDS)
    assert layer.stack.a.data_ptr() != routed_layers(model)[Q].stack.a.data_ptr()
    for gate in gates(model):
        gate.requires_grad_()
    model(IDS).logits.square().mean().backward()
    assert gates(model)[0].weight.grad.any()


def test_generating_with_a_cache_equals_generating_without(models):
    plain, shared = models
    out = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use_cache)
        for model, use_cache in ((shared, True), (shared, False), (plain, True))
    ]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
def test_a_batch_equals_its_rows_one_by_one(models, kernel):
    with_kernel(kernel, models[1])
    with torch.no_grad():
        rows = torch.cat([models[1](row).logits for row in IDS.split(1)])
        torch.testing.assert_close(models[1](IDS).logits, rows, rtol=1e-5, atol=1e-5)


def test_it_decodes_through_one_graph(models):
    """Compiled, layers compute for themselves; they follow the gate of their point still."""
    decodes_through_one_graph(models[1])


def test_it_compiles_for_any_number_of_tokens(models):
    """Where a compiler takes all numbers for variables, also those of the options."""
    compiled = torch.compile(models[1], fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :4]):
            got, expected = (run(ids, use_cache=False).logits for run in (compiled, models[0]))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_checkpoint_shares_where_its_gates_decide_for_points(world, tmp_path):
    model = world.load()
    follows = follow(model)
    for share, expected in (("point", True), ("layer", False)):
        entry = dataclasses.replace(world.manifest.router, kind="gate", top_k=2, share=share)
        folder = tmp_path / share
        folder.mkdir()
        manifest = dataclasses.replace(world.manifest, router=entry)
        (folder / EXPERTS).hardlink_to(world.checkpoint / EXPERTS)
        (folder / MANIFEST).write_text(manifest.to_json())
        tensors.write_gates(folder / GATES, gates_of(model))
        loaded, _ = meteora.load(folder, base_folder=world.base)
        shared = {path for path, layer in routed_layers(loaded).items() if layer.shared is not None}
        assert shared == ({*follows, *follows.values()} if expected else set())
        equal(model, loaded)
        mapped, _ = meteora.load(folder, base_folder=world.base, expert_cache_bytes=1 << 20)
        # joined, what lies in the mapped file would be read
        assert all(layer.shared is None for layer in routed_layers(mapped).values())
        equal(model, mapped)
