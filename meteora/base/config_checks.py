"""Checks of a base's configs that transformers does not make.

It lists every layer and label of a config, one by one, loads code for attention that a config
names, and compares what it generates with any end token. The fields of a GGUF file are a config.
"""

import json
import re
from pathlib import Path
from typing import Any

from meteora.untrusted.findings import shortened
from meteora.untrusted.gguf_header import read_fields

MAX_BYTES = 16 << 20
MAX_LAYERS = 2_000
"""The deepest published models have a tenth."""
INTERMEDIATE_SIZES = ("intermediate_size", "ffn_dim", "n_inner")
"""Names of one size: of most architectures, of OPT, of GPT-2."""
COUNTS = re.compile(r"((num|n)_)?(\w+_)?(layers?|blocks?|labels)|attention_types")
"""Names of numbers of things that a config lists: `n_layer`, `decoder_layers`, `num_labels`.

GPT-Neo's `attention_types` has such numbers in a list.
"""


def check_source(source: Path) -> None:
    """Check the fields of a GGUF file, or the `config.json` of a folder if it has one.

    Raises:
        ValueError: it cannot be read, or is too large, has more layers than any model, or asks for
            code.
    """
    if source.is_file():
        _check_gguf(source)
    elif (config := source / "config.json").is_file():
        _check_json(config)


def require_layers_of_text(config: Any) -> None:  # noqa: ANN401  (transformers is slow to import)
    """Raise an error unless a loaded config describes one stack of layers that reads text.

    Some do not state the number of layers: it is the length of a list, or of a text.

    Raises:
        AttributeError: it lacks a size.
        ValueError: it has no layers, more than any model, or a size that is no number.
    """
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    for name in ("hidden_size", "vocab_size"):
        if type(size := getattr(text, name)) is not int:
            raise ValueError(f"{name} is {shortened(size)}, and no number")
    if not (type(num_layers) is int and 0 < num_layers <= MAX_LAYERS):
        raise ValueError(f"it has {shortened(num_layers)} layers; it must have 1 to {MAX_LAYERS}")
    layers = text.per_layer_config if text.is_heterogeneous else [text]
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", *INTERMEDIATE_SIZES):
        for size in (getattr(layer, name, None) or 0 for layer in layers):
            if not all(type(one) is int for one in (size if isinstance(size, list) else [size])):
                raise ValueError(f"{name} is {shortened(size)}, and no number")


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        fields = read_fields(file, path.stat().st_size)
    for key, value in fields.items():
        if key.endswith(".block_count") and not (type(value) is int and 0 < value <= MAX_LAYERS):
            found = "no number" if value is None else f"{value!s:.20}"
            raise ValueError(f"{shortened(key)} is {found}; it must be 1 to {MAX_LAYERS}")


def _check_json(config: Path) -> None:
    with config.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not a valid JSON file") from None
    if isinstance(whole, dict) and "configuration_files" in whole:
        raise ValueError("its configuration_files name another config; take that key out")
    waiting: list[Any] = [whole]
    while waiting:
        one = waiting.pop()
        for key, value in one.items() if isinstance(one, dict) else ():
            if COUNTS.fullmatch(key) and (most := _largest(value)) > MAX_LAYERS:
                raise ValueError(f"{key} is {most!s:.20}, more than {MAX_LAYERS}")
            # transformers gets attention or experts named owner/name from the Hub, and runs them
            if key.endswith(("_implementation", "_internal")) and "/" in json.dumps(value):
                raise ValueError(
                    f"{shortened(key)} is {shortened(value)}, code of the Hub; take it out"
                )
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _largest(value: object) -> int:
    """The largest whole number of a value, or in its lists; 0 if there is none."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) else 0


def require_tokens(generation: object) -> None:
    """Raise a TypeError if the begin, end or padding token of a generation config is no token."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(generation, name, None)
        if ids is not None and not all(
            type(one) is int for one in (ids if isinstance(ids, list) else [ids])
        ):
            raise TypeError(f"{name} of its generation config is {shortened(ids)!r}, no token")
