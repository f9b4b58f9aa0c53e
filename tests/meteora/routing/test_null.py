"""The base as one of the choices: text of no adapter is left to it."""

import dataclasses
import random

import pytest
import torch

from meteora.artifacts import NULL
from meteora.fitting import calibrate as fit
from meteora.fitting.calibrate import calibrate
from meteora.fitting.lda import bias_for_base
from meteora.fitting.sequences import LabelledSequence
from meteora.model.fused import expert_names, force_expert, insert_experts, without_experts
from meteora.routing.gates import gates_of
from tests.meteora.fitting.test_calibrate import examples, routing_accuracy

IDS = torch.arange(3, 23)[None]


@pytest.fixture
def model(world):
    model = world.load_base()
    router = dataclasses.replace(world.manifest.router, null=True)
    manifest = dataclasses.replace(world.manifest, router=router)
    insert_experts(model, world.checkpoint, manifest)
    return model


def test_the_choice_of_the_base_is_the_base(model):
    assert expert_names(model)[-1] == NULL
    with torch.no_grad():
        with without_experts(model):
            base = model(IDS).logits
        with force_expert(model, NULL):
            assert torch.equal(model(IDS).logits, base)


def test_tokens_of_no_adapter_are_told_apart_like_those_of_one(model):
    calibrate(model, examples(6, experts=range(5)))
    assert gates_of(model).own["model.layers.0.self_attn.q_proj"][0].shape[0] == 5
    unseen = examples(4, seed=9, experts=range(5))
    assert routing_accuracy(model, unseen) > 0.9
    assert routing_accuracy(model, [s for s in unseen if s.experts[-1] == 4]) > 0.9


@pytest.mark.parametrize("crossed", [False, True])
def test_the_base_s_lead_is_read_from_tokens_that_gates_were_not_fitted_to(
    model, monkeypatch, crossed
):
    """Of labels drawn by lot a gate knows those of its own tokens, and no others."""
    dice = random.Random(0)
    lots = [
        LabelledSequence(tuple(dice.choices(range(3, 40), k=8)), (e,) * 8)
        for _ in range(6)
        for e in range(5)
    ]
    asked = []
    monkeypatch.setattr(fit, "bias_for_base", lambda unseen: asked.extend(unseen) or 0.0)
    fit.calibrate(model, lots, crossed=crossed)
    right = torch.cat([logits.argmax(1) == labels for logits, labels in asked])
    assert right.float().mean() < 0.3


def test_the_base_leads_by_as_much_as_the_experts_can_spare():
    logits = torch.randn(1000, 4)
    labels = torch.arange(1000) % 4
    logits[torch.arange(1000), labels] += 9
    lead = bias_for_base([(logits, labels)])
    assert lead > 4
    logits[:, 3] += lead
    lost = (logits.argmax(1) == 3)[labels != 3]
    assert 0.005 < lost.float().mean() < 0.015
    assert (
        bias_for_base([(logits + torch.tensor([0, 0, 0, 99.0]), labels)]) == 0
    )  # never a handicap
