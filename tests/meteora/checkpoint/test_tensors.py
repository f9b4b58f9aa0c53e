"""The files of a fused checkpoint: written, read again, and refused when they are not whole."""

import dataclasses
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import meteora
from meteora.adapters.weights import DTYPES
from meteora.artifacts import MeteoraError
from meteora.base.chat_template import Template
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    Manifest,
    ModuleEntry,
)

MODULES = {"one": ModuleEntry(5, 4, (3,), (1.0,)), "two": ModuleEntry(2, 7, (1,), (1.0,))}


def made_up(dtype):
    return [
        (
            torch.randn(one.num_ranks, one.in_features).to(dtype),
            torch.randn(one.out_features, one.num_ranks).to(dtype),
        )
        for one in MODULES.values()
    ]


@pytest.fixture
def folder(world, tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return shutil.copytree(world.checkpoint, tmp_path / "copy")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_is_streamed_out_is_what_save_file_would_write(tmp_path, dtype):
    pairs = made_up(dtype)
    tensors.write_experts(tmp_path / "ours", MODULES, dtype, pairs)
    named = {}
    for module, (a, b) in zip(MODULES, pairs, strict=True):
        named |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
    save_file(named, tmp_path / "theirs", metadata={"format": "pt"})
    (header_bytes,) = struct.unpack("<Q", (tmp_path / "ours").read_bytes()[:8])
    assert (8 + header_bytes) % 64 == 0
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key])


def test_tensors_of_another_shape_or_number_than_promised_are_not_written(tmp_path):
    pairs = made_up(torch.float32)
    with pytest.raises(CheckpointError, match="their sizes do not agree"):
        tensors.write_experts(tmp_path / "x", MODULES, torch.float32, [pairs[0], pairs[0]])
    with pytest.raises(ValueError, match="shorter"):
        tensors.write_experts(tmp_path / "x", MODULES, torch.float32, pairs[:1])


def test_a_manifest_comes_back_equal(world):
    full = dataclasses.replace(
        world.manifest,
        modules={
            "m": ModuleEntry(3, 5, (1, 2, 0, 4), (0.5, 2.0, 0.0, 1 / 3)),
            "n": ModuleEntry(5, 3, (0, 0, 6, 0), (0.0, 0.0, 1.0, 0.0)),
        },
        gates={"method": "calibrate", "seed": 3, "num_tokens": 7},
        fused_id="fused:" + "1" * 64,
        router_id="router:" + "2" * 64,
        files={EXPERTS: "3" * 64},
    )
    assert Manifest.from_json(full.to_json().encode()) == full


def test_gates_come_back_equal(world, tmp_path):
    manifest = dataclasses.replace(
        world.manifest, modules=dict.fromkeys("mn", ModuleEntry(3, 5, (1,), (1.0,)))
    )
    gates = {"m": (torch.randn(3, 4).T, torch.randn(4))}
    offsets = {"n": torch.randn(4, 5)}
    template = Template((1, 2), (3, 4), (2,), (3,))
    written = tensors.Gates(gates, {"n": "m"}, template, offsets=offsets)
    tensors.write_gates(tmp_path / GATES, written)
    read = tensors.read_gates(tmp_path, manifest)
    weight, bias = read.own["m"]
    assert (read.follows, read.template) == (written.follows, written.template)
    assert torch.equal(weight, gates["m"][0])
    assert torch.equal(bias, gates["m"][1])
    assert read.offsets.keys() == {"n"}
    assert torch.equal(read.offsets["n"], offsets["n"])
    tensors.write_gates(
        tmp_path / GATES, dataclasses.replace(written, offsets={"m": offsets["n"].T})
    )
    with pytest.raises(
        CheckpointError, match=r"m\.offsets has the shapes \[\(5, 4\)\], .* for \[\(4, 5\)\]"
    ):
        tensors.read_gates(tmp_path, manifest)


def edit(folder, change):
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def first_module(body):
    return next(iter(body["modules"].values()))


def cut(folder):
    path = folder / EXPERTS
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        r"there is no meteora\.json in it",
    ),
    "newer format": (
        lambda folder: edit(folder, lambda body: body.update(format_version=99)),
        "format version 99, this program reads 1",
    ),
    "no JSON": (
        lambda folder: (folder / MANIFEST).write_text("{"),
        "does not describe a fused checkpoint",
    ),
    "a rank too few": (
        lambda folder: edit(folder, lambda body: first_module(body)["ranks"].pop()),
        "has 3 ranks and 4 scalings for 4 experts",
    ),
    "no experts": (
        lambda folder: (folder / EXPERTS).unlink(),
        r"there is no experts\.safetensors in it",
    ),
    "experts cut short": (cut, "is damaged"),
    "experts of other sizes": (
        lambda folder: edit(folder, lambda body: first_module(body)["ranks"].__setitem__(0, 1)),
        "the two files do not belong together",
    ),
    "a module too many": (
        lambda folder: edit(
            folder, lambda body: body["modules"].update({"model.x": first_module(body)})
        ),
        r"model\.x\.lora_A",
    ),
    "a router that needs each token's expert": (
        lambda folder: edit(folder, lambda body: body["router"].update(kind="oracle")),
        r"router\.kind is 'oracle'; it must be one of 'gate', 'prompt', 'arrow', 'norm', 'uniform'",
    ),
    "no gates": (
        lambda folder: edit(folder, lambda body: body["router"].update(kind="gate")),
        r"there is no gates\.safetensors in it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_refused_in_a_sentence(world, folder, damage):
    change, sentence = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=sentence):
        meteora.load(folder, base_folder=world.base)


def test_gates_for_another_number_of_experts_are_refused(world, folder):
    edit(folder, lambda body: body["router"].update(kind="gate"))
    gates = {
        path: (torch.zeros(3, entry.in_features), torch.zeros(3))
        for path, entry in world.manifest.modules.items()
    }
    tensors.write_gates(folder / GATES, tensors.Gates(gates))
    with pytest.raises(
        CheckpointError, match=r"has the shapes \[\(3, (\d+)\), \(3,\)\].* \[\(4, \1\), \(4,\)\]"
    ):
        meteora.load(folder, base_folder=world.base)


def test_a_base_that_was_local_must_be_named_again(world):
    with pytest.raises(MeteoraError, match="say where it lies now"):
        meteora.load(world.checkpoint)
    with pytest.raises(MeteoraError, match="no such folder"):
        meteora.load(world.checkpoint, base_folder=world.base / "absent")
