"""Calibrating: only gates change, they separate what can be separated, and the same every time."""

import hashlib
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.artifacts.routers import ANSWER_START_SHARE, POINT_GATES
from meteora.base.chat_template import Template
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import GATES
from meteora.fitting import calibrate as train
from meteora.fitting import layerwise
from meteora.fitting import sequences as dealing
from meteora.fitting.calibrate import calibrate
from meteora.fitting.covariance import RowScatter, Scatter
from meteora.fitting.lda import SHRINKAGES, choose_shrinkage, gate_from
from meteora.fitting.sequences import UNLABELLED, LabelledSequence, TrainingError
from meteora.model.fused import force_expert, insert_experts, load
from meteora.routing.gates import gates_in, gates_of, insert_gates
from meteora.routing.hooks import recorded_logits
from meteora.routing.layer import MoELoRALinear, routed_layers
from tests.conftest import LAYERS

NAMES = ["all_seven", "attention", "q_and_v", "patterns"]


def task_tokens(e, length, dice):
    """Task e speaks with its own three tokens."""
    return [3 + 3 * e + dice.randrange(3) for _ in range(length)]


def test_routers_that_come_back_would_undo_a_fit(world):
    model = world.load()
    with force_expert(model, "attention"), pytest.raises(MeteoraError, match="outside of that"):
        calibrate(model, examples(4))
    before = [layer.router for layer in routed_layers(model).values()]
    calibrate(model, examples(4))
    assert not any(layer.router in before for layer in routed_layers(model).values())


def test_gates_that_are_fitted_in_inference_mode_can_be_trained(world):
    model = world.load()
    with torch.inference_mode():
        calibrate(model, examples(4))
    for gate in gates_in(model).values():
        gate.requires_grad_(requires_grad=True)


def test_answers_start_at_tokens():
    with pytest.raises(TrainingError, match="of a sequence of 2 tokens start at 0, 2; give"):
        LabelledSequence((5, 6), (0, 0), (0, 2))


def examples(num_each, seed=0, experts=range(4), opening=2):
    """Sequences of each task behind an opening that tells nothing, of very different length."""
    dice, found = random.Random(seed), []
    for e in experts:
        for i in range(num_each):
            body = task_tokens(e, dice.choice([3, 8, 20]) if i else 90, dice)
            found.append(
                LabelledSequence(
                    (*[1] * opening, *body), (*[UNLABELLED] * opening, *[e] * len(body))
                )
            )
    return found


def lists(num, experts=range(4), seed=0):
    """Two questions, then two answers; each begins with a token that only its task has."""
    dice, found = random.Random(seed), []
    for _ in range(num):
        order, answer_starts = dice.choices([*experts], k=2), []
        parts = [(e, task_tokens(e, 6, dice)) for e in order]
        for e in order:
            answer_starts.append(2 + sum(len(body) for _, body in parts))
            parts.append((e, [40 + e, *task_tokens(e, 14, dice)]))
        ids = [1, 1, *(token for _, body in parts for token in body)]
        labels = [UNLABELLED] * 2 + [e for e, body in parts for _ in body]
        found.append(LabelledSequence(tuple(ids), tuple(labels), tuple(answer_starts)))
    return found


def unmarked(sequences):
    """The same, without a word of what opens their answers."""
    return [replace(sequence, answer_starts=()) for sequence in sequences]


@pytest.fixture
def model(world):
    return world.load()


@torch.no_grad()
def routing_accuracy(model, sequences):
    """Share of (layer, labelled token) pairs that go to their own expert."""
    right = total = 0
    for sequence in sequences:
        with recorded_logits(model) as recorded:
            model(torch.tensor([sequence.input_ids]))
        labels = torch.tensor(sequence.experts)
        known = labels != UNLABELLED
        for logits in recorded.values():
            right += int((logits.argmax(-1) == labels)[known].sum())
            total += int(known.sum())
    return right / total


