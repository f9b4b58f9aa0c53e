"""An expert more or less, without the others' examples."""

import dataclasses
import random

import pytest
import torch
from safetensors.torch import save_file

from meteora.artifacts import NULL, RouterOptions
from meteora.artifacts.routers import ANSWER_START_SHARE
from meteora.checkpoint.manifest import STATISTICS, CheckpointError
from meteora.checkpoint.tensors import Gates
from meteora.fitting import sequences as dealing
from meteora.fitting.add_expert import (
    SHARE_LOST,
    _keep_to_its_own,
    _tokens_by_kind,
    _with_one_more,
    drop,
    grow,
)
from meteora.fitting.calibrate import calibrate
from meteora.fitting.covariance import Rows, Scatter
from meteora.fitting.lda import gate_from
from meteora.fitting.sequences import UNLABELLED, LabelledSequence, TrainingError, by_kind
from meteora.fitting.statistics import PointStatistics, read_statistics, write_statistics
from meteora.model.fused import expert_names, insert_experts
from meteora.routing.gates import gates_of, insert_gates
from tests.meteora.fitting.test_calibrate import (
    examples,
    lists,
    openings_alone,
    routing_accuracy,
    same_gates,
    task_tokens,
    unmarked,
)

ENTRY = RouterOptions("gate", 1, 1.0, share="point")


def scatter_of(x, labels, weights=None):
    scatter = Scatter.empty(int(labels.max()) + 1, x.mean(0))
    weights = 1 / labels.bincount().float()[labels] if weights is None else weights
    scatter.add(x, labels, weights)
    return scatter


def drawn(num_tokens=400, num_inputs=24, num_experts=4):
    """Tokens whose spread falls off, as that of hidden states does."""
    labels = torch.arange(num_tokens) % num_experts
    scale = 0.7 ** torch.arange(num_inputs)
    means = torch.randn(num_experts, num_inputs) * scale
    return 5 + means[labels] + torch.randn(num_tokens, num_inputs) * scale, labels


def test_the_widest_directions_and_a_floor_are_the_spread_itself_if_all_are_kept():
    scatter = scatter_of(*drawn())
    rows, floor = scatter.covariance().widest(24)
    kept = rows.T @ rows + floor * torch.eye(24).double()
    torch.testing.assert_close(kept, scatter.within, rtol=1e-5, atol=1e-6)
    few, floor = scatter.covariance().widest(6)
    kept = torch.linalg.eigvalsh(few.T @ few + floor * torch.eye(24).double())
    expected = torch.linalg.eigvalsh(scatter.within)
    torch.testing.assert_close(kept[-6:], expected[-6:], rtol=1e-4, atol=0)
    torch.testing.assert_close(kept.sum(), expected.sum())


def test_only_directions_wider_than_asked_are_kept_but_one_at_least():
    scatter = scatter_of(*drawn())
    spread = torch.linalg.eigvalsh(scatter.within).flip(0)
    rows, _ = scatter.covariance().widest(24, least=float(spread[4:6].mean()))
    assert len(rows) == 5
    assert len(scatter.covariance().widest(24, least=float(spread[0] * 2))[0]) == 1


def test_drawn_tokens_have_the_means_and_the_spread_of_the_statistics():
    scatter = scatter_of(*drawn())
    statistics = PointStatistics.of(scatter, 0.1)
    tokens = statistics.drawn(20_000)
    assert torch.equal(tokens, statistics.drawn(20_000))
    means = statistics.means + statistics.shift
    torch.testing.assert_close(tokens.mean(1), means, atol=0.03, rtol=0)
    within = (tokens - means[:, None]).flatten(0, 1).double()
    torch.testing.assert_close(within.T @ within / len(within), scatter.within, atol=0.08, rtol=0)


