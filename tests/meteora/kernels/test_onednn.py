"""oneDNN's products equal torch's, and torch computes those that it has to see itself."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from meteora.kernels import onednn

IN, OUT = 256, 192
WIDE = pytest.mark.skipif(not onednn._has_wide_kernels(), reason="needs a CPU of AMD with AVX-512")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the products that oneDNN computed."""
    seen = []
    multiply = torch.ops.mkldnn._linear_pointwise

    def noted(x, weight, *rest):
        seen.append((*x.shape, len(weight)))
        return multiply(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    return seen


def drawn(num_tokens=64, num_in=IN, num_out=OUT):
    torch.manual_seed(0)
    return torch.randn(num_tokens, num_in), torch.randn(num_out, num_in), torch.randn(num_out)


def expected(x, weight, bias):
    return (x.double() @ weight.double().mT + bias.double()).float()


@WIDE
@pytest.mark.parametrize("shape", [(64, IN), (4, 16, IN), (1, 1, 90 * IN)])
def test_a_product_is_torchs_but_for_rounding(calls, shape):
    _, weight, bias = drawn(num_in=shape[-1])
    x = torch.randn(shape)
    torch.testing.assert_close(
        onednn.linear(x, weight, bias), expected(x, weight, bias), atol=2e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        onednn.linear(x, weight), expected(x, weight, torch.zeros(OUT)), atol=2e-4, rtol=1e-5
    )
    assert calls == [(*shape, OUT)] * 2


@WIDE
def test_factors_may_be_transposed(calls):
    x, weight, bias = drawn()
    turned = x.T.contiguous().T, weight.T.contiguous().T
    torch.testing.assert_close(
        onednn.linear(*turned, bias), expected(x, weight, bias), atol=1e-4, rtol=1e-5
    )
    assert calls == [(64, IN, OUT)]


class _Kind(torch.Tensor):
    """A tensor of another library."""


FOR_TORCH = {
    "rows of a wider matrix": lambda x, w, b: (x, torch.cat([w, w], dim=1)[:, :IN], b),
    "16 bits": lambda *tensors: [tensor.bfloat16() for tensor in tensors],
    "64 bits": lambda *tensors: [tensor.double() for tensor in tensors],
    "few numbers": lambda x, w, b: (x[:8], w[:8], b[:8]),
    "one token": lambda x, w, b: (x[:1].repeat(1, 64), w.repeat(1, 64), b),
    "no tokens": lambda x, w, b: (x[:0], w, b),
    "few numbers with gradients": lambda x, w, b: (x[:64].requires_grad_(), w, b),
    "another kind of weight": lambda x, w, b: (x, w.as_subclass(_Kind), b),
    "another kind of tokens": lambda x, w, b: (x.as_subclass(_Kind), w, b),
    "a bias with gaps": lambda x, w, b: (x, w, torch.stack([b, -b], dim=1)[:, 0]),
    "one number for all of the bias": lambda x, w, b: (x, w, b[:1].expand(OUT)),
    "a bias of one number": lambda x, w, b: (x, w, b[0]),
    "a bias for each token": lambda x, w, b: (x, w, torch.outer(x[:, 0], b)),
    "one row of weights": lambda x, w, _: (x.repeat(64, 1), w[0], None),
    "sparse weights": lambda x, w, _: (x, w.to_sparse_csr(), None),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # of torch itself
@pytest.mark.parametrize("change", FOR_TORCH.values(), ids=list(FOR_TORCH))
def test_torch_computes_what_it_has_to_see_or_what_is_small(calls, change):
    x, weight, bias = change(*drawn())
    assert torch.equal(onednn.linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert not calls


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (OUT, OUT, IN)])
def test_what_is_wrong_is_said_by_torch(calls, shape):
    with pytest.raises(RuntimeError, match=r"\(64x256 and 257x192\)|dimensions"):
        onednn.linear(drawn()[0], torch.randn(shape))
    assert not calls


def test_a_single_number_is_refused_by_torch():
    x, weight, _ = drawn()
    for wrong in ((x[0, 0], weight), (x, weight[0, 0])):
        with pytest.raises(RuntimeError, match="at least 1D"):
            onednn.linear(*wrong)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch itself
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_products_are_traced_and_counted(calls):
    x, weight, bias = drawn()
    traced = torch.jit.trace(lambda x: onednn.linear(x, weight, bias), (x,), check_trace=False)
    assert torch.equal(traced(x), nn.functional.linear(x, weight, bias))
    with FlopCounterMode(display=False) as counter:
        onednn.linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * OUT
    assert not calls


@WIDE
@pytest.mark.parametrize("shape", [(2, 128, IN), (128 * IN,)], ids=["tokens", "one"])
@pytest.mark.parametrize("asked", ["x", "w", "b", "xw", "xb", "xwb"])
def test_gradients_are_torchs_but_for_rounding(calls, asked, shape):
    _, weight, bias = drawn(num_in=shape[-1])
    x = torch.randn(shape)
    wanted = [
        one.requires_grad_()
        for one, name in zip((x, weight, bias), "xwb", strict=True)
        if name in asked
    ]
    own, torchs = (
        torch.autograd.grad(multiply(x, weight, bias).square().sum(), wanted)
        for multiply in (onednn.linear, nn.functional.linear)
    )
    for one, other in zip(own, torchs, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    assert len(calls) == 1 + ("x" in asked) + ("w" in asked)


@WIDE
@pytest.mark.parametrize(("num_in", "num_out"), [(8, 576), (576, 8)])
def test_the_gradient_of_a_factor_of_lora_has_its_few_rows_in_front(calls, num_in, num_out):
    x, weight, _ = drawn(1024, num_in, num_out)
    weight.requires_grad_()
    own, torchs = (
        torch.autograd.grad(multiply(x, weight).square().sum(), weight)[0]
        for multiply in (onednn.linear, nn.functional.linear)
    )
    assert (own - torchs).norm() < 1e-5 * torchs.norm()
    assert calls[1:] == [(8, 1024, 576)]


@WIDE
def test_a_model_may_change_a_product_in_place(calls):
    x, (_, weight, bias) = torch.randn(2, 128, IN), drawn()
    weight.requires_grad_()
    own, torchs = (
        torch.autograd.grad(multiply(x, weight, bias).relu_().square().sum(), weight)[0]
        for multiply in (onednn.linear, nn.functional.linear)
    )
    assert (own - torchs).norm() < 1e-5 * torchs.norm()
    assert calls


@WIDE
def test_a_gradient_of_a_gradient_is_torchs(calls):
    x, weight, _ = drawn(num_tokens=256)
    weight.requires_grad_()

    def twice(multiply):
        (of_weight,) = torch.autograd.grad(
            multiply(x, weight).square().sum(), weight, create_graph=True
        )
        return torch.autograd.grad(of_weight.square().sum(), weight)[0]

    own, torchs = map(twice, (onednn.linear, nn.functional.linear))
    assert (own - torchs).norm() < 1e-5 * torchs.norm()
    assert calls


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch itself
def test_transforms_of_functions_are_torchs(calls):
    x, weight, bias = drawn(num_tokens=256)

    def transformed(multiply):
        def loss(weight, x):
            return multiply(x, weight, bias).square().mean()

        of_each = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x.view(2, 128, IN))
        along = torch.func.jvp(lambda w: torch.func.grad(loss)(w, x), (weight,), (weight,))
        return of_each, *along

    for own, torchs in zip(*map(transformed, (onednn.linear, nn.functional.linear)), strict=True):
        assert torch.equal(own, torchs)
    assert not calls


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch itself
def test_directional_derivatives_are_torchs(calls):
    x, weight, bias = drawn()
    with forward_ad.dual_level():
        along_x = onednn.linear(forward_ad.make_dual(x, 2 * x), weight, bias)
        along_w = onednn.linear(x, forward_ad.make_dual(weight, 2 * weight), bias)
        for y in (along_x, along_w):
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, 2 * x @ weight.T)
    assert not calls