def openings_alone(sequences, experts=range(4)):
    """The same, labelled only where answers of these experts begin."""
    return [
        replace(
            sequence,
            experts=tuple(
                e if place in sequence.answer_starts and e in experts else UNLABELLED
                for place, e in enumerate(sequence.experts)
            ),
        )
        for sequence in sequences
    ]


def frozen_bytes(model):
    """A hash of everything but the gates."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".router." not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def test_only_the_gates_differ_afterwards(model):
    before = frozen_bytes(model)
    calibrate(model, examples(4))
    assert frozen_bytes(model) == before
    assert all(layer.router is not None for layer in routed_layers(model).values())


def same_gates(some, others):
    """Whether all bits of two models' gates are equal."""
    assert some.own.keys() == others.own.keys()
    return all(
        torch.equal(mine, theirs)
        for path, gate in some.own.items()
        for mine, theirs in zip(gate, others.own[path], strict=True)
    )


@pytest.mark.parametrize("crossed", [False, True])
def test_a_stopped_sweep_goes_on_and_ends_in_the_same_gates(model, tmp_path, crossed):
    class StoppedError(BaseException):
        pass

    def stop(_done, _total):
        raise StoppedError

    whole = calibrate(model, examples(4), crossed=crossed)
    expected = gates_of(model)
    with pytest.raises(StoppedError):
        calibrate(model, examples(4), crossed=crossed, folder=tmp_path, progress=stop)
    kept = sorted(tmp_path.iterdir())
    assert kept[0].name == "model.layers.0.mlp.down_proj.safetensors"
    assert len(kept) == len(whole.statistics) // LAYERS
    before = {path: path.stat().st_ino for path in kept}

    found = calibrate(model, examples(4), crossed=crossed, folder=tmp_path)
    assert {path: path.stat().st_ino for path in kept} == before  # they are not fitted again
    assert len(list(tmp_path.iterdir())) == len(whole.statistics)
    assert found.accuracy_of == whole.accuracy_of
    for path, statistics in whole.statistics.items():
        for name, tensor in vars(statistics).items():
            assert torch.equal(getattr(found.statistics[path], name), tensor)
    assert same_gates(gates_of(model), expected)


def test_a_kept_point_that_is_damaged_or_of_other_sequences_is_fitted_again(model, tmp_path):
    calibrate(model, examples(4), folder=tmp_path)
    kept = sorted(tmp_path.iterdir())
    damaged = bytearray(kept[0].read_bytes())
    damaged[-1] ^= 1
    kept[0].write_bytes(damaged)
    kept[1].write_bytes(damaged[:100])
    before = {path: path.stat().st_ino for path in kept}
    calibrate(model, examples(4), folder=tmp_path)
    again = {path for path in kept if path.stat().st_ino != before[path]}
    assert again == set(kept[:2])
    calibrate(model, examples(5), folder=tmp_path)
    found = gates_of(model)
    calibrate(model, examples(5))
    assert same_gates(gates_of(model), found)


