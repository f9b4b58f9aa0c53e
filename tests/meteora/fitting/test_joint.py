"""Joint training: only gates learn, they learn what is asked, and a stop changes nothing."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from meteora.artifacts import JointSettings
from meteora.artifacts.routers import ANSWER_START_SHARE, POINT_GATES
from meteora.base.chat_template import Template
from meteora.checkpoint import tensors
from meteora.fitting import calibrate
from meteora.fitting.joint import DivergedError, train_jointly
from meteora.fitting.losses import (
    Counts,
    backward_apart,
    backward_together,
    computed_again,
    decoder_layers,
    learning_gates,
    loss_weights,
)
from meteora.fitting.sequences import UNLABELLED, Batch, TrainingError
from meteora.fitting.training_state import (
    FILE,
    StateError,
    chosen_sequences,
    learning_rate,
)
from meteora.model.fused import expert_names
from meteora.routing.gates import CheckpointingError, _checkpointed, gates_in, gates_of
from meteora.routing.hooks import recorded_logits
from meteora.routing.layer import routed_layers
from tests.meteora.fitting.test_add_expert import replaced, with_opening
from tests.meteora.fitting.test_calibrate import (
    examples,
    frozen_bytes,
    lists,
    openings_alone,
    routing_accuracy,
    same_gates,
    unmarked,
)

SETTINGS = JointSettings(
    steps=6,
    batch_size=4,
    accumulate=1,
    learning_rate=1e-2,
    warmup_ratio=0.34,
    gate_loss_weight=50.0,
    max_grad_norm=1.0,
    start="zeros",
)


@pytest.fixture
def model(world):
    return world.load()


@pytest.fixture
def optimised(monkeypatch):
    """Every parameter that an optimiser was given."""
    found = []

    class Watched(torch.optim.AdamW):
        def __init__(self, parameters, **asked):
            found.extend(parameters)
            super().__init__(found, **asked)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return found


def gate_bytes(model, folder):
    tensors.write_gates(folder / "gates", gates_of(model))
    return (folder / "gates").read_bytes()


@pytest.mark.parametrize("top_k", [1, 2])
def test_nothing_but_gates_is_optimised_and_nothing_else_changes(model, optimised, top_k):
    before, wanted = frozen_bytes(model), [p.requires_grad for p in model.parameters()]
    placed = []

    def note(done, _total):
        if done == 1:
            placed.extend(gates_in(model).values())

    train_jointly(model, examples(2), SETTINGS, replace(POINT_GATES, top_k=top_k), progress=note)
    gates = [parameter for gate in placed for parameter in gate.parameters()]
    assert {id(p) for p in optimised} == {id(p) for p in gates}
    assert len(optimised) == 2 * 8  # q, k, v share a gate, and so do gate and up
    assert all(p.abs().sum() > 0 for p in gates)
    assert frozen_bytes(model) == before
    after = [p.requires_grad for name, p in model.named_parameters() if ".router." not in name]
    assert after == wanted
    assert list(gates_in(model).values()) == placed
    assert all(gate.options.top_k == top_k for gate in placed)
    assert not any(p.requires_grad for p in gates)


@pytest.mark.parametrize("start", ["zeros", "calibrate"])
def test_tasks_that_can_be_told_apart_are_told_apart_on_unseen_sequences(model, start):
    settings = replace(SETTINGS, steps=40, batch_size=16, learning_rate=0.05, start=start)
    found = train_jointly(model, examples(12), settings)
    assert routing_accuracy(model, examples(6, seed=1)) > 0.9
    assert found.num_tokens == Counts.of(examples(12)).labelled


def test_what_opens_an_answer_is_learned_though_it_is_rare(world):
    sequences, unseen, right = [*examples(4), *lists(24)], lists(16, seed=9), []
    settings = replace(SETTINGS, steps=30, batch_size=16, learning_rate=0.02)
    for asked in (unmarked(sequences), sequences):
        model = world.load()
        train_jointly(model, asked, settings)
        right.append(routing_accuracy(model, openings_alone(unseen)))
    assert right[1] > right[0] + 0.15


def test_training_goes_on_from_calibrated_gates(model, world):
    train_jointly(model, examples(4), replace(SETTINGS, learning_rate=0.0, start="calibrate"))
    calibrated = world.load()
    calibrate.calibrate(calibrated, examples(4), refined=False)
    assert same_gates(gates_of(model), gates_of(calibrated))


def with_gates(model, top_k, share="point", template=None):
    """Random gates that learn, and their parameters."""
    options = replace(POINT_GATES, top_k=top_k, share=share)
    calibrate.calibrate(model, examples(2), options, template=template)
    model.requires_grad_(requires_grad=False)
    gates = learning_gates(model, zeros=True)
    torch.manual_seed(1)
    for gate in gates.values():
        torch.nn.init.normal_(gate.weight, std=0.3)
    return [p for gate in gates.values() for p in gate.parameters()]


def gradients(parameters):
    found = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def asked_of(model, sequences):
    """All that a step takes, of a training that has no other sequences."""
    each = loss_weights(sequences, len(expert_names(model)))
    return Batch.of(sequences, model.device), each, Counts.of(sequences), 50.0


@pytest.mark.parametrize("more", [[], lists(3)], ids=["paper", "answer starts"])
def test_the_loss_is_the_papers_but_that_openings_count_half(model, more):
    """Worked out by hand from one plain forward pass a sequence."""
    with_gates(model, top_k=2)
    sequences = [*examples(1), *more]
    losses = backward_together(model, *asked_of(model, sequences))
    tokens = [
        (e, t in s.answer_starts) for s in sequences for t, e in enumerate(s.experts) if e >= 0
    ]
    counted = []
    for e, opens in tokens:
        own = [opening for expert, opening in tokens if expert == e]
        share = ANSWER_START_SHARE if opens else 1 - ANSWER_START_SHARE
        counted.append(len(own) * share / own.count(opens) if any(own) else 1.0)
    lm, gate = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        with recorded_logits(model) as recorded, torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)
        lm += [-logits[0, t, ids[0, t + 1]] for t in range(ids.shape[1] - 1)]
        for t, e in enumerate(sequence.experts):
            if e >= 0:
                gate.append([-recorded[path].log_softmax(-1)[t, e] for path in gates_in(model)])
    torch.testing.assert_close(losses[-1], torch.stack(lm).mean(), rtol=1e-4, atol=1e-4)
    expected = (torch.tensor(gate) * torch.tensor(counted)[:, None]).sum(0) / len(tokens)
    torch.testing.assert_close(losses[:-1], expected, rtol=1e-4, atol=1e-4)


def test_without_openings_no_token_is_weighed():
    assert loss_weights(examples(2), 4) is None


@pytest.mark.parametrize("more", [[], lists(3)], ids=["plain", "answer starts"])
@pytest.mark.parametrize(
    ("share", "template"),
    [
        *(pytest.param(share, None, id=share) for share in ("module", "point", "layer", "token")),
        pytest.param("point", Template((1, 1), ()), id="opening"),
        pytest.param("turn", Template((1, 1), ()), id="turn"),
    ],
)
def test_one_expert_at_a_time_is_taught_the_same_without_a_way_back(model, share, template, more):
    parameters = with_gates(model, 1, share, template)
    asked = asked_of(model, [*examples(2), *more])
    backward_apart(model, *asked)
    found = gradients(parameters)
    backward_together(model, *asked)
    expected = gradients(parameters)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_a_gate_on_another_device_than_the_input_is_taught(model):
    with_gates(model, 1)
    asked = asked_of(model, [*examples(2), *lists(3)])
    model.set_attn_implementation("eager")  # sdpa reads the mask, which has no numbers
    backward_apart(model.to("meta"), *asked)
    parameters = [p for gate in gates_in(model).values() for p in gate.parameters()]
    assert gradients(parameters).is_meta


def test_gates_that_decide_for_turns_are_trained(model):
    options = replace(POINT_GATES, share="turn")
    train_jointly(model, examples(4), SETTINGS, options, template=Template((1, 1), ()))
    assert routing_accuracy(model, examples(2, seed=9)) > 0.8


def test_the_language_model_teaches_gates_only_where_experts_are_mixed(model):
    for top_k, teaches in ((1, False), (2, True)):
        parameters = with_gates(model, top_k)
        batch = Batch.of(examples(1), model.device)
        unlabelled = replace(batch, labels=torch.full_like(batch.labels, UNLABELLED))
        backward_together(model, unlabelled, None, Counts.of(examples(1)), 50.0)
        assert bool(gradients(parameters).abs().max() > 0) == teaches


@pytest.mark.parametrize("scales", [None, (2.0**40, 2.0**12, 1.0)], ids=["small", "too large"])
def test_a_base_in_16_bits_teaches_what_one_in_32_bits_does(world, monkeypatch, scales):
    """As in a step of millions of tokens, each of which has a small part in the gradient."""
    counts = Counts.of(examples(4))
    many = Counts(counts.labelled << 16, counts.predicted << 16)
    monkeypatch.setattr(Counts, "of", lambda _sequences: many)
    if scales:
        monkeypatch.setattr("meteora.fitting.joint.LOSS_SCALES", scales)
    settings = replace(SETTINGS, steps=1, batch_size=16, gate_loss_weight=0.0)
    taught = []
    for dtype in (torch.float32, torch.float16):
        model = world.load(dtype=dtype)
        train_jointly(model, examples(4), settings, replace(POINT_GATES, top_k=2))
        taught.append(torch.cat([g.weight.flatten() for g in gates_in(model).values()]).sign())
    assert (taught[0] == taught[1]).float().mean() > 0.95


@pytest.mark.parametrize("start", ["zeros", "calibrate"])
def test_experts_get_the_offsets_that_a_sweep_gives_them(world, start):
    openings = [replaced(sequence, {UNLABELLED: 4}) for sequence in examples(4)]
    by_sweep, by_steps = with_opening(world), with_opening(world)
    calibrate.calibrate(by_sweep, openings)
    train_jointly(by_steps, openings, replace(SETTINGS, start=start))
    expected, found = gates_of(by_sweep).offsets, gates_of(by_steps).offsets
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[path], rows) for path, rows in expected.items())
    train_jointly(by_steps, openings, replace(SETTINGS, start=start), offsets=False)
    assert gates_of(by_steps).offsets == {}


@pytest.mark.parametrize("top_k", [1, 2])
def test_accumulated_batches_teach_what_one_large_batch_does(world, top_k):
    gates = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        model = world.load()
        settings = replace(SETTINGS, batch_size=batch_size, accumulate=accumulate)
        train_jointly(model, [*examples(3), *lists(4)], settings, replace(POINT_GATES, top_k=top_k))
        gates.append(gates_of(model).own)
    for path, (weight, _) in gates[0].items():
        torch.testing.assert_close(gates[1][path][0], weight, rtol=1e-3, atol=1e-4)


def test_a_layer_that_was_computed_again_keeps_the_hook_of_accelerate():
    layer = add_hook_to_module(torch.nn.Linear(2, 2), ModelHook())
    hooked = layer.forward
    with computed_again([layer]):
        assert layer.forward is not hooked
    assert layer.forward is hooked


@pytest.mark.parametrize("share", ["point", "token"])
def test_layers_that_are_computed_again_give_the_same_gradients(model, share):
    parameters = with_gates(model, 2, share)
    asked = asked_of(model, examples(2))
    backward_together(model, *asked)
    expected = gradients(parameters)
    layer, calls = model.model.layers[0], []
    hook = layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    with computed_again(decoder_layers(model, routed_layers(model))):
        backward_together(model, *asked)
    hook.remove()
    assert len(calls) == 2
    assert "forward" not in layer.__dict__
    torch.testing.assert_close(gradients(parameters), expected)


@pytest.mark.parametrize(
    ("share", "template"),
    [
        pytest.param("token", None, id="token"),
        pytest.param("turn", Template((1, 1), (2,)), id="turn"),
        pytest.param("point", Template((1, 1), ()), id="opening"),
    ],
)
@pytest.mark.parametrize("by_transformers", [False, True])
def test_layers_that_are_computed_again_are_routed_as_in_their_own_pass(
    model, share, template, by_transformers
):
    """Two passes of as many tokens, and then the way back through both."""
    parameters = with_gates(model, 2, share, template)

    def loss(*ids):
        return model(torch.tensor([ids]), use_cache=False).logits[0, :, 4].square().mean()

    asked = (1, 1, 5, 2, 7, 8, 9), (1, 9, 9, 12, 13, 2, 14)
    for ids in asked:
        loss(*ids).backward()
    expected = gradients(parameters)
    if by_transformers:
        switch(model, use_reentrant=False)
        again = nullcontext()
    else:
        again = computed_again(decoder_layers(model, routed_layers(model)))
    with again, ThreadPoolExecutor(1) as of_a_gpu:  # which goes back in a thread of its own
        of_a_gpu.submit(sum(loss(*ids) for ids in asked).backward).result()
    torch.testing.assert_close(gradients(parameters), expected)


def switch(model, **asked):
    """Turn on transformers' own gradient checkpointing, whose name depends on its version."""
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(asked)


