"""What a base is, as far as adapters and estimates depend on it: fingerprint, sizes, norms."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from meteora.artifacts import Fingerprint, canonical_sha256
from meteora.artifacts.specs import place_of
from meteora.base import placement
from meteora.base.config_checks import INTERMEDIATE_SIZES
from meteora.base.loading import load_config, load_tokenizer, reading, without_weights
from meteora.base.sources import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BITS = {"8bit": 8.0, "4bit": 4.5}
"""Bits of one weight in a quantised layer; with 4 bits, 64 weights share a scale."""


def fingerprint(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Return the facts that adapters and gates depend on: architecture, sizes, vocabulary."""
    text = config.get_text_config()
    heads = _largest(text, "num_attention_heads")  # a state-space model has none
    intermediate = next(
        (size for name in INTERMEDIATE_SIZES if (size := _largest(text, name))), None
    )
    named = config.architectures if isinstance(config.architectures, list) else []
    return Fingerprint(
        architecture=named[0] if named and isinstance(named[0], str) else type(config).__name__,
        hidden_size=text.hidden_size,
        intermediate_size=intermediate
        or 4 * text.hidden_size,  # GPT-2's rule where n_inner is null
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=_largest(text, "num_key_value_heads") or heads,
        vocab_size=text.vocab_size,
        vocabulary_sha256=canonical_sha256(tokenizer.get_vocab()),
    )


def _largest(text: PretrainedConfig, name: str) -> int:
    """A size in a config, 0 if it has none; the largest where layers differ, as Gemma 4's do."""
    layers = text.per_layer_config if text.is_heterogeneous else [text]
    sizes = [getattr(layer, name, None) or 0 for layer in layers]
    return max(max(size) if isinstance(size, list) else size for size in sizes)  # Gemma 3n's


def fingerprint_of(folder: Path) -> Fingerprint:
    """Return the fingerprint of a base in a folder, from its config and tokenizer alone."""
    config = load_config(folder)
    return fingerprint(config, load_tokenizer(folder))


def linear_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (IN, OUT) of every linear layer of a base, by module path. No weights are read."""
    return _linears(without_weights(folder))


def _linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {path: sizes for path, m in model.named_modules() if (sizes := sizes_of(m)) is not None}


@dataclass(frozen=True)
class Shape:
    """The sizes of a base, read from its config."""

    num_parameters: int
    dtype: torch.dtype
    """Of the weights, by the config; float32 if it names none."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    cache_bytes_per_token: int
    """Bytes of keys and values of one token in all layers."""
    linears: dict[str, tuple[int, int]]
    """(IN, OUT) by module path."""
    head_parameters: int = 0
    """Parameters of the output head, if it does not share those of the embeddings."""
    quantise: str = ""
    """See `BaseSpec.quantise`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in files."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linear layers that lie in numbered layers."""
        inside = (size for path, size in self.linears.items() if place_of(path))
        return sum(num_in * num_out for num_in, num_out in inside)

    @property
    def loaded_bytes(self) -> float:
        """Bytes of the weights in memory."""
        if not self.quantise:
            return self.num_bytes
        kept = self.num_parameters - self.layer_parameters
        return kept * self.dtype.itemsize + self.layer_parameters * BITS[self.quantise] / 8


def shape_of(source: Path) -> Shape:
    """Read the sizes of a base from its config, in a folder or in a GGUF file, without weights.

    A GGUF file is dequantised to float32 when it is used.
    """
    return shape_of_model(without_weights(source), dequantised=source.is_file())


def shape_of_model(model: PreTrainedModel, *, dequantised: bool = False) -> Shape:
    """Read the sizes of a model, which may have no weights; dequantised ones are float32."""
    config = model.config
    text = config.get_text_config()
    width = sum(_key_width(layer) for layer in text.per_layer_config)
    dtype = torch.float32 if dequantised else getattr(config, "dtype", None) or torch.float32
    linears, head = _linears(model), placement.own_head(model)
    return Shape(
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=max(num_in for num_in, _ in linears.values()),
        vocab_size=text.vocab_size,
        cache_bytes_per_token=2 * width * dtype.itemsize,
        linears=linears,
        head_parameters=0 if head is None else sum(p.numel() for p in head.parameters()),
    )


def _key_width(layer: PretrainedConfig) -> int:
    """The numbers in the keys of one token in one layer, by the config of that layer."""
    heads = getattr(layer, "num_attention_heads", 0)  # a state-space model has none
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return kv_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // max(1, heads))


def weight_norms(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Return the Frobenius norms of linear layers to six digits; one weight is in memory at a time.

    Args:
        sizes: (IN, OUT) by module path; weights of other shapes and quantised ones are left out

    Raises:
        SourceError: a file is damaged, or a weight is not finite.
    """
    norms = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with (
            reading(shard, "it cannot be read"),
            safe_open(shard, framework="pt", backend="pread") as file,
        ):
            keys = set(file.keys())
            for path, size in sizes.items():
                key = weight_key(path, keys)
                if key is None or sorted(file.get_slice(key).get_shape()) != sorted(size):
                    continue
                weight = file.get_tensor(key)
                if not _is_plain(weight):
                    continue
                norms[path] = _norm(weight)
                if not math.isfinite(norms[path]):
                    raise SourceError(
                        f"{shard}: {key} holds NaN or infinity; download or save the base again"
                    )
    return norms


def weight_key(path: str, keys: Collection[str]) -> str | None:
    """Return the key of a module's weight in a file of its base; None if it is not there.

    Files of some architectures lack the first part of the path, such as `transformer.`
    """
    key = f"{path}.weight"
    return next((one for one in (key, key.partition(".")[2]) if one in keys), None)


def norms_of(model: nn.Module, paths: Iterable[str]) -> dict[str, float]:
    """Return the norms of linear layers of a loaded model, without quantised or offloaded ones."""
    weights = {path: getattr(model.get_submodule(path), "weight", None) for path in paths}
    return {
        path: _norm(weight)
        for path, weight in weights.items()
        if isinstance(weight, torch.Tensor) and _is_plain(weight)
    }


def _is_plain(weight: torch.Tensor) -> bool:
    """Return whether a weight is in memory and not quantised; 8-bit floats need a scale, too."""
    return weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta


def _norm(weight: torch.Tensor) -> float:
    return float(f"{torch.linalg.vector_norm(weight.float()).item():.6g}")


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (IN, OUT) of a linear layer, GPT-2's Conv1D included; None for other modules.

    The layers of quantising libraries are no `nn.Linear`, but have its two sizes. The router of a
    mixture may be one and return its choices, too: nothing can be added to that.
    """
    if type(module).__name__.endswith("Router"):
        return None
    if isinstance(module, Conv1D):
        num_in, num_out = module.weight.shape
        return num_in, num_out
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return cast("tuple[int, int]", sizes) if all(type(size) is int for size in sizes) else None
