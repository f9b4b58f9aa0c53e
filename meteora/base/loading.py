"""Load base models and their tokenizers.

A base is named `owner/name` (on the Hub), `gguf:<python package>/<file>` or `path:<folder>`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as hf_logging

from meteora.artifacts import MeteoraError
from meteora.artifacts.specs import place_of
from meteora.base import placement
from meteora.base.config_checks import check_source, require_layers_of_text, require_tokens
from meteora.base.placement import (
    explain_offloading,
    is_out_of_memory,
    spreading,
)
from meteora.base.shared_block import SharedBlock
from meteora.base.sources import SourceError, require_config
from meteora.base.temporary_folder import temporary_folder
from meteora.untrusted.findings import brief, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


CACHES = ("past_key_values", "cache_params", "state")
"""Names of the cache among a model's `forward` arguments: of most, of Mamba's kind, and of RWKV."""

WRITTEN = "meteora-offload-"
"""How the names of temporary folders with offloaded weights begin."""
ADAPTER_CONFIG = "adapter_config.json"
"""A file beside a base because of which transformers loads an adapter, too."""
_PARSING = threading.Lock()


@contextmanager
def _parsed_once() -> Generator[None]:
    """Let transformers parse a GGUF file once, for tokenizer, config and weights, without its bar.

    It parses it for each of them, two seconds a time where the vocabulary is small, and makes the
    table of the weights' names anew for every module of the model. One thread at a time.
    """
    import gguf  # noqa: PLC0415  (only such files need it)
    from transformers import modeling_gguf_pytorch_utils as reading  # noqa: PLC0415

    with _PARSING:
        reader, names, bar = gguf.GGUFReader, gguf.get_tensor_name_map, vars(reading)["tqdm"]
        vars(gguf).update(
            GGUFReader=functools.cache(reader), get_tensor_name_map=functools.cache(names)
        )
        vars(reading).update(tqdm=functools.partial(bar, disable=True))  # its switch is for others
        try:
            yield
        finally:
            vars(gguf).update(GGUFReader=reader, get_tensor_name_map=names)
            vars(reading).update(tqdm=bar)


@contextmanager
def _silence() -> Generator[None]:
    """Keep transformers' loading messages and bars, which users cannot act on, off the terminal."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    offloads = logging.getLogger("accelerate.big_modeling")  # warns of weights on the meta device
    before = offloads.level
    offloads.setLevel(logging.ERROR)
    try:
        yield
    finally:
        offloads.setLevel(before)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


_QUIET = SharedBlock(_silence)


