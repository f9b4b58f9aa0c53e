"""Adapters as files, written byte by byte: sound ones, and ones that no library writes."""

import json
import math
import struct
from pathlib import Path
from typing import Any

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "BOOL": 1}
ONE = {"F64": "<d", "F32": "<f", "F16": "<e"}

Tensors = dict[str, tuple[str, tuple[int, ...], float]]
"""Of each name its dtype, its shape and the number that fills it."""


def fill(dtype: str, count: int, value: float) -> bytes:
    if dtype in ONE:
        return struct.pack(ONE[dtype], value) * count
    if dtype == "BF16":  # the upper half of a float32
        return struct.pack("<f", value)[2:] * count
    return bytes([int(value)] + [0] * (ITEMSIZE[dtype] - 1)) * count


def safetensors(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, value) in tensors.items():
        part = fill(dtype, math.prod(shape), value)
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def key(path: str, factor: str, prefix: str = "base_model.model.") -> str:
    return f"{prefix}{path}.lora_{factor}.weight"


def pair(
    path: str, r: int = 4, size: tuple[int, int] = (8, 6), dtype: str = "F32", value: float = 0.5
) -> Tensors:
    """A and B of one module of `size` (inputs, outputs)."""
    return {
        key(path, "A"): (dtype, (r, size[0]), value),
        key(path, "B"): (dtype, (size[1], r), value),
    }


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
V0, V1 = (f"model.layers.{i}.self_attn.v_proj" for i in range(2))


def write_adapter(folder: Path, tensors: Tensors | bytes | None = None, **config: Any) -> Path:
    """A small sound PEFT adapter, but for what is asked to be otherwise."""
    claims = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    } | config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(claims), encoding="utf-8")
    if tensors is None:
        tensors = {k: v for path in (Q0, Q1, V0, V1) for k, v in pair(path).items()}
    data = tensors if isinstance(tensors, bytes) else safetensors(tensors)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def write_mlx(folder: Path, parameters: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True)
    claims = {"model": "org/base", "fine_tune_type": "lora", "num_layers": 2} | config
    text = json.dumps(claims | {"lora_parameters": parameters})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors: Tensors = {f"{Q0}.lora_a": ("F32", (8, 4), 0.5), f"{Q0}.lora_b": ("F32", (4, 6), 0.5)}
    (folder / "adapters.safetensors").write_bytes(safetensors(tensors))
    return folder