def test_tasks_that_can_be_told_apart_are_told_apart_on_unseen_sequences(model):
    found = calibrate(model, examples(12))
    assert routing_accuracy(model, examples(6, seed=1)) > 0.9
    assert (found.heldout_accuracy or 0) > 0.9
    assert found.num_tokens == sum(
        e != UNLABELLED for sequence in examples(12) for e in sequence.experts
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_inputs_give_the_same_bytes(world, tmp_path, device):
    for name in ("one", "other"):
        model = world.load(device=device)
        calibrate(
            model,
            examples(4),
            replace(POINT_GATES, top_k=2),
            seed=5,
            template=Template((1, 1), ()),
        )
        tensors.write_gates(tmp_path / name, gates_of(model))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_files_change_no_byte_and_leave_nothing(
    world, tmp_path, monkeypatch, dtype
):
    mapped, from_file = [], torch.from_file

    def noted(name, **asked):
        mapped.append(name)
        return from_file(name, **asked)

    monkeypatch.setattr(torch, "from_file", noted)
    gates = []
    for limit in (layerwise.MAX_HIDDEN_BYTES, 0):
        monkeypatch.setattr(layerwise, "MAX_HIDDEN_BYTES", limit)
        assert mapped == []
        model = world.load(dtype=dtype)
        calibrate(model, examples(4), scratch=tmp_path)
        gates.append(gates_of(model))
    assert mapped
    assert list(tmp_path.iterdir()) == []
    assert same_gates(*gates)


def test_what_layers_are_called_with_is_made_again_where_hidden_states_lie_in_files(
    model, tmp_path, monkeypatch
):
    """Masks grow with the square of a length: all of them in memory would bound nothing."""
    monkeypatch.setattr(dealing, "TOKENS_PER_BATCH", 100)
    batches = [
        (batch.input_ids, batch.attention_mask)
        for batch in dealing.batched(examples(5), set(), torch.device("cpu"))
    ]
    kept = layerwise.Sweep(model, batches)
    monkeypatch.setattr(layerwise, "MAX_HIDDEN_BYTES", 0)
    filed = layerwise.Sweep(model, batches, scratch=tmp_path)
    for index in range(2):
        for path in [path for paths in kept.points[index] for path in paths]:
            for one, other in zip(kept.inputs(index, path), filed.inputs(index, path), strict=True):
                assert torch.equal(one, other)
                assert len(filed._calls) == 1 < len(kept._calls) == len(batches)
        kept.advance(index)
        filed.advance(index)


@pytest.mark.parametrize("share", ["point", "layer", "token", "module"])
def test_outputs_that_are_kept_change_no_byte(world, monkeypatch, share):
    """Where all fit in memory, a module runs once a batch."""
    ran, fitted = [], []
    own = MoELoRALinear.forward

    def counted(layer, x):
        if layer.router is not None:
            ran[-1] += 1
        return own(layer, x)

    monkeypatch.setattr(MoELoRALinear, "forward", counted)
    for limit in (layerwise.MAX_OUTPUT_BYTES, 0):
        monkeypatch.setattr(layerwise, "MAX_OUTPUT_BYTES", limit)
        model = world.load()
        ran.append(0)
        calibrate(model, examples(4), replace(POINT_GATES, share=share))
        fitted.append(gates_of(model))
    assert same_gates(*fitted)
    again = share in ("point", "module")  # with fewer decisions, few inputs are asked for
    assert ran[0] < 0.6 * ran[1] if again else ran[0] == ran[1]


@pytest.mark.parametrize("names", [("q_proj", "up_proj"), ("self_attn", "mlp")])
def test_a_model_may_overwrite_what_a_module_returned(world, monkeypatch, names):
    """An output is kept without a copy; one that was overwritten is computed again."""
    fitted = []
    for limit in (layerwise.MAX_OUTPUT_BYTES, 0):
        monkeypatch.setattr(layerwise, "MAX_OUTPUT_BYTES", limit)
        model = world.load()
        for name, module in model.named_modules():
            if name.endswith(names):
                module.register_forward_hook(_doubled_in_place)
        calibrate(model, examples(4))
        fitted.append(gates_of(model))
    assert same_gates(*fitted)


@pytest.mark.parametrize("names", [(), ("self_attn", "mlp")])
def test_outputs_of_inference_mode_are_kept_as_well(world, monkeypatch, names):
    """Of all modules, since the caller is in that mode; or of some that enter it themselves."""
    fitted = []
    for is_entered in (True, False):
        model = world.load()
        for name, module in model.named_modules():
            if names and is_entered and name.endswith(names):
                monkeypatch.setattr(module, "forward", torch.inference_mode()(module.forward))
        with torch.inference_mode(is_entered and not names):
            calibrate(model, examples(4))
        fitted.append(gates_of(model))
    assert same_gates(*fitted)


def _doubled_in_place(_module, _args, output):
    (output[0] if isinstance(output, tuple) else output).mul_(2)


def test_a_scratch_folder_that_cannot_be_written_is_said_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "MAX_HIDDEN_BYTES", 0)
    with pytest.raises(layerwise.SweepError, match=r"cannot be kept in .*missing"):
        calibrate(model, examples(4), scratch=tmp_path / "missing")


