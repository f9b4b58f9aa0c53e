"""Where the parts of a base lie and compute, if Accelerate spreads them over devices.

    device_map     a module  ─▶  a device, or `cpu` or `disk` beside one: it is offloaded

The weights of an offloaded module are no tensors with numbers ("meta"). A hook of Accelerate brings
them to the device for the time of one call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = re.compile(r"(.*?)\.(\d+)\.")
"""The path of a numbered layer, at the start of the path of a module in it."""
WHOLE = ("auto", "balanced", "balanced_low_0", "sequential")
"""What Accelerate makes a map of by itself."""
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What a RuntimeError of torch's says where the memory of a CPU is not enough."""


class PlacementError(MeteoraError):
    """A model cannot be laid where it was asked to be."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory for what was asked."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)


def placed(device_map: Any, **further: object) -> dict[str, Any]:  # noqa: ANN401
    """The options with which transformers spreads a model.

    Args:
        further: `max_memory` and `offload_folder`, as `from_pretrained` takes them; or None

    Raises:
        PlacementError: the map names a device that torch does not find, or is no map at all.
    """
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in named:
        if device == "disk" or (device in WHOLE and not isinstance(device_map, dict)):
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError):
            raise PlacementError(
                f"device_map names {device!r}, which torch does not find on this machine; give"
                f" {', '.join(WHOLE)}, or a mapping from modules to devices, `cpu` or `disk`"
            ) from None
    given = {key: value for key, value in further.items() if value is not None}
    return {"device_map": device_map, **given}


@contextmanager
def spreading(options: Mapping[str, Any]) -> Generator[None]:
    """A context in which transformers' error about a device map is a `PlacementError`."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "device_map" not in options or not ("device" in str(error) or "disk" in str(error)):
            raise
        raise PlacementError(
            f"the model cannot be spread as device_map says: {shortened(error)}"
        ) from error


def layers_on_disk(model: PreTrainedModel, device: str) -> dict[str, str]:
    """A map by which each numbered layer is read for each call, and all else lies on a device.

    The head is read for each call, too, if it has its own weights: only whole answers need it.

    Args:
        model: may have no weights
    """
    inside = Counter(m[1] for path, _ in model.named_modules() if (m := LAYER.match(f"{path}.")))
    ((layers, _),) = inside.most_common(1)
    head = own_head(model)
    found: dict[str, str] = {}

    def lay(path: str, module: nn.Module) -> None:
        if path == layers or module is head:
            found[path] = "disk"
        elif layers.startswith(f"{path}.") or not path:
            for name, child in module.named_children():
                lay(f"{path}.{name}".lstrip("."), child)
        else:
            found[path] = device

    lay("", model)
    return found


def own_head(model: PreTrainedModel) -> nn.Module | None:
    """What makes logits of the last hidden states, if it does not share the embeddings' weights."""
    is_tied = model.config.get_text_config().tie_word_embeddings
    return None if is_tied else model.get_output_embeddings()


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its tensors lie, or where Accelerate brings them."""
    own = next(chain(module.parameters(), module.buffers())).device
    return next((torch.device(h.execution_device) for h in _offloading(module)), own)


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate brings the module's own tensors for the time of a call."""
    return bool(_offloading(module))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids; of a module without embeddings, where it begins."""
    embeddings = getattr(model, "get_input_embeddings", lambda: model)
    return device_of(embeddings())


@contextmanager
def held(module: nn.Module) -> Generator[None]:
    """Keep all that is offloaded in a module on its device, from the first call to the last."""
    with ExitStack() as released:
        for part in module.modules():
            for hook in _offloading(part):
                released.callback(_release, part, hook)
                hook.pre_forward(part)
                hook.offload = False  # calls find the tensors, and leave them
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """A context in which this function runs in place of the module's own `forward`."""
    before = vars(module).get("forward")  # of Accelerate, for example
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def settle(module: nn.Module) -> None:
    """Bring all that is offloaded in a module to its device, where it stays."""
    from accelerate.hooks import remove_hook_from_module  # noqa: PLC0415  (a second)

    for part in module.modules():
        for hook in _offloading(part):
            hook.pre_forward(part)
            remove_hook_from_module(part)


def _release(module: nn.Module, hook: Any) -> None:  # noqa: ANN401  (AlignDevicesHook)
    hook.offload = True
    hook.post_forward(module, None)


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of Accelerate that bring a module's own tensors."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]
