"""Put routed layers into a Hugging Face model, and control their routers.

    model.layers.0.self_attn.q_proj   Linear         ─insert▶  MoELoRALinear(Linear, A, B, Gate)
    model.layers.0.mlp.down_proj      Linear (no adapter targets it)        stays as it is

For other code the model stays the same: `generate`, `pipeline` and lm-eval run unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora.artifacts import NULL, Fingerprint, MeteoraError, RouterOptions
from meteora.base import loading
from meteora.base.placement import PlacementError, is_offloaded, placed, require_device
from meteora.base.shapes import fingerprint, sizes_of
from meteora.base.sources import PATH, weights_sha256
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import (
    Manifest,
    ModuleEntry,
    UnknownExpertError,
    number_of,
    read_manifest,
)
from meteora.checkpoint.resolve import base_download, find_checkpoint, load_base
from meteora.kernels import onednn
from meteora.kernels.addmm import experts_dtype, weight_of
from meteora.kernels.stack import Choice, ExpertStack, mean_of_all, own_choices
from meteora.model import saving
from meteora.model.prompt_choice import insert_prompt_routers
from meteora.routing.expert_cache import ExpertCache
from meteora.routing.gates import insert_gates, route_again_as_before
from meteora.routing.layer import MoELoRALinear, RoutedExperts, routed_by, routed_layers
from meteora.routing.routers import Fixed, Random, Router, uniform
from meteora.routing.weight_scores import KINDS
from meteora.untrusted.findings import listed, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


EXPERTS = "meteora_experts"
"""The attribute of a fused model that names its experts, in order."""

CACHE = "meteora_expert_cache"
"""The attribute of a fused model that holds its `ExpertCache`, or None."""


class WrongBaseError(MeteoraError):
    """A checkpoint was made for another base model."""


class NotFusedError(MeteoraError, AttributeError):
    """A model has no experts to name or to choose from."""


class RoutedAdaptersError(MeteoraError):
    """No single adapter can be set or added in a model that routes among all of its experts."""


def load(
    checkpoint_folder: str | Path,
    *,
    base_folder: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,  # noqa: ANN401  (as transformers takes it)
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    expert_cache_bytes: int | None = None,
    quantization_config: Any = None,  # noqa: ANN401  (transformers has one of each library)
    download: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fused model: the base, every expert, and the router.

    All weights are frozen. The model's `save_pretrained` writes a checkpoint, with the gates as
    they are then.

    Several threads may call the model at once, unless layers are offloaded. But `force_expert` and
    `without_experts` hold for all of them.

    Args:
        checkpoint_folder: a folder that `meteora run` wrote, or a Hub id
        base_folder: the folder of the base. Default: the base that the checkpoint names
        revision: of the Hub id
        device: the device of the model. Default: where the base loads
        device_map: in place of `device`, to spread the model: `auto`, `balanced`, or a mapping from
            the base's modules to devices, `cpu` and `disk`, as transformers takes it. Gates and
            experts are on the device of their layer; but experts of an offloaded layer stay in the
            mapped file, and only the chosen ones are copied to the device
        max_memory: with `auto` or `balanced`: the most bytes for each device
        offload_folder: for modules on `disk`, if their weights are not in the base's files in the
            form in which they are used, such as a mixture's experts. Default: a temporary folder,
            which is removed with the model; the next such load removes what a killed process left
        dtype: of the base; `auto` is that of its files, and float32 from GGUF. The experts keep
            their precision
        expert_cache_bytes: leave the experts in the mapped file, and keep at most this many bytes
            of them on the device, the last used ones; see `expert_cache`
        quantization_config: of the base, as transformers takes it, such as `BitsAndBytesConfig`;
            the experts keep their precision. Without it, the base is quantised as it was when the
            gates were fitted
        download: arguments of transformers about downloads, such as `token` or `cache_dir`. The
            token for a checkpoint on the Hub, given or saved, is sent for its base only if both
            have the same owner; for a folder, only a given token is sent

    Raises:
        CheckpointError: the folder is not a fused checkpoint, or a file in it is damaged.
        SourceError: the base cannot be downloaded or loaded, or torch has no such dtype.
        WrongBaseError: the base is not the one that the checkpoint was made for.
        PlacementError: it cannot be placed as asked, or `expert_cache_bytes` is below 0.
    """
    cache = None if expert_cache_bytes is None else ExpertCache(expert_cache_bytes)
    if device is not None:
        require_device(device, "device", "one that it finds, such as `cpu`")
    if device_map is not None and device is not None:
        raise PlacementError(
            f"device={str(device)!r} and device_map={device_map!r} both say where the model is to"
            " lie; give one of them"
        )
    options = placed(device_map, max_memory=max_memory, offload_folder=offload_folder)
    loading.require_dtype(dtype)  # like the checks above, before anything is downloaded
    folder = find_checkpoint(checkpoint_folder, revision, download=download)
    manifest = read_manifest(folder)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if device is not None and (quantization_config is not None or manifest.base.quantise):
        options["device_map"] = {"": device}  # a quantised model is loaded onto its device
    of_base = base_download(checkpoint_folder, manifest, download)
    model, tokenizer = load_base(manifest, base_folder, dtype, download=of_base, options=options)
    check_base(manifest, fingerprint(model.config, tokenizer), folder)
    if base_folder is not None:
        check_weights(manifest, Path(base_folder))
    insert_experts(model, folder, manifest, cache=cache)
    insert_routers(model, folder, manifest)
    model.requires_grad_(requires_grad=False)  # a checkpoint does not hold its base
    saving.allow(model, folder)
    model.config._name_or_path = model.name_or_path = str(checkpoint_folder)  # not its base's
    return (model.to(device) if device is not None else model), tokenizer


