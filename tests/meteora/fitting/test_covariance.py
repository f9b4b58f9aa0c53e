"""Two forms of one covariance: second moments are the definition, rows of tokens their twin."""

import pytest
import torch

from meteora.fitting import covariance
from meteora.fitting.covariance import RowScatter, Scatter, add_by_label
from meteora.fitting.lda import SHRINKAGES, SingularError, choose_shrinkage, gate_from
from meteora.fitting.logistic import Tokens
from meteora.fitting.sequences import sample

E = 3
FORMS = [Scatter, RowScatter]


def draw(num_tokens, num_inputs, common_mean=0.0):
    """Tokens of three experts, a few directions of large variance, one input of huge values."""
    x = torch.randn(num_tokens, num_inputs) @ torch.diag(torch.logspace(1, -2, num_inputs))
    x[:, 3] *= 300  # as the massive activations of real models
    labels = torch.randint(E, (num_tokens,))
    x += torch.randn(E, num_inputs)[labels] + common_mean
    return x, labels, torch.tensor([0.5, 1.0, 2.0])[labels]


def scatter_of(form, x, labels, weights, batch=37, **asked):
    scatter = form.empty(E, x[:batch].mean(0))
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        rest = {name: value[part] for name, value in asked.items()}
        scatter.add(x[part], labels[part], weights[part], **rest)
    return scatter


def logits(gate, x):
    """Less what is common to all experts, which no route sees."""
    weight, bias = gate
    found = x.double() @ weight.double().T + bias.double()
    return found - found.mean(-1, keepdim=True)


@pytest.mark.parametrize("shape", [(), (7,)])
def test_sums_by_a_matrix_are_those_by_an_index(shape):
    labels, rows = torch.randint(E, (50,)), torch.randn(50, *shape, dtype=torch.float64)
    one, other = torch.ones(2, E, *shape, dtype=torch.float64)
    add_by_label(one, labels, rows, index=True)
    add_by_label(other, labels, rows, index=False)
    torch.testing.assert_close(one, other)
    assert one[1].sum() == pytest.approx((rows[labels == 1].sum() + one[1].numel()).item())


def test_second_moments_are_those_of_all_tokens_whatever_the_blocks(monkeypatch):
    x, labels, weights = draw(80, 30)
    monkeypatch.setattr(covariance, "BLOCK", 7)
    found = scatter_of(Scatter, x, labels, weights).within
    # the tokens of an expert have one weight
    means = torch.stack([x[labels == e].double().mean(0) for e in range(E)])
    shares = weights.double() / weights.double().sum()
    centred = (x.double() - means[labels]) * shares.sqrt()[:, None]
    torch.testing.assert_close(found, centred.T @ centred, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("common_mean", [0.0, 100.0])
@pytest.mark.parametrize(("tokens", "inputs"), [(50, 200), (200, 50), (120, 120)])
def test_rows_give_the_gate_that_second_moments_give(tokens, inputs, common_mean, shrinkage):
    drawn = draw(tokens, inputs, common_mean)
    expected = logits(gate_from(scatter_of(Scatter, *drawn), shrinkage), drawn[0])
    got = logits(gate_from(scatter_of(RowScatter, *drawn), shrinkage), drawn[0])
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_rows_choose_the_shrinkage_that_second_moments_choose():
    drawn, held = draw(60, 150), Tokens(*draw(400, 150))
    expected = choose_shrinkage(scatter_of(Scatter, *drawn), held.accuracy)
    got = choose_shrinkage(scatter_of(RowScatter, *drawn), held.accuracy)
    assert got[:2] == pytest.approx(expected[:2], abs=0.01)


def test_rows_invert_the_covariance_that_they_stand_for():
    """S⁻¹ S is the identity in float64, for directions inside and outside of the tokens' span."""
    scatter = scatter_of(RowScatter, *draw(40, 90))
    covariance = scatter.covariance()
    rows, identity = covariance.rows.double(), torch.eye(90, dtype=torch.float64)
    for shrinkage in SHRINKAGES:
        shrunk = (1 - shrinkage) * rows.T @ rows + shrinkage * covariance.level * identity
        torch.testing.assert_close(covariance.solve(shrunk, shrinkage), identity)


@pytest.mark.parametrize("form", FORMS)
def test_parts_add_up_to_the_whole(form):
    x, labels, weights = draw(80, 30)
    whole = scatter_of(form, x, labels, weights)
    parts = [form.empty(E, whole.shift) for _ in range(2)]
    for part, chosen in zip(parts, (slice(0, 30), slice(30, None)), strict=True):
        part.add(x[chosen], labels[chosen], weights[chosen])
    both = parts[0] + parts[1]
    torch.testing.assert_close(both.mass, whole.mass)
    got, expected = gate_from(both, 0.1), gate_from(whole, 0.1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_means_are_those_of_all_tokens_though_a_sample_tells_the_spread():
    x, labels, weights = draw(600, 20)
    stands_for = sample(labels, E, 90)
    some = scatter_of(RowScatter, x, labels, weights, stands_for=stands_for)
    whole = scatter_of(RowScatter, x, labels, weights)
    assert sum(len(rows) for rows, _, _ in some.parts) == 90
    torch.testing.assert_close(some.means, whole.means)
    expected = whole.covariance().level
    assert abs(some.covariance().level - expected) < 0.3 * expected


@pytest.mark.parametrize("form", FORMS)
def test_equal_inputs_give_equal_bytes(form):
    drawn = draw(60, 90)
    one, other = (gate_from(scatter_of(form, *drawn), 0.01) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_infinite_inputs_are_refused(form):
    x, labels, weights = draw(20, 40)
    x[3, 2] = torch.inf
    with pytest.raises(SingularError, match="NaN or infinity"):
        gate_from(scatter_of(form, x, labels, weights), 0.1)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_without_variance_give_a_gate_that_does_not_poison(form):
    weight, bias = gate_from(
        scatter_of(form, torch.ones(6, 40), torch.arange(6) % E, torch.ones(6)), 0.01
    )
    assert weight.isfinite().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        pytest.param([5, 5, 5], 100, [5, 5, 5], id="all-where-they-fit"),
        pytest.param([100, 100, 100], 30, [10, 10, 10], id="the-same-of-each"),
        pytest.param([4, 100, 100], 30, [4, 13, 13], id="others-take-what-one-leaves"),
        pytest.param([100, 0, 2], 10, [8, 0, 2], id="an-expert-without-tokens"),
        pytest.param([9, 9, 9], 1, [1, 1, 1], id="one-at-the-least"),
    ],
)
def test_a_sample_is_shared_out_evenly(counts, limit, expected):
    labels = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    stands_for = sample(labels, E, limit)
    assert torch.bincount(labels[stands_for > 0], minlength=E).tolist() == expected
    for e, count in enumerate(counts):  # the taken tokens stand for all of their expert's
        assert stands_for[labels == e].sum() == pytest.approx(count)


def test_a_sample_lies_at_even_distances():
    stands_for = sample(torch.zeros(1000, dtype=torch.long), 1, 100)
    gaps = stands_for.nonzero()[:, 0].diff()
    assert gaps.tolist() == [10] * 99
