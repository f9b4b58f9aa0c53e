"""Place the parts of a base on several devices, with Accelerate.

    device_map     module path  ─▶  device; with `cpu` or `disk` beside a GPU it is offloaded

The parameters of an offloaded module are meta tensors, without numbers. A hook of Accelerate loads
them to the device for the time of one call.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` from which Accelerate makes a map."""
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Part of torch's RuntimeError when CPU memory is not enough."""
NO_ADDRESSES = "Cannot allocate memory (12)"
"""Part of torch's RuntimeError when a file cannot be mapped, as where `ulimit -v` is small."""


class PlacementError(MeteoraError):
    """A model cannot be placed on the devices that a device map names."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device has too little memory."""
    text = str(error)
    of_torch = NO_MEMORY in text or NO_ADDRESSES in text
    return of_torch or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def placed(device_map: Any, **further: object) -> dict[str, Any]:  # noqa: ANN401
    """Return the options with which transformers spreads a model; none if there is no map.

    Args:
        further: `max_memory` and `offload_folder`, as `from_pretrained` takes them; or None

    Raises:
        PlacementError: the map names a device that torch does not find, or is no map at all; or
            there are further options without a map.
    """
    options = {key: value for key, value in further.items() if value is not None}
    if device_map is None:
        if options:
            raise PlacementError(
                f"{' and '.join(options)} without device_map would change nothing; give"
                ' device_map="auto", too, or leave them out'
            )
        return {}
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in named:
        if device == "disk" or (device in WHOLE and not isinstance(device_map, dict)):
            continue
        require_device(
            device,
            "device_map",
            f"{', '.join(WHOLE)}, or a mapping from modules to devices, `cpu` or `disk`",
        )
    return {"device_map": device_map, **options}


def require_device(device: Any, argument: str, instead: str) -> None:  # noqa: ANN401
    """Raise a `PlacementError`, which says what to give instead, for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise PlacementError(
            f"{argument} names {device!r}, which torch does not find on this machine; give"
            f" {instead}"
        ) from None


@contextmanager
def spreading(options: Mapping[str, Any]) -> Generator[None]:
    """A context in which transformers' error about a device map is a `PlacementError`.

    So is the error where the disk is too full for weights that are written again.
    """
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise PlacementError(
            f"{options['offload_folder']}: the disk is full, and weights that the base's files have"
            " in another form are written there; free some space, or name a folder on another disk:"
            " `offload_folder` in Python, --home for a run, otherwise TMPDIR"
        ) from error
    except (ValueError, RuntimeError) as error:
        if "device_map" not in options or not ("device" in str(error) or "disk" in str(error)):
            raise
        raise PlacementError(
            f"the model cannot be spread as device_map says: {shortened(error)}"
        ) from error


def explain_offloading(model: nn.Module) -> None:
    """Let a model that cannot be offloaded raise a `PlacementError` where it computes.

    Accelerate loads the weights of a module when the module is called. DBRX and JetMoE use weights
    of modules that they do not call. A fit calls each numbered layer by itself.
    """
    if not any(is_offloaded(part) for part in model.modules()):
        return
    for path, part in model.named_modules():
        if not path or path.rpartition(".")[2].isdecimal():
            explained = partial(_explained, type(model).__name__, part.forward)
            part.forward = update_wrapper(explained, part.forward)


def _explained(name: str, forward: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
    try:
        return forward(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if not ("meta tensor" in str(error) or "device meta" in str(error)):
            raise
        raise PlacementError(
            f"{name} uses weights of modules that it does not call, so they cannot be read when"
            " they are needed; take a device whose memory holds the base (a recipe then needs"
            " `gates: {by_layer: false}`), or another base"
        ) from error


def own_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head, if it does not share the embeddings' weights; else None."""
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return None if is_tied else model.get_output_embeddings()


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; Accelerate may load its tensors there."""
    own = next(chain(module.parameters(), module.buffers())).device
    return next((torch.device(h.execution_device) for h in _offloading(module)), own)


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate loads the module's own tensors for the time of a call."""
    return bool(_offloading(module))


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for a model's token ids; for a module without embeddings, its first device."""
    embeddings = getattr(model, "get_input_embeddings", lambda: model)
    return device_of(embeddings())


@contextmanager
def held(module: nn.Module) -> Generator[None]:
    """A context in which all offloaded parts of a module stay on their device."""
    with ExitStack() as released:
        for part in module.modules():
            for hook in _offloading(part):
                released.callback(_release, part, hook)
                hook.pre_forward(part)
                hook.offload = False  # a call then leaves the tensors where they are
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """A context in which `forward` replaces the module's own."""
    before = vars(module).get("forward")  # Accelerate sets one, for example
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def settle(module: nn.Module) -> None:
    """Load all offloaded parts of a module to their device, for good."""
    from accelerate.hooks import remove_hook_from_module  # noqa: PLC0415  (a second)

    for part in module.modules():
        for hook in _offloading(part):
            hook.pre_forward(part)
            remove_hook_from_module(part)


def _release(module: nn.Module, hook: Any) -> None:  # noqa: ANN401  (AlignDevicesHook)
    hook.offload = True
    hook.post_forward(module, None)


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of Accelerate that load a module's own tensors."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]