def check_base(manifest: Manifest, found: Fingerprint, where: Path) -> None:
    """Refuse a base whose fingerprint is not the one that the checkpoint was made for."""
    if differences := found.differences(manifest.base.fingerprint):
        raise _wrong_base(manifest, where, "; ".join(differences))


def check_weights(manifest: Manifest, folder: Path) -> None:
    """Refuse other weights than those of the local base that the checkpoint was made for.

    Nothing is checked if the manifest names no hash (a base from the Hub or a Python package), or
    if the weights were saved quantised, which changes their hash.
    """
    saved = getattr(loading.load_config(folder), "quantization_config", None)
    if manifest.base.repo_id.startswith(PATH) and saved is None:
        actual = f"sha256:{weights_sha256(folder)}"
        if actual != manifest.base.revision:
            raise _wrong_base(manifest, folder, f"weights with {actual[:19]}")


def _wrong_base(manifest: Manifest, where: Path, has: str) -> WrongBaseError:
    return WrongBaseError(
        f"{where}: this base has {has}; the checkpoint was made for {manifest.base.repo_id} at"
        f" {manifest.base.revision[:19]}, give that one"
    )


def insert_experts(
    model: PreTrainedModel, folder: Path, manifest: Manifest, *, cache: ExpertCache | None = None
) -> None:
    """Replace every targeted layer by a routed one; without routers the model is still the base."""
    setattr(model, EXPERTS, manifest.choices)
    setattr(model, CACHE, cache)
    for method in ("save_pretrained", "push_to_hub"):
        setattr(model, method, saving.refuse)
    # transformers' own methods for PEFT's adapters would report that there are none
    model.active_adapters = partial(list, manifest.names)
    for method in ("set_adapter", "enable_adapters", "disable_adapters"):
        setattr(model, method, _refuse_to_set)
    for method in ("add_adapter", "load_adapter", "delete_adapter"):
        setattr(model, method, _refuse_to_change)
    route_again_as_before(model)
    onednn.use_in(model)
    for path, lora_a, lora_b in tensors.read_experts(folder, manifest):
        entry = manifest.modules[path]
        choices = choices_of(entry.ranks, manifest.router)
        insert_layer(model, path, lora_a, lora_b, entry, choices, cache=cache)


def _refuse_to_set(*_args: object, **_kwargs: object) -> None:
    raise RoutedAdaptersError(
        "a fused model chooses among all of its experts, token by token; use"
        " `with meteora.force_expert(model, name):` for one of them, or"
        " `with meteora.without_experts(model):` for the base"
    )


def _refuse_to_change(*_args: object, **_kwargs: object) -> None:
    raise RoutedAdaptersError(
        "a fused model has the experts that its router knows; make a checkpoint with one more, or"
        " one fewer, with `meteora add` or `meteora drop`"
    )


def insert_layer(
    model: PreTrainedModel,
    path: str,
    lora_a: Tensor,
    lora_b: Tensor,
    entry: ModuleEntry,
    choices: Sequence[Choice] | None = None,
    *,
    cache: ExpertCache | None = None,
) -> None:
    """Replace the linear layer at `path` by a routed one.

    Args:
        choices: of the router; None: each expert alone

    Raises:
        WrongBaseError: there is no such layer, or it has another size than the experts need.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        projection = getattr(parent, name)
    except AttributeError as error:
        raise WrongBaseError(
            f"{path}: this base has no such module; load the base the experts were made for"
        ) from error
    if cache is None and is_offloaded(projection):
        cache = ExpertCache(0)
    sizes = sizes_of(projection)
    if sizes != (entry.in_features, entry.out_features):
        raise WrongBaseError(
            f"{path}: the experts take {entry.in_features} inputs and give {entry.out_features},"
            f" this base has {sizes or type(projection).__name__}; load the base they were made for"
        )
    if cache is None:
        stack = stack_for(weight_of(projection), lora_a, lora_b, entry, choices)
    else:
        stack = ExpertStack(lora_a, lora_b, entry.ranks, entry.scaling, choices, mapped=True)
    setattr(parent, name, MoELoRALinear(projection, stack, cache=cache))
    _rename_tied(model, f"{path}.weight", f"{path}.projection.weight")


def _rename_tied(model: PreTrainedModel, before: str, now: str) -> None:
    """Tell transformers' `tie_weights` where the weight of a routed layer lies now."""
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        if before in (keys := getattr(model, attribute, None) or {}):
            setattr(model, attribute, {now if k == before else k: v for k, v in keys.items()})


