"""Record the decisions of a model's routers, with hooks.

Hooks need no second return value: the layer keeps the signature of the projection that it replaces,
so the base model's own code runs unchanged, and nothing is slower outside the block. Inside it, a
model compiled by `torch.compile` runs uncompiled, since compiled code ignores hooks that are added
later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import TYPE_CHECKING

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


_UNCOMPILED = SharedBlock(lambda: torch.compiler.set_stance("force_eager"))
"""No compiled code runs, in any thread: torch has one stance for all."""


@contextmanager
def recorded_logits(model: PreTrainedModel) -> Generator[dict[str, Tensor]]:
    """Collect each router's logits [T, C] of this thread's last forward pass, by module path."""
    by_path: dict[str, Tensor] = {}

    def keep(path: str, _router: Router, logits: Tensor) -> None:
        by_path[path] = logits

    with _watched(model, keep):
        yield by_path


@contextmanager
def recorded_routes(model: PreTrainedModel) -> Generator[Routes]:
    """Collect each layer's weights and choices in this thread's last forward pass.

    They are those of `reference.route`, the strongest first. Experts that lack the layer are
    recorded too, though they add nothing there.
    """
    routes: Routes = {}

    def keep(path: str, router: Router, logits: Tensor) -> None:
        routes[path] = router.route(logits)

    with _watched(model, keep):
        yield routes


@contextmanager
def _watched(
    model: PreTrainedModel, keep: Callable[[str, Router, Tensor], None]
) -> Generator[None]:
    """Call `keep` with the logits of every router, on the device of the model's input.

    Other threads may call the model, too; their passes are not recorded.
    """
    device, thread = input_device(model), get_ident()
    with ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:  # slow to import, and without it nothing is compiled
            hooks.enter_context(_UNCOMPILED.open())
        for path, layer in routed_layers(model).items():
            if layer.router is not None:

                def hook(router: Router, _args: object, logits: Tensor, path: str = path) -> None:
                    if get_ident() == thread:
                        keep(path, router, logits.to(device))

                hooks.enter_context(layer.router.register_forward_hook(hook))
        yield
