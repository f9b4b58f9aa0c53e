"""Triton's kernels: equal to the definition, on CPUs under Triton's interpreter and on GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora import kernels, ops
from tests.meteora.test_layer import Allocations, definition, make
from tests.meteora.test_ops import RANKS, draw_layer

pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()  # as `tests/conftest.py` asks of Triton
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled where there is a GPU")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TWINS = ["gather", "grouped"]


def run(twin, x, a, b, ranks, scaling, weights, experts, **into):
    found = kernels.triton_twins()
    widths = torch.tensor(ranks, device=x.device)
    own = found.Segments(widths.cumsum(0) - widths, widths, scaling, max(ranks))
    return getattr(found, f"lora_delta_{twin}")(x, a, b, own, weights, experts, **into)


def draw(ranks, num_tokens, num_in, num_out, top_k, *, dtype=torch.float32, device="cpu", seed=0):
    """Arguments of the definition."""
    x, a, b, scaling = draw_layer(ranks, num_tokens, num_in, num_out, dtype, seed)
    logits = torch.randn(num_tokens, len(ranks), generator=torch.Generator().manual_seed(seed))
    weights, experts = ops.route(logits, top_k)
    b = b.T.contiguous().T if seed % 2 else b  # as the layer lays it, and as the file does
    return [
        t.to(device) if torch.is_tensor(t) else t
        for t in (x, a, b, ranks, scaling, weights, experts)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@settings(deadline=None, max_examples=12)
@given(
    ranks=RANKS,
    num_tokens=st.sampled_from([0, 1, 2, 35]),
    num_in=st.sampled_from([1, 33, 70]),
    num_out=st.sampled_from([1, 24, 130]),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_the_kernels_equal_the_definition(
    twin, device, ranks, num_tokens, num_in, num_out, top_k, seed
):
    asked = draw(ranks, num_tokens, num_in, num_out, top_k, device=device, seed=seed)
    expected = ops.lora_delta_loop(*asked)
    torch.testing.assert_close(run(twin, *asked), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_where_weights_have_16_bits(twin, dtype, device):
    """Against float64, the error stays near that of two plain 16-bit matmuls."""
    # the interpreter cuts bfloat16 off where hardware rounds
    allowed = 4 if dtype == torch.bfloat16 and INTERPRETED else 1.5
    x, a, b, *rest = draw([8, 3, 0, 17], 20, 256, 64, 2, dtype=dtype, device=device)
    exact = ops.lora_delta_loop(x.double(), a.double(), b.double(), *rest)
    plain = x @ a.T @ b.T
    wide = x.double() @ a.double().T @ b.double().T
    got = run(twin, x, a, b, *rest)
    assert got.dtype == dtype
    assert (got - exact).norm() / exact.norm() <= allowed * (plain - wide).norm() / wide.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_the_kernels_add_in_place_to_what_is_there(twin, into, device):
    asked = draw([3, 0, 5], 35, 6, 7, 2, device=device)
    before = torch.randn(35, 7, device=device).to(into)
    after = before.clone()
    assert run(twin, *asked, add_to=after) is after
    expected = (before + ops.lora_delta_loop(*asked)).to(into)
    rtol, atol = (1e-5, 1e-5) if into == torch.float32 else (2e-2, 1e-2)
    torch.testing.assert_close(after, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.skipif(not INTERPRETED, reason="in float64, which tensor cores do not all multiply")
def test_gradients_are_right_for_gates_and_for_adapters(twin):
    ranks = [1, 0, 2]
    x, a, b, scaling = draw_layer(ranks, 2, 3, 2, torch.float64)
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -2.0]], dtype=torch.float64)

    def delta(x, a, b, logits):
        return run(twin, x, a, b, ranks, scaling, *ops.route(logits, 2, temperature=0.7))

    leaves = tuple(tensor.requires_grad_() for tensor in (x, a, b, logits))
    assert torch.autograd.gradcheck(delta, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_the_layer_runs_through_them(twin, num_tokens, device):
    layer, x = make(twin=f"{twin}_triton").to(device), torch.randn(2, num_tokens, 12).to(device)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_holds_tokens_times_ranks_and_no_copies_of_weights_or_tokens(twin, dtype, device):
    num_tokens, size, ranks = 16, 160, [3] * 5
    layer = make(size, size, ranks=ranks, twin=f"{twin}_triton").to(device, dtype)
    x = torch.randn(num_tokens, size).to(device, dtype)
    with torch.no_grad():
        layer(x)  # what is made once
        with Allocations() as seen:
            layer(x)
    output = num_tokens * size * dtype.itemsize
    assert seen.sizes.count(output) == 1  # the projection's own output, or what becomes it
    seen.sizes.remove(output)
    assert max(seen.sizes) <= num_tokens * sum(ranks) * 8 < output


AHEAD_OF_TIME = """
import warnings
from itertools import product
warnings.simplefilter("ignore")  # Triton 3.9 tells of a default of 3.10
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from meteora import triton_kernels as found

kinds = {"fp32": found.tl.float32, "bf16": found.tl.bfloat16, "fp16": found.tl.float16}
of_weights, indices = {"x", "a", "b", "out"}, {"starts", "ranks", "experts", "tokens", "jobs"}
names = "shrink_chosen", "expand_chosen", "shrink_grouped", "expand_grouped"
for name, (kind, dot) in product(names, kinds.items()):
    kernel, grouped = getattr(found, name), "grouped" in name
    values = {"WIDE": kinds["fp32"], "DOT": dot, "TOKENS": 32,
              "RANKS": 16 if grouped else 8, "COLUMNS": 64}
    signature = {}
    for argument in kernel.arg_names:
        if argument in of_weights or (argument == "shrunk" and grouped):
            signature[argument] = "*" + kind
        elif argument in indices:
            signature[argument] = "*i64"
        elif argument in values:
            signature[argument] = "constexpr"
        else:
            signature[argument] = "*fp32" if argument in {"shrunk", "scaling", "weights"} else "i32"
    constants = {k: v for k, v in values.items() if k in signature}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    on_tensor_cores = "mma" in built.asm["ptx"]
    assert on_tensor_cores == (grouped and kind != "fp32"), (name, kind)
    print(name, kind, len(built.asm["cubin"]))
"""


def test_they_compile_for_gpus_and_multiply_16_bits_on_tensor_cores(monkeypatch, tmp_path):
    """The interpreter takes more than the compiler does: compile for Ampere, ahead of time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * 3


def test_without_triton_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda _name: None)
    with pytest.raises(kernels.MissingTritonError, match="pip install triton"):
        make(twin="gather_triton")(torch.randn(3, 12))
    kernels.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not kernels.has_triton()
    kernels.has_triton.cache_clear()