def test_a_base_with_more_rows_than_tokens_is_refused_with_a_sentence(model):
    """ProphetNet and CPM-Ant put rows of their own beside those of the tokens."""
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _mlp, args: torch.cat([args[0]] * 3, 1))
        layer.mlp.register_forward_hook(lambda _mlp, _args, out: out[:, : out.shape[1] // 3])
    with pytest.raises(MeteoraError, match=r"layers\.0\.mlp\.\w+_proj for .* one row a token"):
        calibrate(model, examples(4))


def test_modules_of_one_input_get_one_gate_and_the_rest_their_own(model):
    found = calibrate(model, examples(4), replace(POINT_GATES, share="module"))
    gates = gates_of(model).own
    q, k, o = (gates[f"model.layers.0.self_attn.{name}_proj"][0] for name in "qko")
    assert torch.equal(q, k)
    assert not torch.equal(q, o)
    assert [path.split(".", 2)[2] for path in found.accuracy_of] == [
        f"{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]


@torch.no_grad()
def test_a_crossed_sweep_routes_each_half_by_gates_of_the_other(model, tmp_path):
    """The means of what reaches a module are those that the other half's gates below give."""
    path, dice = "model.layers.1.self_attn.o_proj", random.Random(0)
    sequences = [  # nobody knows more of them than what was seen
        LabelledSequence(tuple(dice.choices(range(3, 60), k=5)), (e,) * 5)
        for e in range(4)
        for _ in range(6)
    ]
    found = calibrate(model, sequences, crossed=True, folder=tmp_path).statistics[path]
    gates, heldout = gates_of(model), dealing.hold_out(sequences, NAMES, 0, 0.5)
    seen, labels = [], []
    for half in (0, 1):
        kept = {p: load_file(tmp_path / f"{p}.safetensors") for p in gates.own}
        others = {
            p: (own[f"{1 - half}.weight"], own[f"{1 - half}.bias"]) for p, own in kept.items()
        }
        assert not same_gates(gates, replace(gates, own=others))
        insert_gates(model, replace(gates, own=others), POINT_GATES)
        hook = routed_layers(model)[path].register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0])
        )
        for i, sequence in enumerate(sequences):
            if (i in heldout) == bool(half):
                model(torch.tensor([sequence.input_ids]))
                labels += sequence.experts
        hook.remove()
    x, owners = torch.cat(seen), torch.tensor(labels)
    means = torch.stack([x[owners == e].mean(0) for e in range(4)])
    torch.testing.assert_close(found.means.float() + found.shift, means, atol=1e-5, rtol=1e-4)


def test_a_crossed_sweep_ends_with_gates_of_all_sequences(model, monkeypatch):
    assert calibrate(model, examples(8), crossed=True).not_crossed == ()
    assert routing_accuracy(model, examples(4, seed=1)) > 0.9
    calibrate(model, examples(4))
    expected = gates_of(model)
    own = dealing.hold_out([*examples(4)], NAMES, 0)
    monkeypatch.setattr(train, "hold_out", lambda *_: own - set(range(4)))
    alone = calibrate(model, examples(4), crossed=True)  # one half has nothing of an expert
    assert alone.not_crossed == (NAMES[0],)
    found = gates_of(model)
    calibrate(model, examples(4))
    assert same_gates(found, gates_of(model))
    assert not same_gates(found, expected)


def test_a_sweep_in_closed_form_is_not_crossed(model):
    calibrate(model, examples(4), refined=False)
    expected = gates_of(model)
    calibrate(model, examples(4), refined=False, crossed=True)
    assert same_gates(gates_of(model), expected)


