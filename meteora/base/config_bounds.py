"""Bounds on a base's config, before transformers reads it: it lists every layer, one by one."""

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
MAX_LAYERS = 2_000
"""The deepest published models have a tenth."""
LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")
"""Names of their number: `num_hidden_layers`, `n_layer`, `num_decoder_layers`."""


def refuse_endless(config: Path) -> None:
    """Check the number of layers in a `config.json`, if it is there.

    Raises:
        ValueError: it is no JSON, or too large, or has more layers than any model.
    """
    if not config.is_file():
        return
    with config.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    waiting: list[Any] = [json.loads(data)]
    while waiting:
        one = waiting.pop()
        for key, value in one.items() if isinstance(one, dict) else ():
            if LAYERS.fullmatch(key) and type(value) is int and value > MAX_LAYERS:
                raise ValueError(f"{key} is {value!s:.20}, more than {MAX_LAYERS}")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
