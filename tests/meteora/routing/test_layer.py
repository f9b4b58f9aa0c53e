"""The routed layer: every kernel the same, no copies of weights, one graph."""

import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from meteora.artifacts import RouterOptions
from meteora.kernels import gather_grouped, reference
from meteora.kernels.dispatch import IN_TORCH
from meteora.kernels.stack import ExpertStack, mean_of_all, own_choices
from meteora.routing.layer import MoELoRALinear, routed_layers
from meteora.routing.routers import Gate

RANKS, SCALING = [4, 0, 1, 3], [2.0, 0.0, 0.5, 1.5]


def make(num_in=12, num_out=10, *, ranks=RANKS, top_k=2, kernel=None, seed=0, mean=False):
    """A layer; with `mean`, one more choice is the mean of all its experts."""
    torch.manual_seed(seed)
    scaling = [0.5 + e for e in range(len(ranks))]
    choices = [*own_choices(ranks), *([mean_of_all(ranks)] if mean else [])]
    layer = MoELoRALinear(
        nn.Linear(num_in, num_out).requires_grad_(requires_grad=False),
        ExpertStack(
            torch.randn(sum(ranks), num_in) / num_in**0.5,
            torch.randn(num_out, sum(ranks)),
            ranks,
            scaling,
            choices,
        ),
        Gate(
            torch.randn(len(choices), num_in),
            torch.randn(len(choices)),
            RouterOptions("gate", top_k, 1.0),
        ),
    )
    layer.kernel = kernel
    return layer.eval()


def definition(layer, x):
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = layer.router.route(layer.router(tokens))
    delta = reference.lora_delta_loop(tokens, layer.stack, weights, experts)
    return layer.projection(x) + delta.view(*x.shape[:-1], delta.shape[-1])


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (0, 12), (1, 1, 12)])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mean", [False, True])
def test_every_kernel_gives_the_same_layer_in_every_mode(kernel, shape, mode, mean):
    layer, x = make(kernel=kernel, mean=mean), torch.randn(shape)
    with mode():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [*IN_TORCH])