@torch.no_grad()
def test_a_gate_is_fitted_to_inputs_as_the_routed_layers_below_produce_them(model):
    """Its own closed form over what reaches it in the finished model gives the gate back."""
    path, sequences = "model.layers.1.self_attn.o_proj", examples(4)
    calibrate(model, sequences, refined=False)
    seen = []
    hook = routed_layers(model)[path].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    for sequence in sequences:
        model(torch.tensor([sequence.input_ids]))
    hook.remove()
    x = torch.cat(seen, dim=1)[0]
    labels = torch.tensor([e for sequence in sequences for e in sequence.experts])
    x, labels = x[labels != UNLABELLED], labels[labels != UNLABELLED]
    scatter = Scatter.empty(len(NAMES), x.mean(0))
    scatter.add(x, labels, 1 / labels.bincount().float()[labels])
    fitted = centred(gates_of(model).own[path][0])
    again = [centred(gate_from(scatter, shrinkage)[0]) for shrinkage in SHRINKAGES]
    assert min((one - fitted).norm() / fitted.norm() for one in again) < 1e-3


@pytest.mark.parametrize(
    ("share", "deciding"),
    [
        (
            "point",
            {"0": "q_proj o_proj gate_proj down_proj", "1": "q_proj o_proj gate_proj down_proj"},
        ),
        ("layer", {"0": "q_proj", "1": "q_proj"}),
        ("token", {"0": "q_proj"}),
    ],
)
def test_one_gate_decides_as_far_as_it_is_asked_to(world, model, tmp_path, share, deciding):
    calibrate(model, examples(4), replace(POINT_GATES, share=share))
    gates = gates_of(model)
    found: dict[str, list[str]] = {}
    for path in gates.own:
        found.setdefault(path.split(".")[2], []).append(path.rpartition(".")[2])
    assert {layer: " ".join(names) for layer, names in found.items()} == deciding
    assert {*gates.own, *gates.follows} == set(routed_layers(model))

    tensors.write_gates(tmp_path / GATES, gates)
    again = world.load()
    insert_gates(again, tensors.read_gates(tmp_path, world.manifest), RouterOptions("gate", 1, 1.0))
    ids = torch.tensor([examples(2)[0].input_ids])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_turn_without_a_template_is_the_whole_pass_in_the_fit_too(world, model):
    options = replace(POINT_GATES, share="turn")
    calibrate(model, examples(4), options)
    again = world.load()
    insert_gates(again, gates_of(model), options)
    ids = torch.tensor([examples(2)[0].input_ids])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("share", ["module", "point", "layer", "token"])
def test_small_batches_teach_what_large_ones_do(model, monkeypatch, share):
    monkeypatch.setattr(dealing, "TOKENS_PER_BATCH", 100)
    calibrate(model, examples(12), replace(POINT_GATES, share=share))
    assert routing_accuracy(model, examples(6, seed=1)) > 0.9


def test_gates_that_are_shared_at_a_point_route_as_gates_of_each_module(world):
    ids = torch.tensor([examples(2)[0].input_ids])
    out = []
    for share in ("module", "point"):
        model = world.load()
        calibrate(model, examples(4), replace(POINT_GATES, share=share))
        with torch.no_grad():
            out.append(model(ids).logits)
    assert torch.equal(*out)


def centred(weight):
    """What is common to the rows of all experts changes no route."""
    return weight - weight.mean(0)


def test_experts_that_share_their_few_sequences_are_all_fitted(model):
    """One sequence is held out, so that one of the experts is not checked."""
    dice, shared = random.Random(0), []
    for pair in ((0, 1), (0, 2), (1, 2)):
        labels = tuple(e for e in pair for _ in range(20))
        ids = tuple(token for e in pair for token in task_tokens(e, 20, dice))
        shared.append(LabelledSequence(ids, labels))
    asked = [*shared, *examples(4, experts=[3])]
    assert len(dealing.hold_out(asked, NAMES, 0) & {0, 1, 2}) == 1
    calibrate(model, asked)
    for weight, bias in gates_of(model).own.values():
        assert weight.isfinite().all()
        assert bias.isfinite().all()


