"""Multiply float32 matrices on a CPU by oneDNN, which is a part of torch.

In float32 torch itself asks MKL, which has kernels with AVX-512 for Intel's processors alone; on
others it takes those with AVX2. oneDNN, which torch asks in 16 bits, takes AVX-512 wherever it is.
On an AMD EPYC (Zen 5) the layers of SmolLM2-135M then take about half of the time by MKL, from 256
tokens on (`tests/benchmarks/results/products.md`). For each size it keeps code of 0.7 MB, for 1,024
sizes at most.
"""

from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

CPU_FACTS = Path("/proc/cpuinfo")
"""Who made the processors, as Linux tells it."""
PRODUCT = "_linear_pointwise"
"""The name of oneDNN's product in `torch.ops.mkldnn`."""
LEAST_PRODUCTS = 1 << 19
"""Multiplications, T · IN · OUT, below which MKL is faster: its shortest call takes 2 µs, not 8."""
LEAST_FOR_ONE = 1 << 22
"""The same with one token: nearly all time goes to reading W, and MKL reads from a cache faster."""
LEAST_WITH_GRADIENTS = 1 << 22
"""The same with gradients: autograd spends more time on a function of ours than on torch's own."""


@cache
def _has_wide_kernels() -> bool:
    """Whether torch has oneDNN, on a CPU of AMD with AVX-512.

    On an Intel Xeon MKL is as fast or faster, but for an output head. On others nothing was
    measured. What is asked of torch below is not public, so a later version may lack it.
    """
    asked = "_len_torch_dispatch_stack", "_are_functorch_transforms_active"
    is_there = hasattr(torch.ops.mkldnn, PRODUCT) and all(hasattr(torch._C, one) for one in asked)
    if not (is_there and torch.backends.mkldnn.is_available()):
        return False
    facts = CPU_FACTS.read_text("utf-8") if CPU_FACTS.is_file() else ""
    return "AuthenticAMD" in facts and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is float32 on a CPU, not of another library's kind, and has no tangent."""
    if type(tensor) not in {Tensor, nn.Parameter} or tensor.dtype is not torch.float32:
        return False
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return False
    return unpack_dual(tensor).tangent is None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    is_asked = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return is_asked and torch.is_grad_enabled()


def _is_as_stated(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the sizes are those of `linear`, and the numbers of the bias lie side by side.

    torch takes others or says what is wrong; oneDNN would read what lies beside them.
    """
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())


def _is_recorded() -> bool:
    """Whether torch notes each product: to trace it, count its operations, or transform it."""
    is_seen = (
        torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    )
    return torch.jit.is_tracing() or is_seen


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN multiplies these faster than torch, and torch needs to see no product."""
    if torch.compiler.is_compiling() or not _has_wide_kernels():
        return False
    if not (x.dim() and weight.dim()):  # torch says what is wrong
        return False
    least = LEAST_PRODUCTS if x.numel() > x.shape[-1] else LEAST_FOR_ONE
    if _needs_gradient(x, weight, bias):
        least = max(least, LEAST_WITH_GRADIENTS)
    if x.numel() * len(weight) < least:
        return False
    if not (_is_plain(x) and _is_plain(weight) and (bias is None or _is_plain(bias))):
        return False
    if _is_recorded() or not _is_as_stated(x, weight, bias):
        return False
    # rows of a wider matrix take a thousand times as long
    is_dense = weight.is_contiguous() or weight.mT.is_contiguous()
    is_asked = bool(torch.backends.mkldnn.enabled) and not torch.is_autocast_enabled("cpu")
    return is_dense and is_asked


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # what torch's compiler calls; no public function of torch asks oneDNN in float32
    y = getattr(torch.ops.mkldnn, PRODUCT)(x, weight, bias, "none", [], "")
    # torch lets nobody change a view in place that a function with gradients returned
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _Differentiable(torch.autograd.Function):
    """`_product` with gradients, which are products as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        (of_output,) = gradients
        of_x = None if weight is None else linear(of_output, weight.mT)
        rows = of_output.reshape(-1, of_output.shape[-1])
        of_weight = None if x is None else _of_weight(rows, x.reshape(-1, x.shape[-1]))
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _of_weight(of_output: Tensor, x: Tensor) -> Tensor:
    """The gradient of W [OUT, IN] by those of the output [T, OUT] and x [T, IN].

    With the many rows of LoRA's B in front oneDNN takes five times as long.
    """
    if of_output.shape[1] > 4 * x.shape[1]:
        return linear(x.mT, of_output.mT).mT
    return linear(of_output.mT, x.mT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of x [..., IN], W [OUT, IN] and a bias [OUT].

    By oneDNN where it is faster; the results differ by the rounding of sums.
    `with torch.backends.mkldnn.flags(enabled=False):` turns it off.
    """
    if not _is_faster(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    if _needs_gradient(x, weight, bias):
        return cast("Tensor", _Differentiable.apply(x, weight, bias))
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer that multiplies by `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch names it)
        """Map [..., IN] to [..., OUT]."""
        return linear(input, self.weight, self.bias)


def use_in(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by `linear`, where that can make a difference.

    Weights and names stay as they are, and so do the layers of other libraries.
    """
    if not _has_wide_kernels():
        return
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype is torch.float32:
            layer.__class__ = Linear
            if "_old_forward" in vars(layer):  # Accelerate calls the one that it found
                vars(layer)["_old_forward"] = MethodType(Linear.forward, layer)
