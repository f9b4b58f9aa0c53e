"""Every twin equals the definition, for values and for gradients."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.kernels import dispatch, gather_grouped, reference
from meteora.kernels.dispatch import Sizes

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "twins.jsonl"
RANKS = st.lists(st.sampled_from([0, 1, 2, 3, 8, 17]), min_size=1, max_size=6)


def draw_layer(ranks, num_tokens, num_in, num_out, dtype=torch.float32, seed=0):
    """x, A, B and scaling of a made-up layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, a, b = draw(num_tokens, num_in), draw(sum(ranks), num_in), draw(num_out, sum(ranks))
    return x, a / num_in**0.5, b, draw(len(ranks)).abs().float()


def dense(x, a, b, ranks, scaling, weights, experts, **into):
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    index = owner, scaling[owner], len(ranks)
    return reference.lora_delta_dense(x, a, b, *index, weights, experts, **into)


def gather(x, a, b, ranks, scaling, weights, experts, **into):
    table, owned = gather_grouped.rank_table(ranks)
    index = table, scaling[:, None] * owned
    return gather_grouped.lora_delta_gather(x, a, b, *index, weights, experts, **into)


def grouped(x, a, b, ranks, scaling, weights, experts, **into):
    rest = ranks, scaling.tolist(), weights, experts
    return gather_grouped.lora_delta_grouped(x, a, b, *rest, **into)


TWINS = [pytest.param(twin, id=twin.__name__) for twin in (dense, gather, grouped)]


@pytest.mark.parametrize("twin", TWINS)
@settings(deadline=None, max_examples=60)
@given(
    ranks=RANKS,
    num_tokens=st.integers(0, 9),
    num_in=st.sampled_from([1, 5, 16]),
    num_out=st.sampled_from([1, 7, 16]),
    top_k=st.integers(1, 7),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_twins_equal_the_definition(
    twin, ranks, num_tokens, num_in, num_out, top_k, temperature, seed
):
    x, a, b, scaling = draw_layer(ranks, num_tokens, num_in, num_out, seed=seed)
    logits = torch.randn(num_tokens, len(ranks), generator=torch.Generator().manual_seed(seed))
    weights, experts = reference.route(logits, top_k, temperature)
    torch.testing.assert_close(
        twin(x, a, b, ranks, scaling, weights, experts),
        reference.lora_delta_loop(x, a, b, ranks, scaling, weights, experts),
        rtol=1e-4,
        atol=1e-5,
    )


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
    x, a, b, scaling = draw_layer(ranks, num_tokens, 24, num_out)
    weights, experts = reference.route(torch.randn(num_tokens, len(ranks)), 2)
    factors = x, a, b, ranks, scaling, weights, experts
    start = torch.randn(num_tokens, num_out)
    added = gather(*factors, add_to=start.clone())
    torch.testing.assert_close(
        added, start + reference.lora_delta_loop(*factors), rtol=1e-4, atol=1e-4
    )
    assert bool(used) == (sums == "sparse matmul" and torch.backends.mkl.is_available())


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_twins_lose_no_more_in_16_bits_than_a_bare_layer_does(twin, dtype):
    """Against float64: the error of Σ w·s·B(A x) stays near that of two plain 16-bit matmuls."""
    ranks = [8, 2, 0, 16]
    x, a, b, scaling = draw_layer(ranks, 64, 256, 128, dtype)
    weights, experts = reference.route(torch.randn(64, len(ranks)), 2)
    exact = reference.lora_delta_loop(
        x.double(), a.double(), b.double(), ranks, scaling, weights, experts
    )
    plain = (x @ a.T @ b.T - x.double() @ a.double().T @ b.double().T).norm()
    plain = plain / (x.double() @ a.double().T @ b.double().T).norm()
    got = twin(x, a, b, ranks, scaling, weights, experts)
    assert got.dtype == dtype
    assert (got - exact).norm() / exact.norm() <= 1.5 * plain


@pytest.mark.parametrize("twin", [pytest.param(reference.lora_delta_loop, id="loop"), *TWINS])
def test_gradients_are_right_for_gates_and_for_adapters(twin):
    ranks = [2, 0, 3]
    x, a, b, scaling = draw_layer(ranks, 4, 5, 6, torch.float64)
    logits = torch.tensor(
        [[0.3, -1.0, 2.0], [1.0, 0.5, -2.0], [-3.0, 0.1, 0.0], [0.2, 0.9, 0.4]], dtype=torch.float64
    )

    def delta(x, a, b, logits):
        weights, experts = reference.route(logits, 2, temperature=0.7)
        return twin(x, a, b, ranks, scaling, weights, experts)

    leaves = tuple(tensor.requires_grad_() for tensor in (x, a, b, logits))
    assert torch.autograd.gradcheck(delta, leaves)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("into", [torch.float64, torch.float32])
def test_tokens_of_one_task_are_grouped_where_they_lie(num_tokens, into):
    """All have the same two experts, in either order: no row is looked up, gradients are right."""
    ranks = [2, 0, 3, 1]
    x, a, b, scaling = draw_layer(ranks, num_tokens, 5, 6, torch.float64)
    experts = torch.tensor([[2, 0], [0, 2], [2, 0]])[:num_tokens]
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)[:num_tokens]
    before = torch.randn(num_tokens, 6).to(into)

    def added(x, a, b, weights):
        return grouped(x, a, b, ranks, scaling, weights, experts, add_to=before.clone())

    expected = before + reference.lora_delta_loop(x, a, b, ranks, scaling, weights, experts)
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
    table, owned = gather_grouped.rank_table([2, 0, 3])
    assert table.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert owned.tolist() == [[True, True, False], [False] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("tokens", "experts", "r", "dtype", "twin"),
    [
        (1, 4, 8, torch.float32, "grouped"),  # nothing to sort
        (64, 4, 8, torch.float32, "dense"),  # few experts: all of them are computed
        (256, 28, 8, torch.float32, "gather"),
        (256, 28, 64, torch.float32, "grouped"),  # large ranks, many tokens an expert
        (256, 512, 8, torch.float32, "gather"),
        (2048, 28, 16, torch.bfloat16, "grouped"),
    ],
)
def test_the_twin_is_chosen_as_the_table_says(tokens, experts, r, dtype, twin):
    sizes = Sizes(2048, 2048, experts, experts * r, r)
    assert dispatch.choose_twin(tokens, 2, sizes, dtype, "cpu") == twin


