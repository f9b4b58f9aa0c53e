"""Every kernel equals the definition, for values and for gradients."""

import copy
import json
import pickle
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.kernels import dispatch, gather_grouped, reference
from meteora.kernels.dispatch import IN_TORCH
from meteora.kernels.stack import ExpertStack, Sizes, mean_of_all, own_choices

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "twins.jsonl"
RANKS = st.lists(st.sampled_from([0, 1, 2, 3, 8, 17]), min_size=1, max_size=6)


def draw_layer(ranks, num_tokens, num_in, num_out, dtype=torch.float32, seed=0, *, mean=False):
    """Tokens and a stack; with `mean`, one more choice is the mean of all its experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, a, b = draw(num_tokens, num_in), draw(sum(ranks), num_in), draw(num_out, sum(ranks))
    scaling = draw(len(ranks)).abs().float().tolist()
    choices = own_choices(ranks)
    if mean:
        choices.append(mean_of_all(ranks))
    return x, ExpertStack(a / num_in**0.5, b, ranks, scaling, choices)


def in_double(stack):
    return copy.deepcopy(stack).double()


def with_factors(stack, a, b):
    """The same stack of another A and B, which may need gradients."""
    return ExpertStack(a, b, stack.ranks, stack.scaling, stack.choices)


dense = reference.lora_delta_dense
gather, grouped = gather_grouped.lora_delta_gather, gather_grouped.lora_delta_grouped
KERNELS = [pytest.param(kernel, id=name) for name, kernel in IN_TORCH.items()]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=60)
@given(
    ranks=RANKS,
    num_tokens=st.integers(0, 9),
    num_in=st.sampled_from([1, 5, 16]),
    num_out=st.sampled_from([1, 7, 16]),
    top_k=st.integers(1, 7),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
    mean=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kernels_equal_the_definition(
    kernel, ranks, num_tokens, num_in, num_out, top_k, temperature, mean, seed
):
    x, stack = draw_layer(ranks, num_tokens, num_in, num_out, seed=seed, mean=mean)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, stack.num_choices, generator=generator)
    weights, experts = reference.route(logits, top_k, temperature)
    torch.testing.assert_close(
        kernel(x, stack, weights, experts),
        reference.lora_delta_loop(x, stack, weights, experts),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_definition_is_the_sum_of_scaled_products_and_their_mean_is_a_choice():
    """Written out: every choice of every token by its own matrices."""
    ranks = [3, 0, 5]
    x, stack = draw_layer(ranks, 4, 6, 7, torch.float64, mean=True)
    parts = zip(stack.a.split(ranks), stack.b.split(ranks, dim=1), stack.scaling, strict=True)
    deltas = [scaling * b @ a for a, b, scaling in parts]
    deltas.append(sum(deltas) / len(ranks))
    weights, experts = reference.route(torch.randn(4, 4, dtype=torch.float64), 3)
    expected = torch.stack(
        [
            sum(w * deltas[c] @ token for w, c in zip(own, chosen, strict=True))
            for token, own, chosen in zip(x, weights, experts.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(reference.lora_delta_loop(x, stack, weights, experts), expected)


def test_a_choice_scales_the_ranks_that_it_holds_and_no_others():
    _, stack = draw_layer([2, 0, 3], 1, 4, 4, mean=True)
    one, none, other = stack.scaling
    assert none > 0  # an expert without ranks has a scaling all the same
    rows = torch.tensor([[one] * 2 + [0] * 3, [0] * 5, [0] * 2 + [other] * 3])
    assert torch.equal(stack.choice_scaling()[:3], rows)
    torch.testing.assert_close(stack.choice_scaling()[3], rows.sum(0) / 3)


@pytest.mark.parametrize("mean", [False, True])
def test_a_stack_keeps_its_scaling_exact_when_it_moves_or_is_sent(mean):
    _, stack = draw_layer([2, 0, 3], 1, 4, 4, mean=mean)
    moved = pickle.loads(pickle.dumps(copy.deepcopy(stack).bfloat16()))  # noqa: S301
    assert moved.a.dtype == moved.b.dtype == torch.bfloat16
    for name in ("rank_scaling", "factors", "segments"):
        assert torch.equal(getattr(moved, name), getattr(stack, name))
    assert torch.equal(moved.choice_scaling(), stack.choice_scaling())
    for got, expected in zip(moved.rank_table(), stack.rank_table(), strict=True):
        assert torch.equal(got, expected)
    assert not stack.state_dict()


def test_a_mapped_stack_stays_where_and_as_it_lies():
    a, b = torch.randn(5, 4), torch.randn(4, 5)
    stack = ExpertStack(a, b, [2, 3], [1.0, 2.0], mapped=True).double()
    assert stack.a is a
    assert stack.b is b


@pytest.mark.parametrize("sums", ["sparse matmul", "embedding bags"])
@pytest.mark.parametrize("ranks", [[8] * 28, [4, 0, 16, 3] * 7, [2, 5]])
@pytest.mark.parametrize("num_tokens", [65, 600])
def test_gather_equals_the_definition_where_tokens_and_rows_are_many(
    monkeypatch, sums, ranks, num_tokens
):
    used = []

    def make(*args, found=torch.sparse_csr_tensor, **kwargs):
        used.append(args)
        return found(*args, **kwargs)

    num_out, most = (2048, 0) if sums == "sparse matmul" else (512, 1 << 30)
    monkeypatch.setattr(gather_grouped, "SPARSE_NUMBERS", most)
    monkeypatch.setattr(gather_grouped, "NEAR_BYTES", 0)  # rows are read in their order
    monkeypatch.setattr(torch, "sparse_csr_tensor", make)
    x, stack = draw_layer(ranks, num_tokens, 24, num_out)
    factors = x, stack, *reference.route(torch.randn(num_tokens, len(ranks)), 2)
    start = torch.randn(num_tokens, num_out)
    added = gather(*factors, add_to=start.clone())
    torch.testing.assert_close(
        added, start + reference.lora_delta_loop(*factors), rtol=1e-4, atol=1e-4
    )
    assert bool(used) == (sums == "sparse matmul" and torch.backends.mkl.is_available())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [False, True])
def test_kernels_lose_no_more_in_16_bits_than_a_bare_layer_does(kernel, dtype, mean):
    """Against float64: the error of Σ w·s·B(A x) stays near that of two plain 16-bit matmuls."""
    ranks = [8, 2, 0, 16]
    x, stack = draw_layer(ranks, 64, 256, 128, dtype, mean=mean)
    a, b = stack.a, stack.b
    weights, experts = reference.route(torch.randn(64, stack.num_choices), 2)
    exact = reference.lora_delta_loop(x.double(), in_double(stack), weights, experts)
    plain = (x @ a.T @ b.T - x.double() @ a.double().T @ b.double().T).norm()
    plain = plain / (x.double() @ a.double().T @ b.double().T).norm()
    got = kernel(x, stack, weights, experts)
    assert got.dtype == dtype
    assert (got - exact).norm() / exact.norm() <= 1.5 * plain


@pytest.mark.parametrize("kernel", [pytest.param(reference.lora_delta_loop, id="loop"), *KERNELS])
@pytest.mark.parametrize("mean", [False, True])
def test_gradients_are_right_for_gates_and_for_adapters(kernel, mean):
    x, stack = draw_layer([2, 0, 3], 4, 5, 6, torch.float64, mean=mean)
    logits = torch.tensor(
        [
            [0.3, -1.0, 2.0, 1.7],
            [1.0, 0.5, -2.0, 1.4],
            [-3.0, 0.1, 0.0, 2.0],
            [0.2, 0.9, 0.4, -1.0],
        ],
        dtype=torch.float64,
    )[:, : stack.num_choices]

    def delta(x, a, b, logits):
        weights, experts = reference.route(logits, 2, temperature=0.7)
        return kernel(x, with_factors(stack, a, b), weights, experts)

    leaves = tuple(tensor.requires_grad_() for tensor in (x, stack.a, stack.b, logits))
    assert torch.autograd.gradcheck(delta, leaves)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("into", [torch.float64, torch.float32])
def test_tokens_of_one_task_are_grouped_where_they_lie(num_tokens, into):
    """All have the same two experts, in either order: no row is looked up, gradients are right."""
    ranks = [2, 0, 3, 1]
    x, stack = draw_layer(ranks, num_tokens, 5, 6, torch.float64)
    experts = torch.tensor([[2, 0], [0, 2], [2, 0]])[:num_tokens]
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)[:num_tokens]
    before = torch.randn(num_tokens, 6).to(into)

    def added(x, a, b, weights):
        return grouped(x, with_factors(stack, a, b), weights, experts, add_to=before.clone())

    a, b = stack.a, stack.b
    expected = before + reference.lora_delta_loop(x, stack, weights, experts)
    torch.testing.assert_close(added(x, a, b, weights), expected.to(into))
    if into == x.dtype:
        for leaves in ((x, a, b), (x, a, b, weights)):
            for leaf in leaves:
                leaf.requires_grad_()
            assert torch.autograd.gradcheck(added, (x, a, b, weights))


@given(top_k=st.integers(1, 9), num_experts=st.integers(1, 6), temperature=st.floats(0.01, 100.0))
@settings(deadline=None, max_examples=50)
def test_route_weighs_the_largest_logits_and_sums_to_one(top_k, num_experts, temperature):
    logits = torch.randn(5, num_experts, generator=torch.Generator().manual_seed(top_k))
    weights, experts = reference.route(logits, top_k, temperature)
    k = min(top_k, num_experts)
    assert weights.shape == experts.shape == (5, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    least_chosen = logits.gather(1, experts).min(-1).values
    others = logits.scatter(1, experts, -torch.inf).max(-1).values
    assert (least_chosen >= others).all()


def test_route_takes_the_softmax_in_float32_where_logits_are_narrow():
    weights, _ = reference.route(torch.tensor([[0.1, 0.2]], dtype=torch.bfloat16), 2)
    assert weights.dtype == torch.float32


def test_the_rank_table_names_each_experts_ranks_and_fills_up_with_the_first():
    stack = ExpertStack(torch.ones(5, 4), torch.ones(4, 5), [2, 0, 3], [2.0, 1.0, 0.5])
    index, scaling = stack.rank_table()
    assert index.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert scaling.tolist() == [[2.0, 2.0, 0.0], [0.0] * 3, [0.5] * 3]


@pytest.mark.parametrize(
    ("tokens", "experts", "r", "dtype", "kernel"),
    [
        (1, 4, 8, torch.float32, "grouped"),  # nothing to sort
        (64, 4, 8, torch.float32, "dense"),  # few experts: all of them are computed
        (256, 28, 8, torch.float32, "gather"),
        (256, 28, 64, torch.float32, "grouped"),  # large ranks, many tokens an expert
        (256, 512, 8, torch.float32, "gather"),
        (2048, 28, 16, torch.bfloat16, "grouped"),
    ],
)
def test_the_kernel_is_chosen_as_the_table_says(tokens, experts, r, dtype, kernel):
    sizes = Sizes(2048, 2048, experts, experts * r, r, r)
    assert dispatch.choose_kernel(tokens, 2, sizes, dtype, "cpu") == kernel


def test_a_graph_is_left_only_if_that_saves_more_than_the_call_costs():
    """q, k and v of fourteen small experts, as vLLM joins them; and of many."""
    for sizes, alone, within in (
        (Sizes(576, 960, 15, 214, 48, 214), "grouped", "dense"),
        (Sizes(2048, 2048, 512, 512 * 8, 8, 8), "gather", "gather"),
    ):
        asked = 64, 1, sizes, torch.float32, "cpu"
        assert dispatch.choose_kernel(*asked) == alone
        assert dispatch.choose_kernel(*asked, in_graph=True) == within


def test_tokens_of_one_task_are_grouped_where_others_are_not():
    sizes = Sizes(2048, 2048, 28, 28 * 8, 8, 8)
    chosen = [dispatch.choose_kernel(256, 2, sizes, torch.float32, "cpu", n) for n in (2, 28)]
    assert chosen == ["grouped", "gather"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_choice_loses_two_percent_at_most_where_it_was_measured(dtype):
    """Against the best kernel of every setting: the mean, and no setting by more than a third."""
    losses = []
    for row in map(json.loads, MEASURED.read_text().splitlines()):
        if row["dtype"] == dtype:
            sizes = Sizes(
                *(row[key] for key in ("hidden", "hidden", "experts", "R", "max_r", "max_r"))
            )
            chosen = dispatch.choose_kernel(row["tokens"], 2, sizes, getattr(torch, dtype), "cpu")
            losses.append(
                row[chosen] / min(row[kernel] for kernel in ("dense", "gather", "grouped"))
            )
    assert len(losses) == 270
    assert fmean(losses) <= 1.02
    assert max(losses) <= 1.34


@pytest.mark.parametrize(
    ("tokens", "top_k", "device_type", "dtype", "kernel"),
    [
        (1, 2, "cuda", torch.bfloat16, "gather_triton"),
        (256, 2, "cuda", torch.float32, "grouped_triton"),
        (256, 28, "cuda", torch.float32, "dense"),  # every rank is chosen
        (1, 2, "cuda", torch.float64, "dense"),
        (1, 2, "mps", torch.float16, "dense"),
    ],
)
def test_accelerators_never_wait_for_the_host(
    tokens, top_k, device_type, dtype, kernel, monkeypatch
):
    monkeypatch.setattr(gather_grouped, "has_triton", lambda: True)
    sizes = Sizes(2048, 2048, 28, 28 * 8, 8, 8)
    assert dispatch.choose_kernel(tokens, top_k, sizes, dtype, device_type) == kernel
    monkeypatch.setattr(gather_grouped, "has_triton", lambda: False)
    assert dispatch.choose_kernel(tokens, top_k, sizes, dtype, device_type) == "dense"


@pytest.mark.parametrize(("tokens", "kernel"), [(1, "gather_triton"), (256, "grouped_triton")])
def test_a_mean_of_all_experts_does_not_make_gpus_compute_all(tokens, kernel, monkeypatch):
    """It is for openings: the tokens behind them choose single experts."""
    monkeypatch.setattr(gather_grouped, "has_triton", lambda: True)
    sizes = draw_layer([8] * 28, 1, 64, 64, mean=True)[1].sizes
    assert sizes.max_width == sizes.num_ranks
    assert dispatch.choose_kernel(tokens, 2, sizes, torch.bfloat16, "cuda") == kernel


def test_an_expert_that_lacks_the_layer_adds_nothing_when_it_is_chosen():
    x, stack = draw_layer([3, 0], 4, 5, 6)
    weights, experts = torch.ones(4, 1), torch.ones(4, 1, dtype=torch.long)
    for kernel in (reference.lora_delta_loop, dense, gather, grouped):
        assert not kernel(x, stack, weights, experts).any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [False, True])
def test_kernels_add_in_place_to_what_is_there(kernel, mean, into, monkeypatch):
    """More tokens than rows at once, and an output that is narrower than the experts."""
    monkeypatch.setattr(gather_grouped, "ROWS_AT_ONCE", 4)
    x, stack = draw_layer([3, 0, 5], 11, 6, 7, mean=mean)
    weights, experts = reference.route(torch.randn(11, stack.num_choices), 2)
    before = torch.randn(11, 7).to(into)
    after = before.clone()
    assert kernel(x, stack, weights, experts, add_to=after) is after
    expected = before + reference.lora_delta_loop(x, stack, weights, experts)
    torch.testing.assert_close(
        after,
        expected.to(into),
        rtol=2e-2 if into != x.dtype else 1e-5,
        atol=1e-2 if into != x.dtype else 1e-5,
    )


def test_a_margin_leaves_out_the_experts_that_are_further_behind():
    logits = torch.tensor([[3.0, 1.0, 2.5, -9.0], [3.0, 2.9, 2.8, -9.0], [4.0, 1.0, 2.0, 0.0]])
    weights, experts = reference.route(logits, 3, temperature=2.0, margin=0.6)
    shares = torch.zeros_like(logits).scatter(1, experts, weights)
    for row, kept in enumerate([[0, 2], [0, 1, 2], [0]]):
        expected = torch.zeros(4)
        expected[kept] = torch.softmax(logits[row, kept] / 2.0, -1)
        torch.testing.assert_close(shares[row], expected)
