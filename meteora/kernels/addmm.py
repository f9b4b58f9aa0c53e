"""Join a 16-bit projection and the experts' update in one matmul: the update is its first addend.

    any projection      y = projection(x), rounded;  then y += update, rounded again
    a plain one         sums start at the update, go on with W x, and are rounded once

This costs nothing: the matmul reads the addend instead of a second pass over its result. In 32 bits
there is nothing to gain, and a module that does more than a matmul has to be called.

The table shows the relative error against float64, over that of the bare layer, which rounds once.
It holds for bfloat16 and float16. The first row is the size of the update over the size of the
projection's output, both as root mean squares:

    size                       0.03     0.1     0.2    0.34       1
    any projection             1.45    1.48    1.51    1.56    1.76     at most, over the kernels
    a plain one                1.01    1.02    1.06    1.14    1.57
    … with experts in 32 bits  1.01    1.01    1.03    1.07    1.31

So it is as exact as the bare layer up to a size of a tenth, or of a fifth if the experts have 32
bits; above that, the rounding of the addend shows. In 14 trained adapters for SmolLM2 the median
size over modules is 0.005 to 0.07, by adapter, and the largest of all is 0.34. A bias is rounded
with the addend: the error is 1.07 if the bias is a third of W x, and 1.27 if it is as large.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from meteora.kernels import onednn

HALVES = torch.bfloat16, torch.float16
MOST_IN_FLOAT16 = 64.0
"""The largest scaling of experts in float16, in which a scaled A x overflows beyond 65,504."""
CONV1D = "transformers.pytorch_utils", "Conv1D"
"""GPT-2's projection, with a weight [IN, OUT]. By name, since transformers is slow to import."""
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def weight_of(projection: nn.Module) -> Tensor:
    """The weight of a projection; its scales if it is quantised and has no `weight`."""
    weight = getattr(projection, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    tensors = (*projection.parameters(), *projection.buffers())
    return next(tensor for tensor in tensors if tensor.is_floating_point())


def experts_dtype(experts: torch.dtype, weight: torch.dtype, largest_scaling: float) -> torch.dtype:
    """The wider of the dtypes of adapters and of the projection's weight.

    16-bit adapters of another format than the base would lose bits in its dtype. 8-bit weights are
    only stored that way, so the dtype is then that of the adapters. With a large scaling it is
    float32 in place of float16.
    """
    dtype = experts if weight.itemsize < 2 else torch.promote_types(experts, weight)
    return torch.float32 if dtype is torch.float16 and largest_scaling > MOST_IN_FLOAT16 else dtype


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on; never on the meta device, which has shapes alone."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class Plain(NamedTuple):
    """The weight and the bias of a projection that is one matmul."""

    weight: Tensor
    """[IN, OUT]"""
    bias: Tensor | None
    """[OUT]"""

    @classmethod
    def of(cls, projection: nn.Module, x: Tensor) -> Self | None:
        """The matmul of `projection` with x [..., IN] in 16 bits; None if it does more than that.

        It does more if it has a hook, if another library replaced its forward, if its weight is no
        plain tensor of torch (quantised, distributed), or under autocast.
        """
        kind = type(projection)
        is_linear = kind in {nn.Linear, onednn.Linear}
        if x.dtype not in HALVES or not (
            is_linear or (kind.__module__, kind.__qualname__) == CONV1D
        ):
            return None
        own = vars(projection)
        replaced = "forward" in own and "_hf_hook" not in own  # Accelerate's only loads tensors
        if replaced or any(own[hooks] for hooks in HOOKS) or _has_any_global_hook():
            return None
        weight: Tensor = own["_parameters"]["weight"]
        bias: Tensor | None = own["_parameters"]["bias"]
        if type(weight) not in {nn.Parameter, Tensor} or weight.dtype != x.dtype:
            return None
        if is_autocast(x.device) or weight.device != x.device:
            return None
        return cls(weight.T if is_linear else weight, bias)
