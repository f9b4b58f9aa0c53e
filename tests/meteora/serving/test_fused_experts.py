"""Experts added to a server's joined projections give what the routed layers give."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

import meteora
from meteora.artifacts import RouterOptions
from meteora.artifacts.routers import SERVABLE
from meteora.base.chat_template import Template
from meteora.checkpoint.manifest import GATES, read_manifest
from meteora.checkpoint.tensors import write_gates
from meteora.kernels.dispatch import IN_TORCH
from meteora.kernels.stack import ExpertStack
from meteora.routing.layer import MoELoRALinear, RoutedExperts, routed_layers
from meteora.routing.routers import Gate
from meteora.serving import fused_experts
from meteora.serving.folded_experts import FoldedExperts, plain_linear
from meteora.serving.fused_experts import Part, ServedExperts, parts_of
from meteora.serving.served_turns import Requests
from meteora.serving.vllm_version import UnservableError
from tests.meteora.serving.served_world import JOINED, random_gates, with_router

IDS = torch.arange(3, 43)[None]
TEMPLATE = Template((3, 4), (25, 26))
ROUTERS = {
    "one decision a module": RouterOptions("gate", 1, 1.0),
    "one decision a point, mean": RouterOptions("gate", 1, 1.0, opening="shared", share="point"),
    "one decision a layer": RouterOptions("gate", 2, 0.5, share="layer"),
    "one decision a turn": RouterOptions("gate", 1, 1.0, opening="prompt", share="turn"),
    "margin, base": RouterOptions("gate", 3, 1.0, margin=2.0, null=True, share="point"),
    **{kind: RouterOptions(kind, 2, 0.5) for kind in SERVABLE if kind != "gate"},
}


def unequal(manifest):
    """The same experts, whose scaling differs between modules of one input."""
    doubled = {
        path: replace(entry, scaling=tuple(2 * scaling for scaling in entry.scaling))
        for path, entry in manifest.modules.items()
        if path.endswith(("v_proj", "up_proj"))
    }
    return replace(manifest, modules=manifest.modules | doubled)


def groups(manifest, served):
    """The parts with experts of each joined projection, and its size; in the order of calls."""
    for layer in range(2):
        for joined, names in JOINED.items():
            place = "self_attn" if joined in {"qkv_proj", "o_proj"} else "mlp"
            paths = [f"model.layers.{layer}.{place}.{name}" for name in names]
            sizes = [served[path].weight.shape[0] for path in paths]
            parts = list(parts_of(f"model.layers.{layer}.{place}", names, sizes))
            yield paths, [part for part in parts if part.path in manifest.modules], sum(sizes)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kernel", [None, *IN_TORCH])
def test_joined_projections_give_what_the_routed_layers_give(
    world, tmp_path, monkeypatch, router, kernel
):
    """Ragged ranks and scalings, modules that experts lack; in one stack, or each in its own."""
    if kernel is not None:
        monkeypatch.setattr(fused_experts, "_is_dense", lambda *_: False)
    options, out = ROUTERS[router], tmp_path / "made"
    template = TEMPLATE if options.by_turns else Template()
    given = unequal(world.manifest)
    folder = with_router(world.checkpoint, given, world.base, options, out, template)
    model = meteora.load(folder, base_folder=world.base, dtype="float32")[0]
    served, manifest = ServedExperts(folder), read_manifest(folder)
    if served.manifest.router.by_turns:
        served.read_turns(4, 64).see(IDS[0], Requests([0, IDS.shape[1]], [IDS.shape[1]], [1]))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(path):
        def hook(_module, args, out):
            seen[path] = args[0][0], out[0]

        return hook

    linears = {
        path: layer.projection if isinstance(layer, MoELoRALinear) else layer
        for path, layer in model.named_modules()
        if isinstance(layer, MoELoRALinear | torch.nn.Linear)
    }
    for path in linears:
        model.get_submodule(path).register_forward_hook(keep(path))
    with torch.inference_mode():
        model(IDS)
        for paths, parts, size in groups(manifest, linears):
            x = seen[paths[0]][0]
            weight = torch.cat([linears[path].weight for path in paths])
            experts = served.build(parts, weight)
            for layer in experts.layers:
                layer.kernel = kernel
            y = linear(x, experts.join(weight))
            assert y.shape[1] == size + experts.num_joined
            expected = torch.cat([seen[path][1] for path in paths], dim=1)
            torch.testing.assert_close(experts.add(x, y), expected, atol=1e-5, rtol=1e-5)


def test_experts_apart_from_the_projection_change_any_output_in_place(world):
    path = "model.layers.0.mlp.down_proj"
    entry = world.manifest.modules[path]
    weight = torch.randn(entry.out_features, entry.in_features)
    experts = ServedExperts(world.checkpoint).build([Part(path, 0, len(weight))], weight)
    assert experts.join(weight) is weight
    x = torch.randn(5, entry.in_features)
    expected = experts.add(x, torch.zeros(5, len(weight)))
    assert expected.count_nonzero()
    y = torch.zeros(5, len(weight) + 3)[:, : len(weight)]  # as matmuls that pad it give it
    experts.add(x, y)
    torch.testing.assert_close(y, expected)


def test_small_experts_of_one_point_are_one_stack_and_others_share_their_first_matmul(
    world, tmp_path, monkeypatch
):
    options = ROUTERS["one decision a point, mean"]
    manifest = unequal(world.manifest)
    folder = with_router(world.checkpoint, manifest, world.base, options, tmp_path / "made")
    parts = list(parts_of("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj"], [32, 16, 16]))
    small = ServedExperts(folder).build(parts, torch.empty(64, 32))
    assert small.inline
    (layer,) = small.layers
    assert isinstance(layer, FoldedExperts)
    choices, ranks = layer.scaling.shape
    assert ranks == 12 + 9 + 16 + 2  # of q, k and v together
    assert layer.first is None
    assert small.join(torch.empty(64, 32)).shape == (64 + ranks + choices, 32)
    assert layer.rows is None  # the server has them now
    bfloat16 = torch.empty(64, 32, dtype=torch.bfloat16)
    half = ServedExperts(folder).build(parts, bfloat16)
    (layer,) = half.layers
    assert isinstance(layer, FoldedExperts)
    assert layer.first
    assert layer.first.weight.dtype == torch.float32  # as experts and gates are in the checkpoint
    assert half.join(bfloat16) is bfloat16
    monkeypatch.setattr(fused_experts, "_is_dense", lambda *_: False)
    large = ServedExperts(folder).build(parts, torch.empty(64, 32))
    assert not large.inline
    shares = [layer.shared for layer in large.layers if isinstance(layer, RoutedExperts)]
    assert len({share.matmul for share in shares if share}) == 1
    assert len(shares) == 3


@torch.no_grad()
@pytest.mark.parametrize("with_offsets", [True, False])
@pytest.mark.parametrize("experts", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [torch.bfloat16, torch.float32])
def test_experts_of_a_base_of_16_bits_are_folded(gate, experts, with_offsets):
    torch.manual_seed(0)
    stack = ExpertStack(torch.randn(9, 32), torch.randn(16, 9), [4, 2, 3], [0.3, 1.0, 2.0])
    layer = RoutedExperts(stack)
    layer.router = Gate(torch.randn(3, 32), torch.randn(3), ROUTERS["one decision a module"])
    if with_offsets:
        layer.router.offsets = torch.randn(3, 16)
    layer.to(experts)
    layer.router.to(gate)
    folded = FoldedExperts.of(layer, plain_linear, torch.bfloat16)
    assert folded
    assert (folded.gate is None) == (gate == experts)
    rows = folded.take_rows()
    assert (rows is not None) == (gate == experts == torch.bfloat16)
    x, y = torch.randn(5, 32).bfloat16(), torch.randn(5, 16).bfloat16()
    found = y.clone()
    folded.add(x, found, x[:, :0] if rows is None else linear(x, rows))
    layer.add(x, y)
    torch.testing.assert_close(found, y, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(
    ("names", "sizes", "kind"),
    [
        (["q_proj", "k_proj", "v_proj"], [32, 16, 16], RoutedExperts),
        (["o_proj"], [32], FoldedExperts),
    ],
)
def test_modules_that_have_offsets_are_stacks_of_their_own(world, tmp_path, names, sizes, kind):
    options = ROUTERS["one decision a point, mean"]
    folder = with_router(world.checkpoint, world.manifest, world.base, options, tmp_path / "made")
    gates = random_gates(read_manifest(folder), Template(), ["q_proj", "v_proj", "o_proj"])
    write_gates(folder / GATES, gates)
    parts = list(parts_of("model.layers.1.self_attn", names, sizes))
    weight = torch.zeros(sum(sizes), 32)
    experts = ServedExperts(folder).build(parts, weight)
    assert [type(layer) for layer in experts.layers] == [kind] * len(names)
    x = torch.randn(5, 32)
    y = experts.add(x, linear(x, experts.join(weight)))
    layers = routed_layers(meteora.load(folder, base_folder=world.base, dtype="float32")[0])
    with torch.inference_mode():
        for part in parts:
            layer = layers[part.path]
            found = layer(x) - layer.projection(x)
            torch.testing.assert_close(y[:, part.start : part.end], found, atol=1e-5, rtol=1e-5)


def test_experts_of_gates_that_wait_are_part_of_a_graph_too(world, tmp_path):
    options = ROUTERS["one decision a turn"]
    out = tmp_path / "made"
    served = ServedExperts(
        with_router(world.checkpoint, world.manifest, world.base, options, out, TEMPLATE)
    )
    served.read_turns(4, 64)
    parts = list(parts_of("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj"], [32, 16, 16]))
    assert served.build(parts, torch.empty(64, 32)).inline
    assert served.in_order(parts)


def test_layers_are_kept_in_order_where_they_need_what_others_decide(world, tmp_path):
    own = [Part("model.layers.0.self_attn.q_proj", 0, 32)]
    for name, elsewhere in {
        "one decision a module": False,
        "one decision a layer": True,
        "one decision a turn": True,
        "norm": False,
    }.items():
        out = tmp_path / name
        with_router(world.checkpoint, world.manifest, world.base, ROUTERS[name], out)
        assert ServedExperts(out).in_order(own) is elsewhere


def test_experts_of_another_size_are_refused(world):
    with pytest.raises(UnservableError, match=r"the experts take 32 inputs and give 32, this"):
        ServedExperts(world.checkpoint).build(
            [Part("model.layers.0.self_attn.q_proj", 0, 16)], torch.empty(16, 32)
        )


def test_gates_that_wait_for_questions_are_refused_where_nobody_shows_these(world, tmp_path):
    options = ROUTERS["one decision a turn"]
    folder = with_router(world.checkpoint, world.manifest, world.base, options, tmp_path / "made")
    with pytest.raises(UnservableError, match=r"shows no tokens to a plugin; set `router: \{share"):
        ServedExperts(folder).build(
            [Part("model.layers.0.self_attn.q_proj", 0, 32)], torch.empty(32, 32)
        )


def test_parts_of_a_joined_projection_and_of_a_module_that_is_one():
    assert list(parts_of("a.b", ["q", "k"], [4, 2])) == [Part("a.b.q", 0, 4), Part("a.b.k", 4, 6)]
    assert list(parts_of("", ["qkv"], [4, 2])) == [Part("qkv", 0, 6)]
    with pytest.raises(UnservableError, match="joins q, k in 3 parts"):
        list(parts_of("a", ["q", "k"], [4, 2, 2]))


def test_another_process_reads_the_tensors_itself(world):
    served = ServedExperts(world.checkpoint)
    served.build([Part("model.layers.0.self_attn.q_proj", 0, 32)], torch.empty(32, 32))
    sent = pickle.dumps(served)
    assert len(sent) < 1000
    assert pickle.loads(sent).manifest == world.manifest  # noqa: S301
