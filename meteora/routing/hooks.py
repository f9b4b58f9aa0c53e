"""Record the decisions of a model's routers, with hooks.

Hooks need no second return value: the layer keeps the signature of the projection that it replaces,
so the base model's own code runs unchanged, and nothing is slower outside the block. Inside it, a
model compiled by `torch.compile` runs uncompiled, since compiled code ignores hooks that are added
later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from meteora.base.placement import input_device
from meteora.base.shared_block import SharedBlock
from meteora.routing.layer import routed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.routing.routers import Router

    Routes = dict[str, tuple[Tensor, Tensor]]
    """Weights and choices, both [T, K], of each layer in one pass, by module path."""


Found = TypeVar("Found")

_UNCOMPILED = SharedBlock(lambda: torch.compiler.set_stance("force_eager"))
"""No compiled code runs, in any thread: torch has one stance for all."""


def recorded_logits(model: PreTrainedModel) -> AbstractContextManager[dict[str, Tensor]]:
    """Collect each router's logits [T, C] of this thread's last forward pass, by module path."""
    return _recorded(model, lambda _router, logits: logits)


def recorded_routes(model: PreTrainedModel) -> AbstractContextManager[Routes]:
    """Collect each layer's weights and choices in this thread's last forward pass.

    They are those of `reference.route`, the strongest first. Experts that lack the layer are
    recorded too, though they add nothing there.
    """
    return _recorded(model, lambda router, logits: router.route(logits))


@contextmanager
def _recorded(
    model: PreTrainedModel, read: Callable[[Router, Tensor], Found]
) -> Generator[dict[str, Found]]:
    """Collect what `read` makes of each router's logits, on the device of the model's input.

    Other threads may call the model, too; their passes are not recorded.
    """
    found: dict[str, Found] = {}
    device, thread = input_device(model), get_ident()

    def keep(path: str, router: Router, _args: object, logits: Tensor) -> None:
        if get_ident() == thread:
            found[path] = read(router, logits.to(device))

    with ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:  # slow to import, and without it nothing is compiled
            hooks.enter_context(_UNCOMPILED.open())
        for path, layer in routed_layers(model).items():
            if layer.router is not None:
                hooks.enter_context(layer.router.register_forward_hook(partial(keep, path)))
        yield found
