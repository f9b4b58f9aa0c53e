"""Stacking copies: the slice of an expert holds exactly the numbers of its file."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora import adapters, checkpoint, fuse
from meteora.fuse import BadNumbersError

PREFIX = "base_model.model."


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def slices(file, manifest, e):
    """The A and B of expert e in the stack, by module path."""
    stack = load_file(file)
    for path, entry in manifest.modules.items():
        start, r = sum(entry.ranks[:e]), entry.ranks[e]
        if r:
            yield (
                path,
                stack[f"{path}.lora_A"][start : start + r],
                stack[f"{path}.lora_B"][:, start : start + r],
            )


def test_the_slice_of_each_expert_holds_exactly_the_numbers_of_its_file(world):
    for e, folder in enumerate(world.adapters.values()):
        published = load_file(folder / "adapter_model.safetensors")
        seen = 0
        for path, a, b in slices(world.checkpoint / checkpoint.EXPERTS, world.manifest, e):
            assert sha256(a) == sha256(published[f"{PREFIX}{path}.lora_A.weight"])
            assert sha256(b) == sha256(published[f"{PREFIX}{path}.lora_B.weight"])
            seen += 2
        assert seen == len(published)


def test_mixed_dtypes_are_widened_exactly(world, build_adapter, fuse_adapters, tmp_path):
    folders = {
        name: build_adapter(
            world.base, tmp_path / name, seed=7, dtype=dtype, r=2, target_modules=["q_proj"]
        )
        for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16))
    }
    manifest = fuse_adapters(world.base, folders, tmp_path / "fused")
    for e, folder in enumerate(folders.values()):
        published = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in published.values()} <= {torch.float16, torch.bfloat16}
        for path, a, b in slices(tmp_path / "fused" / checkpoint.EXPERTS, manifest, e):
            assert a.dtype == torch.float32
            assert torch.equal(a, published[f"{PREFIX}{path}.lora_A.weight"].float())
            assert torch.equal(b, published[f"{PREFIX}{path}.lora_B.weight"].float())


def test_adapters_of_one_narrow_dtype_stay_narrow(world, build_adapter, fuse_adapters, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    folder = build_adapter(world.base, tmp_path / "a", seed=7, dtype=torch.bfloat16, **lora)
    fuse_adapters(world.base, {"a": folder}, tmp_path)
    stack = load_file(tmp_path / checkpoint.EXPERTS)
    assert {tensor.dtype for tensor in stack.values()} == {torch.bfloat16}


def test_infinities_that_appear_after_the_check_are_refused(world, tmp_path):
    adapter = adapters.read(world.adapters["q_and_v"])
    poisoned = load_file(adapter.weights)
    key = next(iter(poisoned))
    poisoned[key][0, 0] = torch.inf
    save_file(poisoned, tmp_path / "poisoned.safetensors")
    bad = adapters.Adapter(adapter.spec, tmp_path / "poisoned.safetensors", adapter.tensors)
    with pytest.raises(BadNumbersError, match="NaN or infinity"):
        fuse.stack([bad], tmp_path / "out")


def test_progress_is_told_module_by_module(world, tmp_path):
    told = []
    adapter = adapters.read(world.adapters["q_and_v"])
    fuse.stack([adapter], tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == [(done, 4) for done in range(1, 5)]