def test_without_any_examples_a_stand_in_has_nothing_to_stand_beside(model):
    with pytest.raises(TrainingError, match="no expert has examples"):
        calibrate(model, [], replace(POINT_GATES, stand_in="arrow"))


def test_examples_of_the_base_alone_are_nothing_to_stand_beside_either(world):
    model = world.load_base()
    router = replace(world.manifest.router, null=True)
    insert_experts(model, world.checkpoint, replace(world.manifest, router=router))
    of_the_base = [replace(s, experts=(4,) * len(s.experts)) for s in examples(4, experts=[0])]
    with pytest.raises(TrainingError, match="no expert has examples"):
        calibrate(model, of_the_base, replace(POINT_GATES, null=True, stand_in="arrow"))


def test_an_expert_with_too_few_examples_is_named(model):
    few = [*examples(4, experts=(0, 1, 3)), *examples(1, experts=(2,))]
    with pytest.raises(TrainingError, match="expert q_and_v has 1 example;"):
        calibrate(model, few)
    with pytest.raises(TrainingError, match="expert q_and_v has 0 examples"):
        calibrate(model, examples(4, experts=(0, 1, 3)))


def test_labels_must_fit_the_tokens_and_the_experts(model):
    with pytest.raises(TrainingError, match="3 tokens and 2 labels"):
        LabelledSequence((1, 2, 3), (0, 0))
    with pytest.raises(TrainingError, match="0 tokens"):
        LabelledSequence((), ())
    with pytest.raises(TrainingError, match="sequence 0 has a token of expert 7"):
        calibrate(model, [LabelledSequence((1, 2), (7, 7)), *examples(4)])


def test_an_expert_that_only_owns_spans_inside_other_sequences_is_learned(model):
    """Two tasks in each sequence, in either order; expert 3 never comes first."""
    dice = random.Random(0)

    def spans(first, second):
        return LabelledSequence(
            (*task_tokens(first, 9, dice), *task_tokens(second, 7, dice)),
            (*[first] * 9, *[second] * 7),
        )

    pairs = [(0, 1), (1, 2), (2, 3), (0, 3), (2, 0), (1, 3)]
    calibrate(model, [spans(*pair) for pair in pairs for _ in range(4)])
    unseen = [spans(*pair) for pair in pairs for _ in range(2)]
    assert routing_accuracy(model, unseen) > 0.8  # attention mixes the first task in


@pytest.mark.parametrize("seed", range(5))
def test_every_expert_keeps_a_fitted_sequence_however_spans_are_shared(seed):
    dice = random.Random(seed)
    sequences = [
        LabelledSequence((1,) * 3, tuple(dice.sample(range(4), 3))) for _ in range(5)
    ] + examples(2)
    heldout = dealing.hold_out(sequences, NAMES, seed)
    for part in (heldout, set(range(len(sequences))) - heldout):
        assert set().union(*(sequences[i].owners for i in part)) == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_is_held_out_is_not_fitted_under_another_number(share):
    sequences = [*examples(6), *examples(6, experts=[0, 2])]
    heldout = dealing.hold_out(sequences, NAMES, 0, share)
    seen, unseen = (
        {sequences[i].input_ids for i in part}
        for part in (set(range(len(sequences))) - heldout, heldout)
    )
    assert unseen
    assert not seen & unseen
    one = LabelledSequence((5, 6), (0, 0))  # of which one half cannot but be the other's
    assert len(dealing.hold_out([one] * 4, NAMES[:1], 0, share)) == 4 * share


def test_most_of_what_an_expert_has_stays_in_the_fit_even_if_it_is_one_sequence_again_and_again():
    one, other = (LabelledSequence((5, token), (0, 0)) for token in (6, 7))
    assert len(dealing.hold_out([other, *[one] * 99], NAMES[:1], 0, 0.1)) == 10