@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.sampled_from([0, 1, 3, 8]), min_size=1, max_size=5),
    top_k=st.integers(1, 6),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
    margin=st.sampled_from([None, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    num_tokens=st.integers(0, 9),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_layer_is_its_definition_in_every_dtype_after_loading_and_moving(
    kernel, ranks, top_k, temperature, margin, dtype, num_tokens, training, seed
):
    layer = make(ranks=ranks, top_k=top_k, kernel=kernel, seed=seed)
    layer.load_state_dict(make(ranks=ranks, top_k=top_k, seed=seed + 1).state_dict())
    layer.to(dtype).train(training)
    layer.router.options = RouterOptions("gate", top_k, temperature, margin)
    x = torch.randn(num_tokens, 12).to(dtype)
    weights, experts = layer.router.choose(x)
    stack = copy.deepcopy(layer.stack).double()
    delta = reference.lora_delta_loop(x.double(), stack, weights, experts)
    bare = layer.projection(x)
    size = (bare.double().abs() + delta.abs()).amax() if num_tokens else 1.0
    off = (layer(x).double() - (bare.double() + delta)).abs()
    assert layer(x).dtype == dtype
    assert (off <= size * 8 * torch.finfo(dtype).eps + 1e-6).all()


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_gates_learn_alike_through_every_kernel_and_nothing_else_learns(kernel):
    layer, x = make(kernel=kernel), torch.randn(7, 12, requires_grad=True)
    grads = []
    for out in (layer(x), definition(layer, x)):
        layer.zero_grad()
        x.grad = None
        out.square().sum().backward()
        grads.append((layer.router.weight.grad.clone(), layer.router.bias.grad, x.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not layer.stack.a.requires_grad
    assert {name for name, _ in layer.named_parameters() if _.requires_grad} == {
        "router.weight",
        "router.bias",
    }


@pytest.mark.parametrize("kernel", [*IN_TORCH])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_tokens_may_lie_in_memory_in_any_way(kernel, mode):
    """Columns of a matrix, every other row of one, and one token over and over."""
    layer, memory = make(kernel=kernel), torch.randn(12, 12)
    with mode():
        for x in (memory.T, memory[::2], memory[:1].expand(5, 12), memory.view(3, 4, 12).mT.mT):
            expected = definition(layer, x.contiguous())
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_what_the_layer_is_given_is_left_as_it_is():
    layer, x = make(), torch.randn(5, 12)
    before = x.clone()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer.projection(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_nothing_is_stale_after_weights_change(kernel):
    """After an optimiser's step, load_state_dict, `.to()` there and back, and a deep copy."""
    layer, x = make(kernel=kernel), torch.randn(5, 12)
    other = make(seed=1)
    with torch.no_grad():
        layer(x)
        layer.router.weight.mul_(-1)
        layer.stack.a.mul_(2)
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
        for moved in (copy.deepcopy(layer), layer.double(), layer.float()):
            moved_x = x.to(moved.stack.a.dtype)
            torch.testing.assert_close(
                moved(moved_x), definition(moved, moved_x), rtol=1e-5, atol=1e-5
            )
            assert moved.stack.b.T.is_contiguous()


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("sparse_numbers", [0, gather_grouped.SPARSE_NUMBERS])
def test_a_layer_whose_experts_are_all_gone_is_its_projection(
    kernel, num_tokens, sparse_numbers, monkeypatch
):
    """As `drop_expert` leaves one whose gate decides for others."""
    monkeypatch.setattr(gather_grouped, "SPARSE_NUMBERS", sparse_numbers)
    layer, x = make(ranks=[0, 0, 0], kernel=kernel), torch.randn(num_tokens, 12, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, layer.projection(x))
    out.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out)


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_what_was_moved_or_used_in_inference_mode_can_be_trained(kernel):
    layer, x = make(kernel=kernel), torch.randn(5, 12)
    with torch.inference_mode():
        layer.to("cpu")(x)
    layer(x).sum().backward()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_a_pickled_layer_is_the_same_elsewhere(kernel):
    layer, x = make(kernel=kernel), torch.randn(5, 12)
    other = pickle.loads(pickle.dumps(layer))  # noqa: S301
    assert torch.equal(other(x), layer(x))
    assert other.stack.b.T.is_contiguous()


def test_experts_are_used_where_a_cache_line_begins():
    """A mapped file lays them anywhere, and dot products off 16 bytes take six times as long."""
    memory = torch.randn(1 + 4 * 12)
    lora_a, lora_b = memory[1:].view(4, 12), torch.randn(10, 4)
    stack = ExpertStack(lora_a, lora_b, [4], [1.0])
    assert stack.a.data_ptr() % 64 == 0
    assert torch.equal(stack.a, lora_a)


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operator returns, but for views of its arguments."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        owned = {t.untyped_storage().data_ptr() for t in self._dense(args)}
        for tensor in self._dense(result if isinstance(result, (tuple, list)) else [result]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                self.sizes.append(storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor, self._freed, storage.nbytes())
        return result

    @staticmethod
    def _dense(values):
        """The tensors among them; of a sparse matrix those that it consists of."""
        for value in values:
            if isinstance(value, torch.Tensor) and value.layout == torch.sparse_csr:
                yield from (value.crow_indices(), value.col_indices(), value.values())
            elif isinstance(value, torch.Tensor):
                yield value

    def _freed(self, num_bytes):
        self.live -= num_bytes


@pytest.mark.parametrize("kernel", [*IN_TORCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_task", [False, True])
def test_a_forward_holds_tokens_times_ranks_and_no_copies_of_weights_or_tokens(
    kernel, dtype, one_task, monkeypatch
):
    """A private A and B for each token and expert would be 2 · 2 · 512 · 4 · 512 numbers here."""
    monkeypatch.setattr(gather_grouped, "ROWS_AT_ONCE", 16)
    num_tokens, size, ranks = 512, 512, [4] * 6
    layer, x = (
        make(size, size, ranks=ranks, kernel=kernel).to(dtype),
        torch.randn(512, size).to(dtype),
    )
    if one_task:
        layer.router.weight.data.zero_()
    with torch.no_grad(), Allocations() as seen:
        layer(x)
    output = num_tokens * size * dtype.itemsize
    assert seen.sizes.count(output) == 1  # the projection's own output, or what becomes it
    seen.sizes.remove(output)
    assert max(seen.sizes) <= num_tokens * sum(ranks) * 8  # as many int64 indices, at most


@pytest.mark.parametrize("kernel", [*IN_TORCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_a_token_copies_no_weights(kernel, dtype):
    """Not even those of the experts that it chose, which are read where they lie."""
    size, ranks = 512, [4] * 6
    layer, x = (
        make(size, size, ranks=ranks, kernel=kernel).to(dtype),
        torch.randn(1, size).to(dtype),
    )
    with torch.no_grad(), Allocations() as seen:
        layer(x)
    assert max(seen.sizes) <= max(size * dtype.itemsize, sum(ranks) * 8) < 4 * size * dtype.itemsize


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_memory_grows_with_tokens_times_ranks_alone(kernel, monkeypatch):
    """The most that is held at once, less the projection's output, for twice the tokens."""
    monkeypatch.setattr(gather_grouped, "ROWS_AT_ONCE", 16)
    size, ranks, peaks = 512, [4] * 6, {}
    layer = make(size, size, ranks=ranks, kernel=kernel)
    for num_tokens in (256, 512):
        x = torch.randn(num_tokens, size)
        with torch.no_grad(), Allocations() as seen:
            layer(x)
        peaks[num_tokens] = seen.peak - num_tokens * size * 4
    grown = peaks[512] - peaks[256]
    # a few matrices of [T, R], some of 8-byte indices: not one more of [T, IN] or [T, OUT]
    assert 0 < grown <= 6 * 256 * sum(ranks) * 8 < 256 * size * 4


def test_it_compiles_into_one_graph_and_once_for_all_tokens():
    """CUDA graphs follow from it: static shapes, nothing that waits for the host."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(5):  # token after token of a decode
            x = torch.randn(1, 1, 12)
            torch.testing.assert_close(compiled(x), definition(layer, x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_more_choices_than_inputs_compile_and_leave_the_layer_as_it_was():
    """Their table is larger than A, and so it is not made with the layer."""
    ranks, x = [2] * 20, torch.randn(3, 12)
    compiled, exported = make(ranks=ranks, kernel="dense"), make(ranks=ranks, kernel="dense")
    with torch.no_grad():
        expected = definition(compiled, x)
        got = torch.compile(compiled, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.export.export(exported, (x,), strict=False)
        torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_model_decodes_through_one_graph(world):
    model = world.load()
    for layer in routed_layers(model).values():
        size = layer.num_choices, layer.stack.a.shape[1]
        layer.router = Gate(torch.randn(size), torch.randn(size[0]), RouterOptions("gate", 2, 1.0))
    decodes_through_one_graph(model)


def decodes_through_one_graph(model):
    """Compiled whole, with a static cache that a first token made: no break, one graph for all."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    ids = torch.randint(3, 250, (1, 8))
    with torch.no_grad():
        for at in range(8):
            step = ids[:, at : at + 1]
            place = {"position_ids": torch.tensor([[at]])}
            got, expected = (
                run(step, past_key_values=cache, **place).logits
                for run, cache in zip((compiled if at else model, model), caches, strict=True)
            )
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["dense", "gather_triton", "grouped_triton"])
def test_a_cuda_graph_plays_back_what_the_layer_does(kernel):
    layer, x = make(kernel=kernel).to("cuda"), torch.zeros(1, 1, 12, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            layer(x)  # kernels are compiled before
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = layer(x)
        for _ in range(3):
            x.copy_(torch.randn(1, 1, 12))
            graph.replay()
            torch.testing.assert_close(out, definition(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [*IN_TORCH, None])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_and_experts_keep_their_precision_under_autocast(kernel, num_tokens, dtype):
    layer, x = make(kernel=kernel), torch.randn(num_tokens, 12)
    with torch.inference_mode():
        expected = layer(x) - layer.projection(x)
        with torch.autocast("cpu", dtype):
            out, bare = layer(x), layer.projection(x)
    assert out.dtype == dtype
    spread = bare.float().abs().max() * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float() - bare.float(), expected, rtol=0.02, atol=float(spread))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_alone_go_through_it(dtype):
    layer = make().to(dtype).to("meta")
    with torch.no_grad():
        assert layer(torch.empty(2, 3, 12, dtype=dtype, device="meta")).shape == (2, 3, 10)