@pytest.mark.parametrize("num_starts", [0, 7])
def test_a_grown_point_is_what_all_examples_together_would_have_given(monkeypatch, num_starts):
    monkeypatch.setattr("meteora.fitting.statistics.RIDGES", 0.0)
    x, labels = drawn()
    first = PointStatistics.of(scatter_of(x[labels < 3], labels[labels < 3]), 0.1)
    answer_starts = torch.arange(100) < num_starts
    grown, covariance = first.grown(by_kind(x[labels == 3], answer_starts), 3)
    weights = 1 / labels.bincount().float()[labels]
    if num_starts:
        others = (1 - ANSWER_START_SHARE) / (100 - num_starts)
        weights[labels == 3] = torch.where(answer_starts, ANSWER_START_SHARE / num_starts, others)
    together = scatter_of(x, labels, weights)
    torch.testing.assert_close(
        grown.means + grown.shift, (together.means + together.shift).float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        covariance.times(torch.eye(24).double()), together.within, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("open_answers", [True, False])
def test_tokens_of_one_kind_have_the_whole_weight(open_answers):
    tokens = torch.randn(3, 2)
    assert by_kind(tokens, torch.full((3,), open_answers)) == [(1.0, tokens)]


def test_narrowed_statistics_have_the_widest_directions_and_the_whole_variance():
    statistics = PointStatistics.of(scatter_of(*drawn()), 1e-8)
    few = statistics.narrowed(6)
    assert (len(statistics.rows), len(few.rows)) == (24, 6)
    assert statistics.narrowed(24) is statistics
    whole, narrow = (
        Rows(one.rows.float() * one.scalars[0], one.scalars[1].item()) for one in (statistics, few)
    )
    assert narrow.level.item() == pytest.approx(whole.level.item(), rel=1e-3)
    spread = torch.linalg.eigvalsh(whole.times(torch.eye(24).double()))
    kept = torch.linalg.eigvalsh(narrow.times(torch.eye(24).double()))
    torch.testing.assert_close(kept[-6:], spread[-6:], rtol=2e-3, atol=0)
    torch.testing.assert_close(kept[:18], spread[:18].mean().expand(18), rtol=2e-3, atol=0)


def test_statistics_are_written_with_fewer_directions(world, tmp_path, monkeypatch):
    monkeypatch.setattr("meteora.fitting.statistics.MAX_WRITTEN", 6)
    point = PointStatistics.of(scatter_of(*drawn()), 1e-8)
    write_statistics(tmp_path / STATISTICS, {"a.b": point})
    gates = Gates({"a.b": (point.means, torch.zeros(4))})
    (read,) = read_statistics(tmp_path, world.manifest, gates).values()
    assert torch.equal(read.rows, point.narrowed(6).rows)


def test_who_may_read_the_other_files_may_read_the_statistics(tmp_path):
    write_statistics(tmp_path / STATISTICS, {"a.b": PointStatistics.of(scatter_of(*drawn()), 0.1)})
    (tmp_path / "README.md").touch()
    assert (tmp_path / STATISTICS).stat().st_mode == (tmp_path / "README.md").stat().st_mode


def test_narrowed_statistics_are_numbers_where_no_direction_is_wider_than_the_others():
    rows = torch.linalg.qr(torch.randn(9, 9)).Q.half()  # of one length but for rounding
    alike = PointStatistics(torch.zeros(2, 9), torch.zeros(9), rows, torch.tensor([0.1, 0.0, 0.5]))
    for point in (alike, dataclasses.replace(alike, rows=torch.zeros(9, 9).half())):
        few = point.narrowed(6)
        assert few.rows.isfinite().all()
        (kept, floor), (whole, _) = (
            (one.rows.float().square().sum() * one.scalars[0] ** 2, one.scalars[1])
            for one in (few, point)
        )
        assert (kept + 9 * floor).item() == pytest.approx(whole.item(), rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": torch.zeros(3, 5).half()},
        {"scalars": torch.tensor([1.0, 0.0])},
        {"scalars": torch.tensor([0.0, 0.0, 0.5])},
        {"scalars": torch.tensor([1.0, 0.0, 0.0])},
        {"scalars": torch.tensor([1.0, 0.0, 1.5])},
    ],
    ids=["width", "two scalars", "no unit", "no shrinkage", "shrunk too far"],
)
def test_statistics_that_do_not_fit_are_refused(world, tmp_path, wrong):
    limits = torch.tensor([1.0, 0.0, 1.0])  # no floor, all shrunk
    point = dataclasses.replace(PointStatistics.of(scatter_of(*drawn()), 1.0), scalars=limits)
    gates = Gates({"a.b": (point.means, torch.zeros(4))})
    write_statistics(tmp_path / STATISTICS, {"a.b": point})
    read_statistics(tmp_path, world.manifest, gates)
    tensors = {f"a.b.gate.{name}": part for name, part in (vars(point) | wrong).items()}
    save_file(tensors, tmp_path / STATISTICS)
    with pytest.raises(CheckpointError, match=r"a\.b has statistics that do not fit its gate"):
        read_statistics(tmp_path, world.manifest, gates)