def test_a_failed_fit_leaves_the_routers_that_it_found(model):
    def interrupt(_done, _total):
        raise KeyboardInterrupt

    before = [layer.router for layer in routed_layers(model).values()]
    model.train()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, examples(4), progress=interrupt)
    after = [layer.router for layer in routed_layers(model).values()]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert model.training


@pytest.mark.parametrize(
    ("kind", "reader", "share"),
    [
        *(("deepseek", "kv_b_proj", share) for share in ("layer", "token", "turn")),
        ("doge", "dt_proj", "turn"),
    ],
)
def test_a_module_that_reads_the_cache_again_cannot_follow_one_decision(
    build_base, build_adapter, fuse_adapters, tmp_path, kind, reader, share
):
    base, targets = build_base(kind), [reader, "o_proj"]
    adapters = {
        name: build_adapter(base, tmp_path / name, seed=seed, r=2, target_modules=targets)
        for seed, name in enumerate(("one", "two"))
    }
    fuse_adapters(base, adapters, tmp_path / "fused")
    model, _ = load(tmp_path / "fused", base_folder=base)
    asked = replace(POINT_GATES, share=share)
    with pytest.raises(TrainingError, match=f"{reader} gets all tokens of the cache"):
        calibrate(model, examples(2, experts=range(2)), asked)


def test_numbers_that_are_not_finite_are_refused_with_the_module(model):
    with torch.no_grad():
        model.get_submodule("model.layers.1.input_layernorm").weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.q_proj: .*NaN"):
        calibrate(model, examples(4))


def test_batches_are_padded_little_and_hold_every_sequence_once(monkeypatch):
    monkeypatch.setattr(dealing, "TOKENS_PER_BATCH", 64)
    sequences = examples(5)
    batches = list(dealing.batched(sequences, set(), torch.device("cpu")))
    assert all(batch.input_ids.numel() <= 64 or len(batch.input_ids) == 1 for batch in batches)
    lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(-1)]
    assert sorted(lengths) == sorted(len(sequence.input_ids) for sequence in sequences)
    for batch in batches:
        assert (batch.labels[batch.attention_mask == 0] == UNLABELLED).all()


def test_no_batch_of_halves_is_of_both(monkeypatch):
    monkeypatch.setattr(dealing, "TOKENS_PER_BATCH", 100)
    sequences, heldout = examples(6), {0, 3, 5, 8, 13}
    batches = [*dealing.in_halves(sequences, heldout, torch.device("cpu"))]
    assert all(batch.heldout.float().mean().item() in {0, 1} for batch in batches)
    rows = [tuple(i for i in row.tolist() if i) for b in batches for row in b.input_ids]
    assert sorted(rows) == sorted(sequence.input_ids for sequence in sequences)
    held = [tuple(i for i in r.tolist() if i) for b in batches if b.heldout[0] for r in b.input_ids]
    assert sorted(held) == sorted(sequences[i].input_ids for i in heldout)


def test_a_sample_of_the_tokens_is_kept_where_there_are_many(model, monkeypatch):
    monkeypatch.setattr(train, "MAX_TOKEN_BYTES", 0)
    monkeypatch.setattr(dealing, "MAX_ROWS", 100)
    kept = []

    def refined(weight, bias, tokens, *_):
        kept.append(len(tokens.x))
        assert tokens.weights.sum() == pytest.approx(len(NAMES) * kept[-1] / 100, rel=0.2)
        return weight, bias

    monkeypatch.setattr(train, "refine", refined)
    calibrate(model, examples(12))
    assert 70 <= min(kept) <= 75
    assert 95 <= max(kept) <= 100


