"""In 16 bits a plain projection and its experts are one sum: rounded once, as the bare layer's."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meteora.artifacts import RouterOptions
from meteora.kernels import reference
from meteora.kernels.addmm import Plain
from meteora.kernels.dispatch import IN_TORCH
from meteora.kernels.stack import ExpertStack
from meteora.routing.expert_cache import ExpertCache
from meteora.routing.layer import MoELoRALinear
from meteora.routing.routers import Gate

RANKS, SCALING = [8, 2, 0, 16, 3, 8], [2.0, 0.5, 1.0, 2.0, 1.7, 0.25]
SMALL, TRAINED, LARGE = 0.03, 0.1, 1.0
"""What the experts say, over what the projection says. In fourteen trained adapters for SmolLM2 the
median module has 0.005 to 0.07, nine in ten have up to 0.16, and the largest of all has 0.34."""


def make(
    projection,
    num_in,
    num_out,
    dtype,
    *,
    x,
    kernel=None,
    top_k=2,
    say=TRAINED,
    cached=False,
    seed=0,
):
    """A layer whose experts say `say` times as much as its projection, on tokens x [T, IN]."""
    torch.manual_seed(seed)
    projection = projection.to(dtype).requires_grad_(requires_grad=False)
    gate = Gate(
        torch.randn(len(RANKS), num_in), torch.zeros(len(RANKS)), RouterOptions("gate", top_k, 1.0)
    )
    lora_a = torch.randn(sum(RANKS), num_in) / num_in**0.5
    lora_b = torch.randn(num_out, sum(RANKS))
    layer = MoELoRALinear(
        projection,
        ExpertStack(lora_a.to(dtype), lora_b.to(dtype), RANKS, SCALING, mapped=cached),
        gate.to(dtype),
        cache=ExpertCache(1 << 20) if cached else None,
    ).eval()
    layer.kernel = kernel
    with torch.no_grad():
        bare, delta = in_float64(layer, x)
        layer.stack.b.mul_(say * bare.norm() / delta.norm())
    return layer


def in_float64(layer, x):
    """What the projection and the experts say, [T, OUT] each."""
    weights, experts = layer.router.choose(x)
    weight = layer.weight if isinstance(layer.projection, Conv1D) else layer.weight.T
    bare = x.double() @ weight.double()
    if layer.projection.bias is not None:
        bare = bare + layer.projection.bias.double()
    stack = ExpertStack(layer.stack.a.double(), layer.stack.b.double(), RANKS, SCALING)
    return bare, reference.lora_delta_loop(x.double(), stack, weights.double(), experts)


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def over_bare(layer, x):
    """The relative error of the routed layer over that of the bare one, against float64."""
    with torch.no_grad():
        bare, delta = in_float64(layer, x)
        return error(layer(x), bare + delta) / error(layer.projection(x), bare)


def linear(num_in, num_out):
    return nn.Linear(num_in, num_out, bias=False)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(256, 192, 320), (16, 1024, 576)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("say", [SMALL, TRAINED])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_error_is_no_worse_than_the_bare_layers_own(device, kernel, dtype, say, top_k):
    for seed, (num_tokens, num_in, num_out) in enumerate(SHAPES):
        x = torch.randn(num_tokens, num_in).to(dtype)
        asked = {"kernel": kernel, "top_k": top_k, "say": say, "seed": seed}
        layer = make(linear(num_in, num_out), num_in, num_out, dtype, x=x, **asked)
        assert over_bare(layer.to(device), x.to(device)) <= 1.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_after_the_other_is_as_exact(dtype):
    """Decoding: another kernel, and matrices of one row."""
    x = torch.randn(64, 576).to(dtype)
    layer = make(linear(576, 320), 576, 320, dtype, x=x)
    with torch.no_grad():
        bare, delta = in_float64(layer, x)
        rows = torch.cat([layer(token) for token in x.split(1)])
        assert error(rows, bare + delta) <= 1.05 * error(layer.projection(x), bare)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [False, True])
def test_experts_in_32_bits_on_a_base_in_16_are_as_exact(dtype, cached):
    """As PEFT saves most of them; what they say is rounded at its own size, three times that."""
    x = torch.randn(256, 192).to(dtype)
    layer = make(linear(192, 320), 192, 320, dtype, x=x, say=3 * TRAINED, cached=cached)
    layer.stack.a, layer.stack.b = layer.stack.a.float(), layer.stack.b.float()
    assert over_bare(layer, x) <= 1.05
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_one_by_one_beside_a_projection_lose_more(dtype):
    """As PEFT adds them up: every product and every sum is rounded."""
    x = torch.randn(256, 192).to(dtype)
    layer = make(linear(192, 320), 192, 320, dtype, x=x)
    with torch.no_grad():
        bare, delta = in_float64(layer, x)
        weights, experts = layer.router.choose(x)
        plain, start = layer.projection(x), 0
        for e, r in enumerate(RANKS):
            ranks = slice(start, start := start + r)
            share = (weights * (experts == e)).sum(-1, keepdim=True).to(dtype)
            added = x @ layer.stack.a[ranks].T @ layer.stack.b[:, ranks].T * SCALING[e]
            plain = plain + added * share
        assert error(layer(x), bare + delta) <= 0.75 * error(plain, bare + delta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_experts_that_say_as_much_as_the_projection_cost_no_more_than_beside_it(dtype, kernel):
    """What they say is rounded to 16 bits too, and at that size it shows. Called and then added to,
    as every other module is, the projection is as far off or further."""
    x = torch.randn(256, 192).to(dtype)
    layer = make(linear(192, 320), 192, 320, dtype, x=x, say=LARGE, kernel=kernel)
    one_sum = over_bare(layer, x)
    layer.projection.register_forward_hook(lambda *_: None)
    assert one_sum <= min(1.85, 1.03 * over_bare(layer, x))


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_rounded_with_what_the_experts_say(kernel, kind, dtype):
    """It shows where it is large: of a third of the output here."""
    x = torch.randn(256, 192).to(dtype)
    projection = nn.Linear(192, 320) if kind is nn.Linear else Conv1D(320, 192)
    with torch.no_grad():
        projection.weight.normal_(std=192**-0.5)
        projection.bias.normal_(std=0.3)
    layer = make(projection, 192, 320, dtype, x=x, kernel=kernel)
    assert over_bare(layer, x) <= 1.1


@pytest.fixture
def layer_and_x():
    x = torch.randn(4, 6, 24).bfloat16()
    return make(nn.Linear(24, 20), 24, 20, torch.bfloat16, x=x.reshape(-1, 24)), x


class _Doubled(nn.Linear):
    def forward(self, input):  # noqa: A002  (torch's name)
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.register_forward_hook(lambda _m, _x, y: 2 * y),
        lambda p: p.register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
        lambda p: setattr(p, "forward", lambda x: 2 * nn.Linear.forward(p, x)),  # as accelerate's
        lambda p: setattr(p, "__class__", _Doubled),
    ],
    ids=["hook", "pre-hook", "forward", "subclass"],
)
def test_a_projection_that_does_more_than_a_matmul_is_called(layer_and_x, change):
    layer, x = layer_and_x
    projection, before = layer.projection, layer.projection(x)
    assert Plain.of(projection, x)
    change(projection)
    assert Plain.of(projection, x) is None
    with torch.no_grad():
        layer.stack.b.zero_()
        assert torch.equal(layer(x), projection(x))
        assert not torch.equal(layer(x), before)


class _Quantised(torch.Tensor):
    """As libraries have them that quantise or distribute weights in place."""


def test_weights_that_are_no_plain_tensors_are_left_to_their_projection(layer_and_x):
    layer, x = layer_and_x
    projection = layer.projection
    projection.weight = nn.Parameter(projection.weight.data.as_subclass(_Quantised))
    assert isinstance(projection, nn.Linear)
    assert Plain.of(projection, x) is None


def test_hooks_of_torch_and_autocast_have_the_projection_called(layer_and_x):
    layer, x = layer_and_x
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    layer(x)
    hook.remove()
    assert layer.projection in seen
    with torch.autocast("cpu", torch.float16):
        assert Plain.of(layer.projection, x) is None
        assert layer(x).dtype == layer.projection(x).dtype
    assert Plain.of(layer.projection, x)


def test_in_32_bits_the_projection_is_called(layer_and_x):
    layer, x = layer_and_x
    assert Plain.of(layer.float().projection, x.float()) is None


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_gates_and_what_lies_below_learn_through_the_sum(layer_and_x, kernel):
    layer, x = layer_and_x
    layer.kernel = kernel
    grads = []
    for by_hook in (False, True):  # a hook has the projection called
        layer.zero_grad()
        if by_hook:
            layer.projection.register_forward_hook(lambda *_: None)
        inputs = x.clone().requires_grad_()
        layer(inputs).float().square().sum().backward()
        grads.append((layer.router.weight.grad, layer.router.bias.grad, inputs.grad))
    for got, expected in zip(*grads, strict=True):
        assert got.any()
        assert ((got - expected).norm() / expected.norm()).item() < 0.02


def test_it_compiles_into_one_graph(layer_and_x):
    layer, _ = layer_and_x
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 1, 24).bfloat16()
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.nn.functional.linear in called  # the gate's
    assert "addmm_" in {node.target for node in graph.graph.nodes if node.op == "call_method"}


def test_the_base_alone_is_called_as_it_is(layer_and_x):
    layer, x = layer_and_x
    layer.router = None
    assert torch.equal(layer(x), layer.projection(x))


def test_no_tokens_and_no_batch_have_their_shapes(layer_and_x):
    layer, x = layer_and_x
    assert layer(x[:0]).shape == (0, 6, 20)
    assert layer(x[0, 0]).shape == (20,)