def test_statistics_of_a_module_without_a_gate_are_refused(world, tmp_path):
    write_statistics(tmp_path / STATISTICS, {"a.b": PointStatistics.of(scatter_of(*drawn()), 0.1)})
    with pytest.raises(CheckpointError, match=r"a\.b has statistics that do not fit its gate"):
        read_statistics(tmp_path, world.manifest, Gates({}))


def test_statistics_come_back_equal(world, tmp_path):
    written = {"a.b": PointStatistics.of(scatter_of(*drawn()), 0.03)}
    write_statistics(tmp_path / STATISTICS, written)
    gates = Gates({"a.b": (written["a.b"].means, torch.zeros(4))})
    (read,) = read_statistics(tmp_path, world.manifest, gates).values()
    assert read.shrinkage == 0.03
    for field in dataclasses.fields(read):
        assert torch.equal(getattr(read, field.name), getattr(written["a.b"], field.name))


def test_a_new_row_leaves_the_others_what_all_experts_have_in_common():
    """As a template's tokens, which lie far from where tokens of a normal distribution do."""
    torch.manual_seed(0)
    x, labels = drawn(2000)
    common = torch.arange(len(x)) % 5 == 0
    x = torch.where(common[:, None], 6 + 0.02 * x, x)
    old = labels < 3
    before = scatter_of(x[old], labels[old])
    gate = gate_from(before, 0.1)
    known = PointStatistics.of(before, 0.1)
    kinds = [(1.0, x[~old])]
    point, covariance = known.grown(kinds, 3)
    weight, bias = _with_one_more(gate, known, point, covariance, kinds, 3)
    taken = (x[old & common] @ weight.T + bias).argmax(-1) == 3
    own = (x[~old & ~common] @ weight.T + bias).argmax(-1) == 3
    assert taken.float().mean() < 0.1
    assert own.float().mean() > 0.8


@pytest.fixture(scope="module")
def three(world, fuse_adapters, tmp_path_factory):
    """The world without its last adapter: a base, three experts, and their checkpoint."""
    names = [*world.adapters][:3]
    adapters = {name: world.adapters[name] for name in names}
    folder = tmp_path_factory.mktemp("three") / "fused"
    manifest = fuse_adapters(world.base, adapters, folder)
    return dataclasses.replace(world, adapters=adapters, checkpoint=folder, manifest=manifest)


def kept(gates, rows):
    """The gates with these rows alone."""
    own = {path: (weight[rows], bias[rows]) for path, (weight, bias) in gates.own.items()}
    return dataclasses.replace(gates, own=own)


def test_a_model_that_grew_routes_its_new_expert_and_its_old_ones(world, three):
    before = three.load()
    fitted = calibrate(before, examples(8, experts=range(3)))
    old = routing_accuracy(before, examples(4, seed=9, experts=range(3)))
    model = world.load()
    gates = gates_of(before)
    own = examples(8, experts=[3])
    found = grow(model, own, gates, fitted.statistics, ENTRY)
    assert found.num_tokens == sum(sequence.experts.count(3) for sequence in own)
    assert 0.85 < (found.heldout_accuracy or 0) <= 1
    assert same_gates(kept(gates_of(model), slice(3)), gates)
    assert routing_accuracy(model, examples(4, seed=9, experts=[3])) > 0.9
    assert routing_accuracy(model, examples(4, seed=9, experts=range(3))) > old - 0.03
    assert {len(point.means) for point in found.statistics.values()} == {4}