@pytest.mark.filterwarnings("ignore:TF32")  # of torch itself, as it sets the switch
def test_autocast_and_the_switch_of_torch_are_heeded(calls):
    tensors = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(*tensors).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        onednn.linear(*tensors)
    assert not calls


def test_a_compiled_graph_has_torchs_product(calls):
    tensors = drawn()
    compiled = torch.compile(onednn.linear, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(*tensors), nn.functional.linear(*tensors))
    assert not calls


@pytest.mark.parametrize(
    ("facts", "product"),
    [("GenuineIntel", onednn.PRODUCT), (None, onednn.PRODUCT), ("AuthenticAMD", "_renamed")],
    ids=["Intel", "unknown", "another torch"],
)
def test_on_another_cpu_or_torch_nothing_changes(calls, monkeypatch, tmp_path, facts, product):
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(onednn, "CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(onednn, "PRODUCT", product)
    onednn._has_wide_kernels.cache_clear()
    model = nn.Sequential(nn.Linear(IN, OUT))
    try:
        onednn.use_in(model)
        onednn.linear(*drawn())
    finally:
        onednn._has_wide_kernels.cache_clear()
    assert type(model[0]) is nn.Linear
    assert not calls


class _Own(nn.Linear):
    """A layer of another library."""


@WIDE
def test_the_linear_layers_of_a_model_multiply_by_it_and_stay_what_they_are(calls):
    model = nn.Sequential(nn.Linear(IN, OUT), _Own(OUT, OUT), nn.Linear(OUT, 4).bfloat16())
    weights = dict(model.state_dict())
    onednn.use_in(model)
    assert [type(layer) for layer in model] == [onednn.Linear, _Own, nn.Linear]
    assert all(
        tensor is weights[name] or torch.equal(tensor, weights[name])
        for name, tensor in model.state_dict().items()
    )
    x = drawn()[0]
    with torch.inference_mode():
        y = model[0](x)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert torch.equal(same[0](x), y)
    assert len(calls) == 3


@WIDE
def test_a_layer_that_accelerate_loads_for_each_call_multiplies_by_it(calls):
    from accelerate import cpu_offload  # noqa: PLC0415  (slow to import)

    model = nn.Sequential(nn.Linear(IN, OUT)).requires_grad_(requires_grad=False)
    weight, bias = (tensor.clone() for tensor in model.parameters())
    x = drawn()[0]
    cpu_offload(model, execution_device=torch.device("cpu"))
    onednn.use_in(model)
    torch.testing.assert_close(model(x), expected(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert calls
