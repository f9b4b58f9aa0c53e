"""For any change to a sound checkpoint: it loads, or there is one refusal of our own."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from meteora.artifacts import MeteoraError
from meteora.base import loading
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST
from tests.clock import little_work
from tests.meteora.checkpoint.checkpoint_maker import (
    gated,
    joined,
    load_into,
    read_all,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.conftest import World

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4, 5_000, 2**31, 2**70, 10**400, 0.0, 0.5, -1.0, 1e300, 1e-300,
    "", "1", "x", "\x1b[31m", "\x00", "a\nb", "../x", "/abs", "main", "a" * 40,
    "sha256:" + "0" * 64, "gguf:x/y.gguf", "path:..", "(base)", "gate", "norm", "prompt",
    "shared", "token", "F64", "F16", "F8_E4M3", "I8", [], [0],
    [1, 2, 3, 4], [[]], {}, {"a": 1}, "x" * 3_000, "\ud800",
]  # fmt: skip
"""What a value of JSON is replaced by: other types, and numbers beyond every range."""
SURVIVORS_THAT_RUN = 300
"""Of the changed checkpoints that are read: how many run in their base."""


@dataclass
class Sound:
    """The sound checkpoint's files, and the base that it belongs to."""

    folder: Path
    files: dict[str, bytes]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def sound(world: World, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    gated(world, folder, hashed=False)
    files = {name: (folder / name).read_bytes() for name in (MANIFEST, EXPERTS, GATES)}
    model, tokenizer = loading.load_folder(world.base)
    return Sound(folder, files, model, tokenizer)


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


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """One change to bytes: some are others, missing, doubled, or the rest is cut off."""
    at = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(400, len(data)))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 65) :]
    if kind == 3:
        return data[:at] + draw.randbytes(draw.randrange(1, 65)) + data[at:]
    special = draw.choice([torch.nan, torch.inf, -torch.inf, 1e38, 0.0])
    return data[:-8] + struct.pack("<ff", special, special)


def change_tensors(data: bytes, draw: random.Random) -> bytes:
    """One change to a safetensors file: to its bytes, its header, or the notes in it."""
    kind = draw.randrange(3)
    header, rest = split(data)
    notes = header["__metadata__"].get("meteora")
    if kind == 0:
        return change_bytes(data, draw)
    if kind == 1 and notes is not None:
        header["__metadata__"]["meteora"] = json.dumps(change_json(json.loads(notes), draw))
        return joined(header, rest)
    return joined(change_json(header, draw), rest)


def changed(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """The files after one to three changes to one of them."""
    files = dict(files)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice([MANIFEST, MANIFEST, EXPERTS, GATES])
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, struct.error):
            if name != MANIFEST:
                files[name] = change_tensors(files[name], draw)
            elif draw.random() < 0.8:
                body = change_json(json.loads(files[name]), draw)
                files[name] = json.dumps(body).encode()
            else:
                files[name] = change_bytes(files[name], draw)
    return files


def fuzz(sound: Sound, seeds: range) -> tuple[int, int]:
    """Read a changed checkpoint for each seed; returns how many were read, and how many ran."""
    read = ran = 0
    messages: dict[int, str] = {}
    for name in (EXPERTS, GATES):
        (sound.folder / name).chmod(0o644)
    for seed in seeds:
        files = changed(sound.files, random.Random(seed))
        for name, data in files.items():
            (sound.folder / name).write_bytes(data)
        try:
            manifest = read_all(sound.folder)
            read += 1
            if ran < SURVIVORS_THAT_RUN:
                ran += 1
                load_into(copy.deepcopy(sound.model), sound.tokenizer, sound.folder, manifest)
        except MeteoraError as error:
            messages[seed] = str(error)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    for seed, message in messages.items():
        assert message.isprintable(), seed
        assert len(message) < 3_000, seed
    return read, ran


def test_a_changed_checkpoint_loads_or_is_refused(sound: Sound) -> None:
    with little_work():
        read, ran = fuzz(sound, range(400))
    assert read > 5  # else nothing is tested but the first check
    assert ran > 5


@pytest.mark.slow
def test_a_hundred_thousand_changed_checkpoints_load_or_are_refused(sound: Sound) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    read, _ = fuzz(sound, range(1_000, 101_000))
    assert read > 1_000
    assert time.monotonic() - began < 3_600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # kB


def test_the_copy_of_the_files_is_sound(sound: Sound, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, data in sound.files.items():
        (folder / name).write_bytes(data)
    manifest = read_all(folder)
    logits = load_into(copy.deepcopy(sound.model), sound.tokenizer, folder, manifest)
    assert logits.isfinite().all()
    shutil.rmtree(folder)