def choices_of(ranks: Sequence[int], options: RouterOptions) -> list[Choice]:
    """The choices of a module's router, in the order of `Manifest.choices`, by experts' ranks."""
    choices = own_choices(ranks)
    if options.opening == "shared":
        choices.append(mean_of_all(ranks))
    if options.null:
        choices.append(Choice(0, 0))
    return choices


def stack_for(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    entry: ModuleEntry,
    choices: Sequence[Choice] | None,
) -> ExpertStack:
    """The experts of a layer on the device of its weight, in the `experts_dtype` of both."""
    dtype = experts_dtype(lora_a.dtype, weight.dtype, max(entry.scaling))
    lora_a, lora_b = (factor.to(weight.device, dtype) for factor in (lora_a, lora_b))
    return ExpertStack(lora_a, lora_b, entry.ranks, entry.scaling, choices)


def insert_routers(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    """Give every routed layer the router that the manifest describes."""
    options = manifest.router
    if options.kind == "gate":
        insert_gates(model, tensors.read_gates(folder, manifest), options)
        return
    if options.kind == "prompt":
        insert_prompt_routers(model, tensors.read_prompt_gates(folder, manifest), options)
        return
    for number, layer in enumerate(routed_layers(model).values()):
        layer.router = make_router(options, layer, seed=number)


def make_router(options: RouterOptions, layer: RoutedExperts, *, seed: int = 0) -> Router:
    """A router that needs no training: one of `Unfitted`, or `random`.

    Args:
        seed: of `random`; give every layer its own

    Raises:
        MeteoraError: the kind is another.
    """
    kinds: dict[str, Callable[[ExpertStack, RouterOptions], Router]] = {
        **KINDS,
        "uniform": uniform,
        "random": partial(Random, seed=seed),
    }
    if options.kind not in kinds:
        raise MeteoraError(
            f"router {options.kind!r} is none of {', '.join(kinds)}; a gate must be fitted"
        )
    return kinds[options.kind](layer.stack, options).to(layer.device)


def expert_cache(model: PreTrainedModel) -> ExpertCache | None:
    """The cache of a model that was loaded with `expert_cache_bytes`: bytes held, hits and misses.

    None if the model was loaded without.

    Raises:
        NotFusedError: the model is not a fused one.
    """
    return _of_fused(model, CACHE)


def expert_names(model: PreTrainedModel) -> list[str]:
    """The choices of every router, in the order of its logits: the experts first.

    After them come `(mean)` and `(base)`, if the mean of all experts or the base is a choice.

    Raises:
        NotFusedError: the model is not a fused one.
    """
    return list(_of_fused(model, EXPERTS))


def _of_fused(model: PreTrainedModel, attribute: str) -> Any:  # noqa: ANN401  (names, or a cache)
    try:
        return getattr(model, attribute)
    except AttributeError:
        raise NotFusedError(
            f"this {type(model).__name__} has no experts; load a fused model with `meteora.load`"
        ) from None


def check_expert(name: str, names: Sequence[str]) -> None:
    """Raise an `UnknownExpertError` for a name that is not among a model's experts."""
    number_of(name, names, "this model")


def force_expert(model: PreTrainedModel, name: str) -> AbstractContextManager[None]:
    """Send every token to one expert with weight 1, inside a `with` block.

    The output then equals PEFT's with this adapter alone. The routers come back at the end.

    Args:
        name: of an expert; or `(base)`, the base without experts

    Raises:
        UnknownExpertError: no expert of the model has this name.
        NotFusedError: the model is not a fused one.
    """
    names = expert_names(model)
    if not isinstance(name, str):
        raise UnknownExpertError(
            f"{shortened(name)} is no name of an expert; this model has {listed(names)}"
        )
    if name == NULL and NULL not in names:
        return without_experts(model)
    check_expert(name, names if NULL in names else [*names, NULL])
    one = torch.zeros(len(names))
    one[names.index(name)] = 1.0
    return routed_by(model, lambda layer: Fixed(one.to(layer.device)))


@contextmanager
def without_dropout(model: nn.Module) -> Generator[None]:
    """A context in which a model is in evaluation mode.

    At the end each module has its mode of before, and a new one the model's.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = before.get(module, before[model])


def without_experts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run the base alone, inside a `with` block; the routers come back at the end."""
    return routed_by(model, lambda _: None)