@pytest.mark.parametrize("limit", [16, 40, 4096])
def test_a_point_of_many_inputs_is_fitted_from_a_sample_of_its_tokens(model, monkeypatch, limit):
    """Of 32 and 48 inputs a point: none, some and all are fitted from second moments."""
    forms = []

    def choose_noted(scatter, accuracy_of):
        forms.append((type(scatter).__name__, scatter.means.shape[1]))
        if isinstance(scatter, RowScatter):
            assert sum(len(x) for x, _, _ in scatter.parts) <= limit
        return choose_shrinkage(scatter, accuracy_of)

    for module in (train, dealing):
        monkeypatch.setattr(module, "MAX_ROWS", limit)
    monkeypatch.setattr(train, "choose_shrinkage", choose_noted)
    calibrate(model, examples(12))
    assert set(forms) == {("Scatter" if n <= limit else "RowScatter", n) for n in (32, 48)}
    assert routing_accuracy(model, examples(6, seed=1)) > 0.85


def test_what_opens_answers_tells_the_spread_however_few_tokens_may(monkeypatch):
    monkeypatch.setattr(dealing, "MAX_ROWS", 160)  # 120 for the fit, of 2,000
    sequences = [LabelledSequence((1,) * 50, (e,) * 50, answer_starts=(10,)) for e in (0, 1)] * 20
    batches = dealing.sampled(list(dealing.batched(sequences, set(), torch.device("cpu"))), 2)
    chosen = torch.cat([b.stands_for.flatten() for b in batches])
    answer_starts = torch.cat([b.answer_starts.flatten() for b in batches])
    assert (chosen[answer_starts] == 1).all()
    assert (chosen > 0).sum() == 120
    assert chosen[~answer_starts].sum() == 2 * 20 * 49


def test_every_expert_counts_the_same_and_openings_half_of_it():
    plain = examples(3, experts=(0, 1))
    mixed = LabelledSequence((1, 2, 3, 4, 5), (0, 0, UNLABELLED, 1, 1), answer_starts=(3,))
    (batch,) = dealing.batched([*plain, mixed], set(), torch.device("cpu"))
    (weights,) = dealing.token_weights([batch], 2)
    assert (weights[batch.labels == 0].sum() - 1).abs() < 1e-6
    assert len(weights[batch.labels == 0].unique()) == 1  # it has no starts of answers
    assert (weights[batch.labels == 1].sum() - 1).abs() < 1e-6
    assert weights[batch.answer_starts].tolist() == [ANSWER_START_SHARE]


def test_starts_of_answers_are_told_apart_by_what_says_nothing_of_other_tokens():
    """The others differ along four directions, starts along four that are noise to the others."""
    generator = torch.Generator().manual_seed(0)

    def drawn(marked):
        answer_starts = (20,) if marked else ()
        sequences = [LabelledSequence((1,) * 21, (e,) * 21, answer_starts) for e in range(4)] * 40
        batches = dealing.sampled(
            list(dealing.batched(sequences, set(range(0, 160, 5)), torch.device("cpu"))), 4
        )
        inputs = [torch.randn(*b.labels.shape, 9, generator=generator) for b in batches]
        for x, batch in zip(inputs, batches, strict=True):
            own = torch.nn.functional.one_hot(batch.labels.clamp_min(0), 4)
            x[:, :20, :4] += 4 * own[:, :20]
            x[:, 20, 4:8] += 4 * own[:, 20]
            x[:, 20, 8] += 9
        return inputs, batches

    def right(marked):
        inputs, batches = drawn(marked)
        weights = dealing.token_weights(batches, 4)
        to_fit, *_ = train._parts_of(iter(inputs), batches, weights, 4)
        weight, bias = gate_from(to_fit.sums, 0.01)
        shares = []
        for places in (slice(20, 21), slice(20)):
            hits = [
                (x[:, places] @ weight.T + bias).argmax(-1) == b.labels[:, places]
                for x, b in zip(inputs, batches, strict=True)
            ]
            shares.append(torch.cat([h.flatten() for h in hits]).float().mean().item())
        return shares

    answer_starts, others = right(marked=True)
    assert answer_starts > right(marked=False)[0] + 0.2
    assert others > 0.9