@contextmanager
def reading(source: Path, fault: str) -> Generator[None]:
    """Turn errors about damaged or missing files into a `SourceError`; libraries raise many kinds.

    Errors of the machine, such as too little memory, stay as they are.
    """
    try:
        yield
    except MeteoraError:
        raise
    except ImportError as error:
        # the error of transformers names the package
        raise SourceError(
            f"{source} cannot be loaded here: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:
        if _is_of_machine(error):
            raise
        raise SourceError(
            f"{source}: {fault} ({brief(error)}); download or save the base again, with its"
            " tokenizer"
        ) from error


def _is_of_machine(error: Exception) -> bool:
    """Whether the machine, such as its memory or its disk, is at fault, and no file of a base."""
    return is_out_of_memory(error) or bool(getattr(error, "errno", None))


def _named(source: Path) -> dict[str, Any]:
    """The arguments with which transformers reads a folder, or a GGUF file."""
    if source.is_file():
        return {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    return {"pretrained_model_name_or_path": source}


def load_tokenizer(
    source: Path, *, options: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, without remote code.

    Args:
        source: a folder, or a GGUF file
        options: for `AutoTokenizer.from_pretrained`, such as `padding_side`

    Raises:
        SourceError: transformers cannot read it, or needs a package that is not installed.
    """
    with reading(source, "the tokenizer cannot be loaded"):
        check_source(source)
        loaded: Any = AutoTokenizer.from_pretrained(
            **_named(source), trust_remote_code=False, **(options or {})
        )
        loaded("a")  # settings of another type show only in use
    return cast("PreTrainedTokenizerBase", loaded)


def _reads_both_ways(config: PretrainedConfig) -> bool:
    """Whether a model is an encoder alone, as BERT is; others do not read `is_decoder`."""
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and config.model_type != "bert-generation":
        return False
    return not (getattr(config, "is_decoder", True) or config.is_encoder_decoder)


def load_config(source: Path) -> PretrainedConfig:
    """Read the config of a base from its folder or a GGUF file. No remote code.

    Raises:
        SourceError: transformers cannot read it, or cannot generate text with it.
    """
    if not source.is_file():
        require_config(source)
    try:
        check_source(source)
        with _QUIET.open():
            config = AutoConfig.from_pretrained(**_named(source), trust_remote_code=False)
    except Exception as error:  # a stranger's file: the library can raise anything
        if _is_of_machine(error):
            raise
        raise SourceError(
            f"{source}: transformers does not know this architecture without code of the base's"
            f" own, which is never run, or its config is damaged ({brief(error)}); take a base that"
            " it knows"
        ) from error
    if config.model_type == "meteora":
        raise SourceError(
            f"{source} is a fused checkpoint, and no base; take the base that it was made on"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SourceError(
            f"{source}: {config.model_type} is no language model that transformers loads with"
            " AutoModelForCausalLM; adapters can be routed in a decoder of text alone"
        )
    if _reads_both_ways(config):
        raise SourceError(
            f"{source}: a {config.model_type} whose config does not say is_decoder reads a text in"
            " both directions, and writes none; take a decoder as the base"
        )
    try:
        require_layers_of_text(config)
    except (AttributeError, ValueError) as error:  # a model of bytes or of music
        raise SourceError(
            f"{source}: the config of a {config.model_type} does not describe one stack of layers"
            f" that reads tokens of text ({brief(error)}); take another base"
        ) from error
    return config


def load_gguf(
    file: Path, *, options: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file and dequantise it to float32; the model can be saved afterwards.

    Args:
        options: for the model, not the tokenizer, such as `device_map`, or another `dtype`

    Raises:
        SourceError: It is damaged, or lacks weights.
        PlacementError: It cannot be spread as a `device_map` among the options says.
    """
    with _QUIET.open(), _parsed_once():
        tokenizer = load_tokenizer(file)
        model = _load_model(file, {"dtype": torch.float32, **(options or {})})
    # it is a plain model now; leftovers of the quantizer would stop save_pretrained
    vars(model.config).pop("quantization_config", None)  # its layers have the same config
    model.config.architectures = [type(model).__name__]  # which save_pretrained would add, too
    for leftover in ("hf_quantizer", "is_quantized"):
        setattr(model, leftover, None)
    return cast("PreTrainedModel", model.eval()), tokenizer


def layers_on_disk(folder: Path, device: str) -> dict[str, str]:
    """A device map for `load_folder` that reads numbered layers from disk for each call.

    The head is read for each call, too, if it has its own weights: only whole answers need it.
    """
    model = without_weights(folder)
    inside = Counter(p.stem for path, _ in model.named_modules() if (p := place_of(path)))
    ((layers, _),) = inside.most_common(1)
    head = placement.own_head(model)
    device_map: dict[str, str] = {}

    def place(path: str, module: torch.nn.Module) -> None:
        if path == layers or module is head:
            device_map[path] = "disk"
        elif layers.startswith(f"{path}.") or not path:
            for name, child in module.named_children():
                place(f"{path}.{name}".lstrip("."), child)
        else:
            device_map[path] = device

    place("", model)
    return device_map


def without_weights(source: Path) -> PreTrainedModel:
    """A base on the meta device: shapes without weights, from its config.

    Raises:
        SourceError: transformers makes no model of it, or one whose cache is not known.
    """
    config = load_config(source)
    with reading(source, "transformers makes no model of its config"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if not inspect.signature(model.forward).parameters.keys() & set(CACHES):
        raise SourceError(
            f"{source}: {type(model).__name__} takes no cache of the tokens before, or one of its"
            " own kind, so routes cannot be followed from token to token; take another base"
        )
    return model


def refuse_quantised(folder: Path) -> None:
    """Raise a `SourceError` for a base that is quantised already."""
    if getattr(load_config(folder), "quantization_config", None) is not None:
        raise SourceError(
            f"{folder}: this base is quantised already; use it as it is, without `quantise`"
        )


def load_folder(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    *,
    options: Mapping[str, Any] | None = None,
    quantise: str = "",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base from a folder. No remote code, no pickle.

    Args:
        options: for the model, not the tokenizer, such as `quantization_config`
        quantise: see `BaseSpec.quantise`

    Raises:
        SourceError: It cannot be loaded, or needs a package that is not installed, as some
            quantised bases do.
        PlacementError: It cannot be spread as a `device_map` among the options says.
    """
    config, model_options = load_config(folder), dict(options or {})
    with _QUIET.open(), reading(folder, "the model cannot be loaded"):
        if quantise:
            refuse_quantised(folder)
            named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
            model_options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=quantise == "8bit",
                load_in_4bit=quantise == "4bit",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=named or config.dtype or torch.float32,
            )
            # at each product of 8 bits it warns that it rounds the inputs; users cannot change it
            logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
        model = _load_model(folder, {"dtype": dtype, "use_safetensors": True, **model_options})
        return cast("PreTrainedModel", model.eval()), load_tokenizer(folder)


def require_dtype(dtype: Any) -> None:  # noqa: ANN401  (as transformers takes it)
    """Raise a `SourceError` for a dtype, or the name of one, in which no model can compute."""
    is_name = isinstance(dtype, str) and dtype != "auto"
    named = getattr(torch, dtype, None) if is_name else dtype
    if isinstance(named, torch.dtype):
        computes = named.is_floating_point and named.itemsize >= 2  # 8 bits are for storing
    else:
        computes = not is_name
    if not computes:
        raise SourceError(
            f"dtype={dtype!r} is no floating-point type of 16 bits or more; give one such as"
            " 'bfloat16'"
        )


def _may_offload(device_map: Any) -> bool:  # noqa: ANN401  (as transformers takes it)
    """Whether weights may stay on the disk; else no temporary folder has to be writable."""
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return any(device in ("disk", *placement.WHOLE) for device in devices)


def _load_model(source: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model; refuse missing weights, which transformers would initialise at random.

    Weights on `disk` that are used in another form than the files have them, such as a mixture's
    experts, are written again: to the `offload_folder`, or to one that is removed with the model.
    """
    if (source / ADAPTER_CONFIG).is_file():
        raise SourceError(
            f"{source}: it holds {ADAPTER_CONFIG}, and transformers would load that adapter into"
            " the base; take the adapter's files out of the folder of the base"
        )
    with ExitStack() as made, reading(source, "the model cannot be loaded"):
        written = None
        if _may_offload(options.get("device_map")) and "offload_folder" not in options:
            parent = Path(tempfile.gettempdir())
            written = made.enter_context(temporary_folder(parent, WRITTEN))
            options = {**options, "offload_folder": written}
        with spreading(options):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **_named(source), trust_remote_code=False, output_loading_info=True, **options
            )
        model, info = loaded
        require_tokens(model.generation_config)
        if written and any(written.iterdir()):
            weakref.finalize(model, made.pop_all().close)
    if missing := sorted(info["missing_keys"]):
        raise SourceError(
            f"{source}: {len(missing)} weights of the model are not in its files, such as"
            f" {shortened(missing[0])}; take the base as a language model with its output head, or"
            " download or save it again"
        )
    explain_offloading(model)
    return model
