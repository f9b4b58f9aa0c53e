"""A small sound checkpoint with gates, and its files taken apart to be changed byte by byte."""

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meteora.artifacts import RouterOptions, file_sha256
from meteora.base.chat_template import Template
from meteora.base.shapes import fingerprint
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, Manifest, read_manifest
from meteora.checkpoint.tensors import Gates, read_experts, read_gates, write_gates
from meteora.model.fused import check_base, insert_experts, insert_routers
from tests.conftest import World


def gated(world: World, folder: Path, *, hashed: bool = True) -> Manifest:
    """Write the world's checkpoint with gates: k and v follow q, and a template opens prompts.

    Args:
        hashed: whether the manifest names the hashes of both files of tensors
    """
    shutil.copytree(world.checkpoint, folder)
    modules = world.manifest.modules
    follows = {
        path: f"{path.rpartition('.')[0]}.q_proj"
        for path in modules
        if path.endswith((".k_proj", ".v_proj"))
    }
    own = {
        path: (torch.randn(4, entry.in_features), torch.randn(4))
        for path, entry in modules.items()
        if path not in follows
    }
    write_gates(folder / GATES, Gates(own, follows, Template((1, 5, 6), (7,), (5, 6))))
    options = RouterOptions("gate", 2, 1.0, opening="prompt", share="point")
    names = (EXPERTS, GATES) if hashed else ()
    manifest = dataclasses.replace(
        world.manifest,
        router=options,
        gates={"method": "calibrate", "num_tokens": 8, "composites": [2, 3]},
        files={name: file_sha256(folder / name) for name in names},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads((folder / MANIFEST).read_bytes())
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the rest of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = split(path.read_bytes())
    change(header)
    path.chmod(0o644)
    path.write_bytes(joined(header, data))


def edit_notes(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON in the metadata of a file of gates."""

    def in_header(header: dict[str, Any]) -> None:
        notes = json.loads(header["__metadata__"]["meteora"])
        change(notes)
        header["__metadata__"]["meteora"] = json.dumps(notes)

    edit_header(path, in_header)


def read_all(folder: Path) -> Manifest:
    """Read every file of a checkpoint, as loading does, without a base."""
    manifest = read_manifest(folder)
    for _ in read_experts(folder, manifest):
        pass
    if manifest.router.kind == "gate":
        read_gates(folder, manifest)
    return manifest


def load_into(model: Any, tokenizer: Any, folder: Path, manifest: Manifest) -> Any:
    """Put a checkpoint into its base, and return the logits of a short prompt."""
    check_base(manifest, fingerprint(model.config, tokenizer), folder)
    insert_experts(model, folder, manifest)
    insert_routers(model, folder, manifest)
    with torch.inference_mode():
        return model(torch.tensor([[1, 5, 6, 9, 9, 7]])).logits