def test_the_docstring_of_the_choice_stars_what_is_chosen_and_tells_what_was_measured():
    """Every row of the table there: E × r, tokens, and three twins in 32 bits and in 16."""
    doc = dispatch.choose_twin.__doc__
    assert doc
    row = re.compile(r"^ +(\d+) × (\d+) +(\d+)((?: +[\d.]+\*?){6})$", re.MULTILINE)
    measured = {
        (row["dtype"], row["experts"], row["r"], row["tokens"]): row
        for row in map(json.loads, MEASURED.read_text().splitlines())
        if row["hidden"] == 2048
    }
    told = row.findall(doc)
    for num_experts, r, num_tokens, cells in told:
        columns, sizes = cells.split(), Sizes(2048, 2048, int(num_experts), 0, int(r))
        sizes = sizes._replace(num_ranks=sizes.num_experts * sizes.max_rank)
        for dtype, found in (("float32", columns[:3]), ("bfloat16", columns[3:])):
            costs = measured[dtype, int(num_experts), r, int(num_tokens)]
            chosen = dispatch.choose_twin(int(num_tokens), 2, sizes, getattr(torch, dtype), "cpu")
            for twin, cell in zip(("dense", "gather", "grouped"), found, strict=True):
                assert cell == f"{costs[twin]:.2f}" + "*" * (twin == chosen)
    assert len(told) == 10


def test_tokens_of_one_task_are_grouped_where_others_are_not():
    sizes = Sizes(2048, 2048, 28, 28 * 8, 8)
    chosen = [dispatch.choose_twin(256, 2, sizes, torch.float32, "cpu", n) for n in (2, 28)]
    assert chosen == ["grouped", "gather"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_choice_loses_two_percent_at_most_where_it_was_measured(dtype):
    """Against the best twin of every setting: the mean, and no setting by more than a third."""
    losses = []
    for row in map(json.loads, MEASURED.read_text().splitlines()):
        if row["dtype"] == dtype:
            sizes = Sizes(row["hidden"], row["hidden"], row["experts"], row["R"], row["max_r"])
            chosen = dispatch.choose_twin(row["tokens"], 2, sizes, getattr(torch, dtype), "cpu")
            losses.append(row[chosen] / min(row[twin] for twin in ("dense", "gather", "grouped")))
    assert len(losses) == 270
    assert fmean(losses) <= 1.02
    assert max(losses) <= 1.34


@pytest.mark.parametrize(
    ("tokens", "top_k", "device_type", "dtype", "twin"),
    [
        (1, 2, "cuda", torch.bfloat16, "gather_triton"),
        (256, 2, "cuda", torch.float32, "grouped_triton"),
        (256, 28, "cuda", torch.float32, "dense"),  # every rank is chosen
        (1, 2, "cuda", torch.float64, "dense"),
        (1, 2, "mps", torch.float16, "dense"),
    ],
)
def test_accelerators_never_wait_for_the_host(tokens, top_k, device_type, dtype, twin, monkeypatch):
    monkeypatch.setattr(gather_grouped, "has_triton", lambda: True)
    sizes = Sizes(2048, 2048, 28, 28 * 8, 8)
    assert dispatch.choose_twin(tokens, top_k, sizes, dtype, device_type) == twin
    monkeypatch.setattr(gather_grouped, "has_triton", lambda: False)
    assert dispatch.choose_twin(tokens, top_k, sizes, dtype, device_type) == "dense"


def test_an_expert_that_lacks_the_layer_adds_nothing_when_it_is_chosen():
    x, a, b, scaling = draw_layer([3, 0], 4, 5, 6)
    weights, experts = torch.ones(4, 1), torch.ones(4, 1, dtype=torch.long)
    for twin in (reference.lora_delta_loop, dense, gather, grouped):
        assert not twin(x, a, b, [3, 0], scaling, weights, experts).any()


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_twins_add_in_place_to_what_is_there(twin, into, monkeypatch):
    """More tokens than rows at once, and an output that is narrower than the experts."""
    monkeypatch.setattr(gather_grouped, "ROWS_AT_ONCE", 4)
    ranks = [3, 0, 5]
    x, a, b, scaling = draw_layer(ranks, 11, 6, 7)
    weights, experts = reference.route(torch.randn(11, 3), 2)
    before = torch.randn(11, 7).to(into)
    after = before.clone()
    assert twin(x, a, b, ranks, scaling, weights, experts, add_to=after) is after
    expected = before + reference.lora_delta_loop(x, a, b, ranks, scaling, weights, experts)
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
