"""Triton's kernels: equal to the definition, on CPUs under Triton's interpreter and on GPUs."""

import json
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.kernels import gather_grouped, reference
from meteora.kernels.stack import ExpertStack
from tests.meteora.kernels.test_reference import RANKS, draw_layer, in_double, with_factors
from tests.meteora.routing.test_layer import Allocations, definition, make

pytest.importorskip("triton")
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # `tests/conftest.py` sets it
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled where there is a GPU")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
KERNELS = ["gather", "grouped"]


def run(kernel, *asked, **into):
    return getattr(gather_grouped.triton_launch(), f"lora_delta_{kernel}")(*asked, **into)


def draw(
    ranks,
    num_tokens,
    num_in,
    num_out,
    top_k,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    mean=False,
):
    """Arguments of the definition."""
    x, stack = draw_layer(ranks, num_tokens, num_in, num_out, dtype, seed, mean=mean)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, stack.num_choices, generator=generator)
    if seed % 2 == 0:
        stack.b = stack.b.contiguous()  # as the file lays it
    return [part.to(device) for part in (x, stack, *reference.route(logits, top_k))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=12)
@given(
    ranks=RANKS,
    num_tokens=st.sampled_from([0, 1, 2, 35]),
    num_in=st.sampled_from([1, 33, 70]),
    num_out=st.sampled_from([1, 24, 130]),
    top_k=st.integers(1, 4),
    mean=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_they_equal_the_definition(
    kernel, device, ranks, num_tokens, num_in, num_out, top_k, mean, seed
):
    asked = draw(ranks, num_tokens, num_in, num_out, top_k, device=device, seed=seed, mean=mean)
    expected = reference.lora_delta_loop(*asked)
    torch.testing.assert_close(run(kernel, *asked), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_where_weights_have_16_bits(kernel, dtype, device):
    """Against float64, the error stays near that of two plain 16-bit matmuls."""
    # the interpreter cuts bfloat16 off where hardware rounds
    allowed = 4 if dtype == torch.bfloat16 and INTERPRETED else 1.5
    x, stack, *routes = draw([8, 3, 0, 17], 20, 256, 64, 2, dtype=dtype, device=device)
    a, b = stack.a, stack.b
    exact = reference.lora_delta_loop(x.double(), in_double(stack), *routes)
    plain = x @ a.T @ b.T
    wide = x.double() @ a.double().T @ b.double().T
    got = run(kernel, x, stack, *routes)
    assert got.dtype == dtype
    assert (got - exact).norm() / exact.norm() <= allowed * (plain - wide).norm() / wide.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_they_add_in_place_to_what_is_there(kernel, into, device):
    asked = draw([3, 0, 5], 35, 6, 7, 2, device=device)
    before = torch.randn(35, 7, device=device).to(into)
    after = before.clone()
    assert run(kernel, *asked, add_to=after) is after
    expected = (before + reference.lora_delta_loop(*asked)).to(into)
    rtol, atol = (1e-5, 1e-5) if into == torch.float32 else (2e-2, 1e-2)
    torch.testing.assert_close(after, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_factors_and_weights_may_lie_in_memory_in_any_way(kernel, device):
    x, stack, weights, experts = draw([3, 0, 5], 9, 6, 7, 2, device=device)
    expected = reference.lora_delta_loop(x, stack, weights, experts)
    stack.a = stack.a.repeat(1, 2)[:, :6]
    strewn = x.T.contiguous().T, stack, weights, experts
    torch.testing.assert_close(run(kernel, *strewn), expected, rtol=1e-5, atol=1e-5)
    weights, experts = weights.T.contiguous().T, experts.T.contiguous().T
    strewn = x[:1].expand(9, 6), stack, weights, experts
    expected = reference.lora_delta_loop(*strewn)
    torch.testing.assert_close(run(kernel, *strewn), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_output_with_gaps_between_its_rows_is_added_to_and_nothing_beside_it(kernel, device):
    asked = draw([3, 0, 5], 35, 6, 7, 2, device=device)
    memory = torch.randn(35, 11, device=device)
    expected = memory.clone()
    expected[:, 2:9] += reference.lora_delta_loop(*asked)
    run(kernel, *asked, add_to=memory[:, 2:9])
    torch.testing.assert_close(memory, expected, rtol=1e-5, atol=1e-5)


def off(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def empty(*shape):
    """Zeros that take no memory but for the pages that are written to."""
    memory = mmap.mmap(-1, 2 * prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would hold it whole")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("laid_by_rank", [True, False])
def test_factors_of_more_numbers_than_32_bits_count(kernel, laid_by_rank):
    """A token that goes to the last of a hundred thousand experts."""
    num_experts, r, size = 1 << 17, 64, 264
    num_ranks = num_experts * r
    assert num_ranks * size > 1 << 31
    a = empty(num_ranks, size)
    b = empty(num_ranks, size).T if laid_by_rank else empty(size, num_ranks)
    x, own_a, own_b = (torch.randn(n, size).bfloat16() for n in (1, r, r))
    a[-r:], b[:, -r:] = own_a, own_b.T
    stack = ExpertStack(a, b, [r] * num_experts, [1.0] * num_experts, mapped=True)
    got = run(kernel, x, stack, torch.ones(1, 1), torch.tensor([[num_experts - 1]]))
    assert off(got, x @ own_a.T @ own_b) < 0.02


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would hold it whole")
def test_tokens_of_more_numbers_than_32_bits_count():
    """The last of eight million tokens, in a tile of its own."""
    num_tokens, size, r = 1 << 23, 264, 3
    assert num_tokens * size > 1 << 31
    found: Any = gather_grouped.triton_launch().triton_kernels
    x, out = empty(num_tokens, size), empty(num_tokens, size)
    x[-1] = torch.randn(size)
    a, b = torch.randn(r, size).bfloat16(), torch.randn(size, r).bfloat16()
    starts, widths, scaling = torch.zeros(1).long(), torch.tensor([r]), torch.ones(r)
    weights, tokens = torch.ones(num_tokens, 1), torch.arange(num_tokens)
    job, shrunk = torch.tensor([[0, num_tokens - 1, num_tokens]]), empty(num_tokens, r)
    wide = {"WIDE": tl.float32, "DOT": tl.float32, "TOKENS": 16, "RANKS": 16}
    found.shrink_grouped[(1, 1)](
        x, a, starts, widths, scaling, weights[:1], weights, tokens, job, shrunk,
        num_tokens, size, 1, r, 1, COLUMNS=64, **wide,
    )  # fmt: skip
    found.expand_grouped[(1, 3)](
        shrunk, b, starts, widths, tokens, job, out, size, r, 1, r, COLUMNS=128, **wide
    )
    assert off(out[-1], x[-1] @ a.T @ b.T) < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.skipif(not INTERPRETED, reason="in float64, which tensor cores do not all multiply")
def test_gradients_are_right_for_gates_and_for_adapters(kernel):
    x, stack = draw_layer([1, 0, 2], 2, 3, 2, torch.float64)
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -2.0]], dtype=torch.float64)

    def delta(x, a, b, logits):
        routes = reference.route(logits, 2, temperature=0.7)
        return run(kernel, x, with_factors(stack, a, b), *routes)

    leaves = tuple(tensor.requires_grad_() for tensor in (x, stack.a, stack.b, logits))
    assert torch.autograd.gradcheck(delta, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_the_layer_runs_through_them(kernel, num_tokens, device):
    layer, x = make(kernel=f"{kernel}_triton").to(device), torch.randn(2, num_tokens, 12).to(device)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_run_on_the_gpu_of_their_tensors(kernel):
    """And not on the current one, as Triton does."""
    with torch.cuda.device(0):
        asked = draw([3, 0, 5], 35, 6, 7, 2, device="cuda:1")
        expected = reference.lora_delta_loop(*asked)
        torch.testing.assert_close(run(kernel, *asked), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_device_of_the_tensors_is_the_current_one_while_kernels_run(kernel, monkeypatch):
    found, entered = gather_grouped.triton_launch(), []

    @contextmanager
    def noted(x):
        entered.append(x.device)
        yield
        entered.append(None)

    def kernel_alone(*_asked):
        assert entered == [torch.device("cpu")]

    monkeypatch.setattr(torch.cuda, "device_of", noted)
    monkeypatch.setattr(found, f"_{kernel}", kernel_alone)
    run(kernel, *draw([3, 0, 5], 4, 6, 7, 2))
    assert entered == [torch.device("cpu"), None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_holds_tokens_times_ranks_and_no_copies_of_weights_or_tokens(
    kernel, dtype, device
):
    num_tokens, size, ranks = 16, 160, [3] * 5
    layer = make(size, size, ranks=ranks, kernel=f"{kernel}_triton").to(device, dtype)
    x = torch.randn(num_tokens, size).to(device, dtype)
    with torch.no_grad():
        layer(x)  # what is made once
        with Allocations() as seen:
            layer(x)
    output = num_tokens * size * dtype.itemsize
    assert seen.sizes.count(output) == 1  # the projection's own output, or what becomes it
    seen.sizes.remove(output)
    assert max(seen.sizes) <= num_tokens * sum(ranks) * 8 < output


SHARED = 99 * 1024
"""Bytes that a block may have on every GPU since Ampere; A100s and H100s have 163 KB and 227 KB."""


def compiled_for(architecture, ranks, monkeypatch, tmp_path):
    """What `triton_ahead` tells of what both kernels launch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.meteora.kernels.triton_ahead",
            *map(str, (architecture, *ranks)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(kernel["kernel"], kernel["dtype"]) for kernel in told}
    assert found == set(product(COMPILED, ("float32", "bfloat16", "float16")))
    return told


COMPILED = "shrink_chosen", "expand_chosen", "shrink_grouped", "expand_grouped"


def fit_and_use_tensor_cores(told):
    for kernel in told:
        of_16_bits = kernel["dtype"] != "float32"
        assert kernel["tensor_cores"] == (of_16_bits and "grouped" in kernel["kernel"]), kernel
        assert kernel["shared"] <= SHARED, kernel


def test_they_compile_for_gpus_and_multiply_16_bits_on_tensor_cores(monkeypatch, tmp_path):
    """The interpreter takes more than the compiler does: compile for Ampere, ahead of time."""
    told = compiled_for(80, [8], monkeypatch, tmp_path)
    fit_and_use_tensor_cores(told)
    grouped = [kernel["kernel"] for kernel in told if "grouped" in kernel["kernel"]]
    assert len(grouped) == 2 * 3  # once for each dtype, whatever the number of tokens


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
def test_they_compile_for_every_gpu_since_ampere_at_every_rank(architecture, monkeypatch, tmp_path):
    """One that is no power of two, one of each size of a tile, and many tiles of them."""
    ranks = [1, 17, 64, 200]
    fit_and_use_tensor_cores(compiled_for(architecture, ranks, monkeypatch, tmp_path))


def test_without_triton_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(gather_grouped, "find_spec", lambda _name: None)
    gather_grouped.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not gather_grouped.has_triton()
    gather_grouped.has_triton.cache_clear()