def test_a_new_row_claims_no_more_than_the_held_out_tokens_of_its_expert_need(
    world, three, monkeypatch
):
    """The others' tokens have traces of the new expert that their statistics cannot show."""
    leads = []

    def watch(inputs, batches):
        found = _tokens_by_kind(inputs, batches)
        leads.append(found[1][0][1])
        return found

    monkeypatch.setattr("meteora.fitting.add_expert._tokens_by_kind", watch)
    before, model = three.load(), world.load()
    fitted = calibrate(before, examples(8, experts=range(3)))
    grow(model, examples(8, experts=[3]), gates_of(before), fitted.statistics, ENTRY)
    gates = [gates_of(model).own[path] for path in fitted.statistics]
    assert len(gates) == len(leads)
    for (weight, bias), x in zip(gates, leads, strict=True):
        logits = x @ weight.T + bias
        lead = logits[:, 3] - logits[:, :3].max(1).values
        assert lead.quantile(SHARE_LOST) < 1e-3


@pytest.mark.parametrize(
    ("leads_of_opening", "lost"),
    [
        ((), 0.01),
        ((-3.0, -2.0), 0.01),
        ((4.5, -2.0), 0.045),
        ((90.0, 90.0), 0.9),
        ((200.0, 200.0), 1.0),
    ],
)
def test_of_its_own_a_new_expert_gives_up_more_where_the_opening_would_go_to_it(
    leads_of_opening, lost
):
    weight, bias = torch.tensor([[0.0], [1.0]]), torch.zeros(2)
    own = torch.arange(0.05, 100, 0.1)[:, None]  # the lead of each is its number
    _keep_to_its_own(weight, bias, [own], torch.tensor(leads_of_opening)[:, None], 1)
    assert ((own @ weight.T + bias).argmax(1) == 0).float().mean().item() == pytest.approx(
        lost, abs=0.002
    )


def test_the_opening_is_looked_at_where_one_joins(world, three, monkeypatch):
    before, model = with_opening(three), with_opening(world)
    fitted = calibrate(
        before, [replaced(s, {UNLABELLED: 3}) for s in examples(6, experts=range(3))]
    )
    seen = []
    monkeypatch.setattr(
        "meteora.fitting.add_expert._keep_to_its_own",
        lambda _weight, _bias, _own, opening, _expert: seen.append(len(opening)),
    )
    own = examples(6, experts=[3])
    behind = [replaced(s, {UNLABELLED: 4}) for s in own]
    found = grow(model, behind, gates_of(before), fitted.statistics, ENTRY)
    assert set(seen) == {2 * len(own)}
    begun = [replaced(s, {UNLABELLED: 4}) for s in examples(6, experts=[3], opening=1)]
    seen.clear()
    grow(with_opening(world), begun, gates_of(before), fitted.statistics, ENTRY)
    assert set(seen) == {0}
    assert found.num_tokens == sum(sequence.experts.count(3) for sequence in own)


def test_what_only_a_new_experts_answers_begin_with_is_known_as_its_own(world, three):
    before = three.load()
    fitted = calibrate(before, [*examples(6, experts=range(3)), *lists(36, range(3))])
    unseen, right = openings_alone(lists(24, seed=9), [3]), {}
    own = lists(12, [3], seed=3)
    for key, more in {"not seen": [], "not marked": unmarked(own), "marked": own}.items():
        model = world.load()
        asked = [*examples(6, experts=[3]), *more]
        grow(model, asked, gates_of(before), fitted.statistics, ENTRY)
        right[key] = routing_accuracy(model, unseen)
        assert same_gates(kept(gates_of(model), slice(3)), gates_of(before))
    assert right["marked"] > 0.02 + right["not marked"]
    assert right["marked"] > 0.2 + right["not seen"]


def test_dropping_an_expert_leaves_the_rows_of_the_others_alone(world, three):
    model = world.load()
    fitted = calibrate(model, examples(8))
    gates = gates_of(model)
    left, statistics = drop(gates, fitted.statistics, 3, three.manifest.modules)
    assert same_gates(left, kept(gates, slice(3)))
    assert all(len(statistics[path].means) == 3 for path in left.own)
    smaller = three.load()
    insert_gates(smaller, left, ENTRY)
    assert routing_accuracy(smaller, examples(4, seed=9, experts=range(3))) > 0.9


def with_base(of):
    """A model in which the base is a choice."""
    router = dataclasses.replace(of.manifest.router, null=True)
    model = of.load_base()
    insert_experts(model, of.checkpoint, dataclasses.replace(of.manifest, router=router))
    return model