def test_transformers_names_the_layer_in_several_ways(model):
    layer = model.model.layers[0]
    wrapped = partial(_checkpointed, lambda run: run)
    of_the_layer = layer.forward, partial(layer.forward), partial(type(layer).forward, layer)
    assert all(wrapped(run) is not run for run in of_the_layer)  # the second is 5.22's
    assert wrapped(print) is print


def test_gradients_that_would_not_reach_a_gate_below_are_refused(model):
    with_gates(model, 2, "token")
    switch(model, use_reentrant=True)
    with pytest.raises(CheckpointingError, match="use_reentrant=False"):
        model(torch.tensor([[1, 5, 2]]), use_cache=False)


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_training_that_was_stopped_ends_in_the_same_bytes(world, tmp_path, top_k):
    sequences = examples(3)
    settings = replace(SETTINGS, steps=9, start="calibrate")
    whole = world.load()
    train_jointly(whole, sequences, settings, replace(POINT_GATES, top_k=top_k), seed=3)

    class Killed(BaseException):
        pass

    def kill(done, _total):
        if done == 5:
            raise Killed

    asked: dict[str, Any] = {
        "options": replace(POINT_GATES, top_k=top_k),
        "seed": 3,
        "folder": tmp_path,
        "checkpoint_every": 2,
    }
    with pytest.raises(Killed):
        train_jointly(world.load(), sequences, settings, progress=kill, **asked)
    tensors, about = load_file(tmp_path / FILE), metadata_of(tmp_path / FILE)
    assert 0 < float(about["wall_seconds"]) < 100
    save_file(tensors, tmp_path / FILE, {**about, "wall_seconds": "1000.0"})
    steps, resumed = [], world.load()
    found = train_jointly(
        resumed, sequences, settings, progress=lambda done, _: steps.append(done), **asked
    )
    assert steps == [5, 6, 7, 8, 9]  # the state of step 4 was the last
    assert found.wall_seconds > float(metadata_of(tmp_path / FILE)["wall_seconds"]) > 1000
    assert gate_bytes(resumed, tmp_path) == gate_bytes(whole, tmp_path)
    finished = world.load()
    train_jointly(finished, sequences, settings, progress=kill, **asked)  # nothing is left to do
    assert gate_bytes(finished, tmp_path) == gate_bytes(whole, tmp_path)


