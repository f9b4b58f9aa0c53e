"""Logistic regression from the closed form, against gradient descent on the same loss."""

import pytest
import torch

from meteora.fitting.covariance import Scatter
from meteora.fitting.lda import gate_from
from meteora.fitting.logistic import PULL, SCALES, Tokens, Whitening, refine, scaled, search
from meteora.fitting.statistics import PointStatistics

E, IN = 3, 12


def world(count=900, seed=0):
    """Tokens of three experts. Two differ where the third varies widely, as no shared covariance
    tells."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % E
    x = torch.randn(count, IN, generator=generator)
    sides = labels.float() * 2 - 1
    wide = torch.where(labels == 2, 10 * x[:, 5], 0.3 * x[:, 5] + sides)
    x = torch.cat([x[:, :5], wide[:, None], x[:, 6:]], dim=1)
    x[:, 6] += sides / 2
    x[labels == 2, 0] += 6
    return Tokens(x + 3, labels, torch.full((count,), 1 / count))


def closed_form(tokens, shrinkage=0.01):
    scatter = Scatter.empty(E, tokens.x.mean(0))
    scatter.add(*tokens)
    return *gate_from(scatter, shrinkage), PointStatistics.of(scatter, shrinkage), scatter


def loss_of(tokens, weight, bias, start, within):
    logits = tokens.x.double() @ weight.T + bias
    entropy = torch.nn.functional.cross_entropy(logits, tokens.labels, reduction="none")
    change = weight - start
    return (entropy * tokens.weights).sum() + PULL * ((change @ within) * change).sum()


def test_whitened_tokens_vary_alike_in_all_directions(monkeypatch):
    monkeypatch.setattr("meteora.fitting.statistics.RIDGES", 0.0)
    _, _, statistics, scatter = closed_form(world())
    shrunk = 0.99 * scatter.within + 0.01 * scatter.within.diagonal().mean() * torch.eye(IN)
    whiten = Whitening(statistics)
    square = whiten(whiten(torch.eye(IN)))
    torch.testing.assert_close(square @ shrunk.float(), torch.eye(IN), atol=5e-3, rtol=0)


def test_a_search_finds_the_least_loss_that_gradient_descent_finds():
    tokens = world()
    weight, bias, statistics, scatter = closed_form(tokens)
    shrunk = 0.99 * scatter.within + 0.01 * scatter.within.diagonal().mean() * torch.eye(IN)
    taken = tokens._replace(x=tokens.x.clone())
    refined = search(weight, bias, taken, Whitening(statistics), 200)
    found = loss_of(tokens, *(part.double() for part in refined), weight.double(), shrunk)
    free = [part.double().clone().requires_grad_() for part in (weight, bias)]
    optimiser = torch.optim.LBFGS(free, max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = loss_of(tokens, *free, weight.double(), shrunk)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert found < loss_of(tokens, *free, weight.double(), shrunk) + 1e-3
    assert found < 0.5 * loss_of(tokens, weight.double(), bias.double(), weight.double(), shrunk)


def test_a_refined_gate_is_right_on_unseen_tokens_where_the_closed_form_is_not():
    tokens, unseen = world(), world(seed=1)
    weight, bias, statistics, _ = closed_form(tokens)
    before = unseen.accuracy(weight, bias)
    assert unseen.accuracy(*refine(weight, bias, tokens, statistics)) > before + 0.02


def test_inputs_without_variance_stay_finite():
    tokens = Tokens(torch.ones(6, 4), torch.arange(6) % E, torch.full((6,), 1 / 6))
    weight, bias, statistics, _ = closed_form(tokens)
    assert all(part.isfinite().all() for part in refine(weight, bias, tokens, statistics))


@pytest.mark.parametrize("stands_for", [[1, 0, 2], [0, 3, 0]])
def test_a_sample_has_the_weight_of_the_tokens_that_it_stands_for(stands_for):
    tokens = Tokens(torch.eye(3), torch.arange(3), torch.tensor([0.1, 0.2, 0.3]))
    found = tokens.sampled(torch.tensor(stands_for).float())
    kept = [i for i, count in enumerate(stands_for) if count]
    assert found.labels.tolist() == kept
    expected = [tokens.weights[i].item() * stands_for[i] for i in kept]
    assert found.weights.tolist() == pytest.approx(expected)


def test_a_gate_that_is_too_sure_is_scaled_down_and_its_choices_stay():
    tokens = world()
    weight, bias, *_ = closed_form(tokens)
    found = scaled(20 * weight, 20 * bias, tokens)
    factor = found[1] / (20 * bias)
    torch.testing.assert_close(factor, factor[:1].expand(E))
    assert factor[0] == min(SCALES)
    assert tokens.accuracy(*found) == tokens.accuracy(weight, bias)
    rows = scaled(20 * weight, 20 * bias, tokens, slice(1, 2))
    for before, after in zip((20 * weight, 20 * bias), rows, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_rounds_with_few_of_the_sure_tokens_end_where_a_search_on_all_does():
    tokens, unseen = world(4000), world(seed=1)
    weight, bias, statistics, _ = closed_form(tokens)
    uncertain = tokens.uncertain(weight, bias)
    assert len(uncertain.x) < 0.8 * len(tokens.x)
    assert uncertain.weights.sum() == pytest.approx(tokens.weights.sum().item(), rel=0.02)

    def mean_loss(gate):
        return unseen.losses(unseen.x @ gate[0].T + gate[1]).mean().item()

    in_rounds = refine(weight, bias, tokens, statistics)
    on_all = search(*scaled(weight, bias, tokens), tokens, Whitening(statistics), 30)
    assert mean_loss(in_rounds) == pytest.approx(mean_loss(on_all), rel=0.05)


def test_many_experts_give_fewer_tokens_to_a_round_and_none_is_left_out(monkeypatch):
    tokens = world(4000)
    weight, bias, statistics, _ = closed_form(tokens)
    accuracy, uncertain = tokens.accuracy(weight, bias), tokens.uncertain(weight, bias)
    every = refine(weight, bias, tokens, statistics)
    sizes = []
    monkeypatch.setattr("meteora.fitting.logistic.MAX_LOGITS", 1200 * E)

    def noted(start, offset, few, *asked):
        sizes.append(int((few.weights > 0).sum()))
        assert few.labels.bincount(minlength=E).min() > 0
        return search(start, offset, few, *asked)

    monkeypatch.setattr("meteora.fitting.logistic.search", noted)
    assert tokens.accuracy(weight, bias) == pytest.approx(accuracy)
    assert torch.equal(tokens.uncertain(weight, bias).x, uncertain.x)
    gate = refine(weight, bias, tokens, statistics)
    assert max(sizes) <= 1200 < len(uncertain.x)
    unseen = world(seed=1)
    assert unseen.accuracy(*gate) > unseen.accuracy(weight, bias)
    assert unseen.accuracy(*gate) == pytest.approx(unseen.accuracy(*every), abs=0.02)
    monkeypatch.setattr("meteora.fitting.logistic.MAX_LOGITS", 1)
    assert tokens.limited(E).labels.bincount().tolist() == [1] * E
