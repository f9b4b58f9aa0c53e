"""Routers against the plain, dense formula of each."""

import copy
from typing import get_args

import pytest
import torch

from meteora.artifacts import MeteoraError, RouterOptions, Unfitted
from meteora.kernels.stack import Choice, ExpertStack, mean_of_all, own_choices
from meteora.model.fused import make_router
from meteora.routing.gates import Sharing, UndecidedError
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import Arrow, Decision, Fixed, Follower, Gate, Norm

RANKS = [4, 0, 1, 9]
NUM_IN, NUM_OUT = 12, 7
SCALING = torch.tensor([2.0, 0.0, 0.5, 1.5])
OPTIONS = RouterOptions("gate", top_k=1, temperature=1.0)


def stack_of(a, b):
    return ExpertStack(a, b, RANKS, SCALING.tolist())


@pytest.fixture
def factors():
    return torch.randn(sum(RANKS), NUM_IN), torch.randn(NUM_OUT, sum(RANKS))


def products(a, b):
    """B_e A_e of each expert, [OUT, IN]."""
    return [
        own_b.double() @ own_a.double()
        for own_a, own_b in zip(a.split(RANKS), b.split(RANKS, dim=1), strict=True)
    ]


def test_arrow_takes_the_top_right_singular_vector_of_the_dense_product(factors):
    x = torch.randn(5, NUM_IN)
    got = Arrow(stack_of(*factors), OPTIONS)(x)
    for e, product in enumerate(products(*factors)):
        if RANKS[e]:
            direction = torch.linalg.svd(product).Vh[0]
            expected = (x.double() @ direction).abs().float()
            torch.testing.assert_close(got[:, e], expected, rtol=1e-5, atol=1e-5)
        else:
            assert not got[:, e].any()


def test_arrow_gives_an_expert_that_does_nothing_no_direction():
    a, b = torch.randn(2, NUM_IN), torch.zeros(NUM_OUT, 2)
    assert not Arrow(ExpertStack(a, b, [2], [1.0]), OPTIONS)(torch.randn(5, NUM_IN)).any()


@pytest.mark.parametrize("kind", [Arrow, Norm])
def test_numbers_whose_products_overflow_are_a_sentence(factors, kind):
    """A stranger's checkpoint may hold the largest numbers of its dtype."""
    a, b = factors
    with pytest.raises(MeteoraError, match="so large that their products overflow"):
        kind(stack_of(a * 1e37, b * 1e37), OPTIONS)


def test_norm_is_the_length_of_what_the_expert_would_add(factors):
    x = torch.randn(5, NUM_IN)
    got = Norm(stack_of(*factors), OPTIONS)(x)
    for e, product in enumerate(products(*factors)):
        expected = SCALING[e].double() * (x.double() @ product.T).norm(dim=-1)
        torch.testing.assert_close(got[:, e], expected.float(), rtol=1e-5, atol=1e-5)


def test_norm_and_arrow_compute_in_float32_where_adapters_are_narrow(factors):
    a, b = (tensor.bfloat16() for tensor in factors)
    x = torch.randn(5, NUM_IN)
    for router in (Norm(stack_of(a, b), OPTIONS), Arrow(stack_of(a, b), OPTIONS)):
        assert router(x.bfloat16()).dtype == torch.float32


def test_fixed_gives_its_weights_back_through_route():
    given = torch.tensor([0.0, 0.25, 0.75])
    router = Fixed(given)
    weights, experts = router.choose(torch.randn(2, 4))
    torch.testing.assert_close(torch.zeros(2, 3).scatter(1, experts, weights), given.expand(2, 3))


def test_fixed_on_one_expert_is_weight_one_exactly():
    router = Fixed(torch.tensor([0.0, 1.0]))
    weights, experts = router.choose(torch.randn(2, 4))
    assert weights.tolist() == [[1.0], [1.0]]
    assert experts.tolist() == [[1], [1]]


@pytest.mark.parametrize("kind", [*get_args(Unfitted), "random"])
def test_a_choice_of_several_experts_is_taken_by_gates_alone(factors, kind):
    choices = [*own_choices(RANKS), mean_of_all(RANKS)]
    stack = ExpertStack(*factors, RANKS, SCALING.tolist(), choices)
    router = make_router(RouterOptions(kind, 4, 1.0), RoutedExperts(stack))
    weights, experts = router.choose(torch.randn(50, NUM_IN))
    taken = torch.zeros(50, 5).scatter(1, experts, weights)
    assert not taken[:, 4].any()
    torch.testing.assert_close(taken.sum(1), torch.ones(50))
    if isinstance(router, Norm):  # nor does it cost a matmul as large as that of all experts
        assert len(router.folded) == len(Norm(stack_of(*factors), OPTIONS).folded)


