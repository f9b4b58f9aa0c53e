"""The closed form against textbook linear discriminant analysis, in numpy and float64."""

import numpy as np
import pytest
import torch

from meteora.fitting.covariance import Scatter
from meteora.fitting.lda import SingularError, choose_shrinkage, gate_from, solve_gate
from meteora.fitting.logistic import Tokens

E, IN, T = 3, 6, 200


def draw(seed=0, common_mean=0.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(T) % E
    mixing, means = rng.normal(size=(IN, IN)), 2 * rng.normal(size=(E, IN))
    x = rng.normal(size=(T, IN)) @ mixing + means[labels] + common_mean
    return x.astype(np.float32), labels, rng.uniform(0.5, 2.0, size=T)


def scatter_of(x, labels, weights, batch=64):
    x = torch.from_numpy(x)
    scatter = Scatter.empty(E, x[:batch].mean(0))
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        scatter.add(
            x[part], torch.from_numpy(labels[part]), torch.from_numpy(weights[part]).float()
        )
    return scatter


def textbook(x, labels, weights, shrinkage):
    x = x.astype(np.float64)
    means = np.stack([np.average(x[labels == e], 0, weights[labels == e]) for e in range(E)])
    centred = x - means[labels]
    within = (centred.T * weights) @ centred / weights.sum()
    covariance = (1 - shrinkage) * within + shrinkage * np.diag(within).mean() * np.eye(IN)
    weight = np.linalg.solve(covariance, means.T).T
    return weight, -0.5 * (weight * means).sum(-1)


@pytest.mark.parametrize("shrinkage", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("common_mean", [0.0, 100.0])
def test_a_gate_is_textbook_lda(shrinkage, common_mean):
    """Logits agree up to a constant a token, which no softmax and no argmax sees."""
    x, labels, weights = draw(common_mean=common_mean)
    weight, bias = gate_from(scatter_of(x, labels, weights), shrinkage)
    expected_weight, expected_bias = textbook(x, labels, weights, shrinkage)
    got = x.astype(np.float64) @ weight.double().numpy().T + bias.double().numpy()
    expected = x.astype(np.float64) @ expected_weight.T + expected_bias
    np.testing.assert_allclose(
        got - got.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True), atol=0.02
    )


def test_shrinkage_is_the_one_that_is_right_most_often_on_held_out_tokens():
    x, labels, weights = draw(seed=1)
    scatter = scatter_of(x, labels, weights)
    held = Tokens(*map(torch.from_numpy, draw(seed=1)))
    chosen, accuracy, gate = choose_shrinkage(scatter, held.accuracy)
    accuracies = {}
    for candidate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6):
        weight, bias = gate_from(scatter, candidate)
        right = (held.x @ weight.T + bias).argmax(-1) == held.labels
        accuracies[candidate] = float((right * held.weights).sum() / held.weights.sum())
    assert accuracy == pytest.approx(max(accuracies.values()))
    assert all(map(torch.equal, gate, gate_from(scatter, chosen)))
    assert chosen == max(c for c, a in accuracies.items() if a == pytest.approx(accuracy))


def test_fewer_tokens_than_inputs_still_give_a_gate():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 64)).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2])
    scatter = scatter_of(x, labels, np.ones(6))
    weight, bias = gate_from(scatter, 0.01)
    assert weight.isfinite().all()
    assert (torch.from_numpy(x) @ weight.T + bias).argmax(-1).tolist() == labels.tolist()


def test_tokens_that_are_all_alike_within_each_expert_are_refused():
    """No direction would have any variance, and the gate none that is finite."""
    labels = torch.arange(2 * E) % E
    scatter = Scatter.empty(E, torch.zeros(IN))
    scatter.add(torch.eye(IN)[labels], labels, torch.ones(2 * E))
    with pytest.raises(SingularError, match="do not vary within any expert"):
        gate_from(scatter, 0.1)
    with pytest.raises(SingularError, match="do not vary within any expert"):
        choose_shrinkage(scatter, lambda *_: 1.0)


def test_a_gate_that_only_more_than_every_candidate_solves_has_its_accuracy():
    """The tokens vary in one direction, so little that a gate is 0.8e18 / s beside it."""
    labels = torch.arange(4 * E) % E
    scatter = Scatter.empty(E, torch.zeros(IN))
    x = torch.eye(IN)[labels]
    x[:, -1] = (IN / 0.8e18) ** 0.5 * (1 - 2 * (torch.arange(4 * E) // E % 2))
    scatter.add(x, labels, torch.ones(4 * E))
    assert solve_gate(scatter.covariance(), scatter.means, scatter.shift, 0.6) is None
    right = Tokens(x, labels, torch.ones(4 * E)).accuracy
    chosen = choose_shrinkage(scatter, right)
    assert chosen.accuracy == right(*gate_from(scatter, 1.0)) == 1