def test_the_seed_decides_and_nothing_else(world, tmp_path):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))
        model = world.load()
        train_jointly(model, examples(3), SETTINGS, seed=seed)
        made.append(gate_bytes(model, tmp_path))
    assert made[0] == made[1] != made[2]


def test_the_state_of_another_training_is_refused(world, tmp_path):
    train_jointly(world.load(), examples(2), SETTINGS, folder=tmp_path)
    other: list[dict[str, Any]] = [{"seed": 1}, {"options": replace(POINT_GATES, top_k=2)}]
    for changed in other:
        with pytest.raises(StateError, match="belongs to a training with other examples"):
            train_jointly(world.load(), examples(2), SETTINGS, folder=tmp_path, **changed)
    with pytest.raises(StateError, match="belongs to a training"):
        train_jointly(world.load(), examples(3), SETTINGS, folder=tmp_path)
    marked = [replace(one, answer_starts=(len(one.experts) - 1,)) for one in examples(2)]
    with pytest.raises(StateError, match="belongs to a training"):
        train_jointly(world.load(), marked, SETTINGS, folder=tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    about = metadata_of(tmp_path / FILE)
    kept = {k: v for k, v in load_file(tmp_path / FILE).items() if "exp_avg" not in k}
    save_file(kept, tmp_path / "no-moments", about)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (whole[:-100], bytes(flipped), (tmp_path / "no-moments").read_bytes()):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(StateError, match="remove it to train from the beginning"):
            train_jointly(world.load(), examples(2), SETTINGS, folder=tmp_path)


@pytest.mark.parametrize("top_k", [1, 2])
def test_numbers_that_are_not_finite_stop_the_training_and_keep_the_last_good(
    world, tmp_path, top_k
):
    model = world.load()
    before = [layer.router for layer in routed_layers(model).values()]

    def poison(done, _total):
        if done == 3:
            with torch.no_grad():
                model.get_submodule("model.layers.1.input_layernorm").weight[0] = torch.nan

    asked: dict[str, Any] = {"options": replace(POINT_GATES, top_k=top_k), "folder": tmp_path}
    layer = 1 if top_k == 1 else 0  # of two experts the gradient goes back through all layers
    named = rf"gate of model\.layers\.{layer}\.self_attn\.q_proj is not finite"
    with pytest.raises(DivergedError, match=f"step 4: .* {named}"):
        train_jointly(model, examples(2), SETTINGS, progress=poison, **asked)
    assert [layer.router for layer in routed_layers(model).values()] == before
    good, steps = world.load(), []
    train_jointly(good, examples(2), SETTINGS, progress=lambda n, _: steps.append(n), **asked)
    assert steps == [4, 5, 6]
    whole = world.load()
    train_jointly(whole, examples(2), SETTINGS, replace(POINT_GATES, top_k=top_k))
    assert gate_bytes(good, tmp_path) == gate_bytes(whole, tmp_path)


def test_gates_that_an_error_puts_back_can_be_learnt_as_before(model):
    before = with_gates(model, 1)
    stop = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_jointly(model, examples(2), SETTINGS, progress=stop)
    after = [p for gate in gates_in(model).values() for p in gate.parameters()]
    assert [*map(id, after)] == [*map(id, before)]
    assert all(p.requires_grad for p in after)


def test_finite_gradients_whose_norm_is_infinite_stop_the_training_with_a_sentence(model):
    options = replace(POINT_GATES, top_k=2, temperature=1e-30)
    with pytest.raises(
        DivergedError, match=r"gate of model\.layers\.\S+ is not finite, or too large"
    ):
        train_jointly(model, examples(2), SETTINGS, options)


def test_every_sequence_is_taken_once_before_any_comes_again():
    settings = replace(SETTINGS, batch_size=3, accumulate=2)
    taken = [i for step in range(10) for i in chosen_sequences(15, settings, 0, step)]
    epochs = [taken[i : i + 15] for i in range(0, 60, 15)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_learning_rate_rises_and_falls():
    settings = replace(SETTINGS, steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01
    assert learning_rate(replace(settings, warmup_ratio=0.0), 0) == 1.0


def test_too_few_examples_are_refused_before_any_work(model):
    with pytest.raises(TrainingError, match="expert q_and_v has 1 example;"):
        train_jointly(
            model, [*examples(2, experts=(0, 1, 3)), *examples(1, experts=(2,))], SETTINGS
        )