@pytest.mark.parametrize(("text", "own"), [(4, 0.93), (3, 0.6)], ids=["foreign", "its own"])
def test_a_new_expert_gives_the_base_little_of_its_tokens_and_takes_little(world, three, text, own):
    """The base has a lead over the others; and it may have been fitted to the new one's text."""
    before, model = with_base(three), with_base(world)
    foreign = [replaced(sequence, {text: 3}) for sequence in examples(12, seed=3, experts=[text])]
    fitted = calibrate(before, [*examples(12, experts=range(3)), *foreign])
    grow(model, examples(12, experts=[3]), gates_of(before), fitted.statistics, ENTRY)
    assert routing_accuracy(model, examples(6, seed=9, experts=[3])) > own
    assert routing_accuracy(model, examples(4, seed=9, experts=range(3))) > 0.9


def with_opening(of):
    """A model whose experts have openings together."""
    router = dataclasses.replace(of.manifest.router, opening="shared")
    model = of.load_base()
    insert_experts(model, of.checkpoint, dataclasses.replace(of.manifest, router=router))
    return model


def test_a_new_expert_gets_offsets_beside_those_of_the_others(world, three):
    before, model = with_opening(three), with_opening(world)
    openings = [replaced(s, {UNLABELLED: 3}) for s in examples(6, experts=range(3))]
    fitted = calibrate(before, openings)
    gates = gates_of(before)
    behind = [replaced(s, {UNLABELLED: 4}) for s in examples(6, experts=[3])]
    found = grow(model, behind, gates, fitted.statistics, ENTRY)
    grown = gates_of(model)
    assert grown.offsets.keys() == gates.offsets.keys() != set()
    for path, rows in grown.offsets.items():
        assert torch.equal(rows[[0, 1, 2, 4]], gates.offsets[path])
        assert rows[3].any()
    left, _ = drop(grown, found.statistics, 3, three.manifest.modules)
    assert all(torch.equal(rows, gates.offsets[path]) for path, rows in left.offsets.items())
    dropped = dataclasses.replace(gates, offsets={})
    grow(model, examples(6, experts=[3]), dropped, fitted.statistics, ENTRY)
    assert gates_of(model).offsets == {}


def test_an_expert_that_is_left_alone_is_itself_behind_any_opening(world):
    model = with_opening(world)
    fitted = calibrate(model, [replaced(s, {UNLABELLED: 4}) for s in examples(4)])
    gates, statistics = gates_of(model), fitted.statistics
    modules = world.manifest.modules
    for left in (3, 2, 1):
        assert any(rows.any() for rows in gates.offsets.values())
        modules = {
            path: dataclasses.replace(entry, ranks=entry.ranks[:left], scaling=entry.scaling[:left])
            for path, entry in modules.items()
        }
        gates, statistics = drop(gates, statistics, left, modules)
    assert gates.offsets.keys() == gates_of(model).offsets.keys()
    assert not any(rows.any() for rows in gates.offsets.values())


def test_an_expert_comes_before_the_base_where_that_is_a_choice(world, three):
    before, model = with_base(three), with_base(world)
    foreign = examples(6, experts=[4])
    base_as = [replaced(sequence, {4: 3}) for sequence in foreign]
    fitted = calibrate(before, [*examples(6, experts=range(3)), *base_as])
    found = grow(model, examples(6, experts=[3]), gates_of(before), fitted.statistics, ENTRY)
    assert expert_names(model)[3:] == ["patterns", NULL]
    assert same_gates(kept(gates_of(model), [0, 1, 2, 4]), gates_of(before))
    for e in (3, 4):
        assert routing_accuracy(model, examples(4, seed=9, experts=[e])) > 0.8
    smaller, _ = drop(gates_of(model), found.statistics, 3, three.manifest.modules)
    assert same_gates(smaller, gates_of(before))


def replaced(sequence, places):
    experts = tuple(places.get(e, e) for e in sequence.experts)
    return dataclasses.replace(sequence, experts=experts)