@pytest.mark.parametrize("kind", [Arrow, Norm])
def test_scores_without_the_mean_can_be_learnt_through(factors, kind):
    choices = [*own_choices(RANKS), mean_of_all(RANKS)]
    x = torch.randn(5, NUM_IN, requires_grad=True)
    scores = kind(ExpertStack(*factors, RANKS, SCALING.tolist(), choices), OPTIONS)(x)
    scores[:, :4].sum().backward()
    assert x.grad is not None
    assert x.grad.all()


@pytest.mark.parametrize("kind", ["arrow", "norm"])
def test_an_expert_that_lacks_the_layer_takes_no_weight_from_the_others(factors, kind):
    stack = stack_of(*factors)
    router = make_router(RouterOptions(kind, 4, 1.0), RoutedExperts(stack))
    x = torch.randn(50, NUM_IN)
    weights, experts = router.choose(x)
    taken = torch.zeros(50, 4).scatter(1, experts, weights)
    assert not taken[:, RANKS.index(0)].any()
    scored = router(x)[:, [0, 2, 3]]
    torch.testing.assert_close(taken[:, [0, 2, 3]], scored.softmax(1))


@pytest.mark.parametrize("kind", ["arrow", "norm"])
def test_where_all_experts_lack_the_layer_weights_are_finite(kind):
    stack = ExpertStack(torch.zeros(0, NUM_IN), torch.zeros(NUM_OUT, 0), [0, 0], [0.0, 0.0])
    router = make_router(RouterOptions(kind, 2, 1.0), RoutedExperts(stack))
    assert router.choose(torch.randn(5, NUM_IN))[0].isfinite().all()


@pytest.mark.parametrize("kind", ["arrow", "norm", "uniform", "random"])
def test_the_mean_of_a_single_expert_is_taken_by_gates_alone(kind):
    choices = [*own_choices([2]), mean_of_all([2]), Choice(0, 0)]
    a, b = torch.randn(2, NUM_IN), torch.randn(NUM_OUT, 2)
    stack = ExpertStack(a, b, [2], [1.0], choices)
    router = make_router(RouterOptions(kind, 3, 1.0), RoutedExperts(stack))
    weights, experts = router.choose(torch.randn(5, NUM_IN))
    taken = torch.zeros(5, 3).scatter(1, experts, weights)
    assert not taken[:, 1].any()
    if kind == "uniform":
        torch.testing.assert_close(taken[:, ::2], torch.full((5, 2), 0.5))


def test_norms_that_are_large_stay_apart_in_16_bits(factors):
    """Their squares would all be infinite."""
    norm = Norm(stack_of(*factors), OPTIONS)
    x = 100 * torch.randn(5, NUM_IN)
    expected = norm(x).argmax(-1)
    assert torch.equal(norm.half()(x.half()).argmax(-1), expected)


def test_gate_is_linear_and_the_only_router_that_learns(factors):
    weight, bias, x = torch.randn(4, NUM_IN), torch.randn(4), torch.randn(5, NUM_IN)
    gate = Gate(weight, bias, OPTIONS)
    torch.testing.assert_close(gate(x), x @ weight.T + bias)
    assert {name for name, _ in gate.named_parameters()} == {"weight", "bias"}
    for router in (
        Arrow(stack_of(*factors), OPTIONS),
        Norm(stack_of(*factors), OPTIONS),
        Fixed(torch.ones(1)),
    ):
        assert not list(router.parameters())


def test_a_follower_repeats_what_its_gate_decided_and_refuses_other_tokens():
    decision = Decision()
    gate = Gate(
        torch.randn(4, NUM_IN),
        torch.zeros(4),
        RouterOptions("gate", 2, 1.0, margin=0.5),
        decision=decision,
    )
    follower = Follower(decision, 4, RouterOptions("gate", 2, 1.0, margin=0.5))
    tokens = torch.randn(5, NUM_IN)
    with pytest.raises(RuntimeError, match="5 tokens follows a gate that saw 0"):
        follower(torch.randn(5, 3))
    for decided, repeated in zip(
        gate.choose(tokens), follower.choose(torch.randn(5, 3)), strict=True
    ):
        assert torch.equal(decided, repeated)
    with pytest.raises(RuntimeError, match="6 tokens follows a gate that saw 5"):
        follower(torch.randn(6, 3))


def test_what_a_gate_decided_with_a_gradient_is_left_out_of_a_copy():
    """Torch copies no tensor that has a history, and every forward pass for training has them."""
    decision = Decision()
    gate = Gate(torch.randn(4, NUM_IN), torch.zeros(4), OPTIONS, decision=decision)
    tokens = torch.randn(5, NUM_IN, requires_grad=True)
    gate.choose(tokens)
    leader, follower = copy.deepcopy((gate, Follower(decision, 4, OPTIONS)))
    with pytest.raises(RuntimeError, match="5 tokens follows a gate that saw 0"):
        follower.choose(tokens)
    assert torch.equal(leader(tokens), follower(tokens))


def test_a_module_without_a_gate_needs_one_before_it():
    with pytest.raises(UndecidedError, match="no gate decides before it"):
        Sharing("token", 2).last("model.layers.0.self_attn.q_proj")