def test_statistics_of_an_input_outlive_its_first_module(three):
    """Each module has a gate, and only the expert that is dropped had gate_proj."""
    options = dataclasses.replace(ENTRY, share="module")
    before = three.load()
    fitted = calibrate(before, examples(6, experts=range(3)), options)
    modules = three.manifest.modules
    left = {path: modules[path] for path in modules if not path.endswith("gate_proj")}
    gates, statistics = drop(gates_of(before), fitted.statistics, 0, left)
    assert len(statistics) == len(fitted.statistics)
    model = three.load()
    grow(model, examples(6, experts=[0]), gates, statistics, options)
    grown = gates_of(model)
    assert not grown.follows
    left = {path: grown.own[path] for path in gates.own}
    assert same_gates(kept(dataclasses.replace(grown, own=left), slice(1, None)), gates)


def test_a_point_that_only_the_new_expert_has_follows_the_gate_before_it(world, three):
    before = three.load()
    fitted = calibrate(before, examples(6, experts=range(3)))
    gone = {p: s for p, s in fitted.statistics.items() if "mlp" not in p}
    model = world.load()
    grow(model, examples(6, experts=[3]), gates_of(before), gone, ENTRY)
    gates = gates_of(model)
    assert gates.follows["model.layers.0.mlp.gate_proj"] == "model.layers.0.self_attn.o_proj"


def test_what_follows_a_gate_of_the_layer_below_follows_its_own_batch(world, three, monkeypatch):
    before = three.load()
    fitted = calibrate(before, examples(6, experts=range(3)))
    old, last = gates_of(before), "model.layers.1.self_attn.q_proj"
    known = {path: point for path, point in fitted.statistics.items() if path != last}
    dice = random.Random(0)
    bodies = [task_tokens(3, 20, dice) for _ in range(6)]
    alike = [LabelledSequence(tuple(body), (3,) * 20) for body in bodies]
    grown = []
    for limit in (1000, 20):
        monkeypatch.setattr(dealing, "TOKENS_PER_BATCH", limit)
        model = world.load()
        found = grow(model, alike, old, known, ENTRY)
        assert gates_of(model).follows[last].startswith("model.layers.0.")
        grown.append({path: point.means for path, point in found.statistics.items()})
    torch.testing.assert_close(grown[1], grown[0], rtol=1e-3, atol=1e-4)


def test_a_gate_grows_where_the_new_expert_has_a_module_before_the_one_that_led(world, three):
    """The new one also targets what comes before v_proj: then that decides for the point."""
    before = three.load()
    fitted = calibrate(before, examples(6, experts=range(3)))
    gates = gates_of(before)
    led = {path: path.replace("q_proj", "v_proj") for path in gates.own if path.endswith("q_proj")}
    moved = dataclasses.replace(
        gates, own={led.get(path, path): gate for path, gate in gates.own.items()}
    )
    statistics = {led.get(path, path): point for path, point in fitted.statistics.items()}
    model = world.load()
    found = grow(model, examples(6, experts=[3]), moved, statistics, ENTRY)
    for path, old in led.items():
        assert torch.equal(gates_of(model).own[path][0][:3], moved.own[old][0])
    assert {*led} <= {*found.statistics}


def test_numbers_that_are_not_finite_are_refused_with_the_module(world, three):
    before, model = three.load(), world.load()
    fitted = calibrate(before, examples(4, experts=range(3)))
    with torch.no_grad():
        model.get_submodule("model.layers.1.input_layernorm").weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.q_proj: .*NaN"):
        grow(model, examples(4, experts=[3]), gates_of(before), fitted.statistics, ENTRY)


def test_statistics_beyond_float32_make_no_gate_that_cannot_be_loaded(world, three):
    before, model = with_base(three), with_base(world)
    base_as = [replaced(sequence, {4: 3}) for sequence in examples(4, experts=[4])]
    fitted = calibrate(before, [*examples(4, experts=range(3)), *base_as])
    far = {
        path: dataclasses.replace(point, means=torch.full_like(point.means, 3e38))
        for path, point in fitted.statistics.items()
    }
    with pytest.raises(TrainingError, match="hold numbers too large"):
        grow(model, examples(4, experts=[3]), gates_of(before), far, ENTRY)


def test_gates_grow_by_one_expert_at_a_time(world, three):
    model = three.load()
    fitted = calibrate(model, examples(4, experts=range(3)))
    with pytest.raises(TrainingError, match=r"of 2 experts.*4 choices.*of 3"):
        grow(world.load(), examples(4, experts=[2, 3]), gates_of(model), fitted.statistics, ENTRY)
