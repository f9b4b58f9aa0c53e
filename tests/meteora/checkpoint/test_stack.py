"""Stacking copies: the slice of an expert holds exactly the numbers of its file."""

import hashlib
import os
import resource
import shutil
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from meteora.adapters import reader
from meteora.adapters.compatibility import fit_to_base
from meteora.adapters.tensors import AdapterTensors
from meteora.adapters.weights import AdapterWeights, ChangedAdapterError
from meteora.artifacts import file_sha256
from meteora.base.shapes import linear_sizes
from meteora.checkpoint import interleave
from meteora.checkpoint.manifest import EXPERTS
from meteora.checkpoint.stack import OpenFilesError, stack_adapters

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
        for path, a, b in slices(world.checkpoint / EXPERTS, world.manifest, e):
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
        for path, a, b in slices(tmp_path / "fused" / EXPERTS, manifest, e):
            assert a.dtype == torch.float32
            assert torch.equal(a, published[f"{PREFIX}{path}.lora_A.weight"].float())
            assert torch.equal(b, published[f"{PREFIX}{path}.lora_B.weight"].float())


def test_adapters_of_one_narrow_dtype_stay_narrow(world, build_adapter, fuse_adapters, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    folder = build_adapter(world.base, tmp_path / "a", seed=7, dtype=torch.bfloat16, **lora)
    fuse_adapters(world.base, {"a": folder}, tmp_path)
    stack = load_file(tmp_path / EXPERTS)
    assert {tensor.dtype for tensor in stack.values()} == {torch.bfloat16}


def test_an_adapter_that_was_saved_inside_a_wrapper_is_stacked_as_without_it(world, tmp_path):
    """As a language model's is when it was trained inside a multimodal one."""
    source, wrapped = world.adapters["patterns"], tmp_path / "wrapped"
    shutil.copytree(source, wrapped)
    tensors = load_file(source / "adapter_model.safetensors")
    inside = {name.replace(".layers.", ".language_model.layers."): t for name, t in tensors.items()}
    assert not inside.keys() & tensors.keys()
    save_file(inside, wrapped / "adapter_model.safetensors")
    moved = fit_to_base(reader.read(wrapped), linear_sizes(world.base))
    assert "moved" in {reason.code for reason in moved.reasons}
    plain = reader.read(source)
    assert moved.spec.modules == plain.spec.modules
    for name, adapter in {"plain": plain, "moved": moved}.items():
        stack_adapters([adapter], tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "moved").read_bytes()


def test_a_file_that_changed_after_it_was_read_is_refused(world, tmp_path):
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "adapter")
    adapter = reader.read(folder)
    poisoned = load_file(adapter.weights)
    next(iter(poisoned.values()))[0, 0] = torch.inf
    save_file(poisoned, adapter.weights)
    with pytest.raises(ChangedAdapterError, match="changed after it was read"):
        stack_adapters([adapter], tmp_path / "out")


def test_a_file_that_was_touched_but_holds_the_same_bytes_is_taken(world, tmp_path):
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "adapter")
    os.utime(folder / "adapter_model.safetensors", (1e9, 1e9))
    adapter = reader.read(folder)
    assert adapter.stamp is not None
    stack_adapters([adapter], tmp_path / "before")
    os.utime(adapter.weights)
    stack_adapters([adapter], tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_a_file_that_was_written_just_now_has_no_stamp(world, tmp_path):
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").touch()
    assert reader.read(folder).stamp is None


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(world, tmp_path):
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "adapter")
    adapter = reader.read(folder)
    last = load_order(adapter.weights)[-1]
    with AdapterWeights(adapter) as weights:
        os.truncate(adapter.weights, adapter.weights.stat().st_size - 1)
        with pytest.raises(ChangedAdapterError):
            weights.tensor(last)


def load_order(file):
    """The keys of a safetensors file as their bytes lie in it."""
    with safe_open(file, framework="pt") as opened:
        return opened.offset_keys()


class Held(AdapterWeights):
    """Tensors in memory that are read like those of a file."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def holds(self, key, dtype):
        return self.tensors[key].dtype == dtype

    def tensor(self, key):
        return self.tensors[key]

    def read(self, key, buffers):
        data = self.tensors[key].contiguous().view(torch.uint8).numpy().tobytes()
        assert sum(map(len, buffers)) == len(data)
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]


@given(
    kinds=st.lists(
        st.tuples(
            st.integers(1, 9) | st.sampled_from([16, 64]),
            st.sampled_from([torch.float32, torch.bfloat16]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    num_in=st.integers(1, 40),
    num_out=st.integers(1, 40),
    wide=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.sampled_from([1, 100, 1000, interleave.BLOCK]),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_the_stack_are_those_of_the_adapters_side_by_side(
    kinds, num_in, num_out, wide, block
):
    if wide == torch.bfloat16:
        kinds = [(r, wide, transposed) for r, _, transposed in kinds]
    a = [torch.randn(r, num_in).to(dtype) for r, dtype, _ in kinds]
    b = [torch.randn(num_out, r).to(dtype) for r, dtype, _ in kinds]
    sources = [
        (
            Held(a=own_a.T if transposed else own_a, b=own_b.T if transposed else own_b),
            AdapterTensors("a", "b", transposed),
        )
        for own_a, own_b, (_, _, transposed) in zip(a, b, kinds, strict=True)
    ]
    ranks = [r for r, _, _ in kinds]
    with mock.patch.object(interleave, "BLOCK", block):
        stack_b = interleave.StackOfB(ranks, num_out, wide)
    stack_b.stage(interleave.staging(stack_b.num_bytes))
    for _ in range(2):  # what is left of one module does not show in the next
        found_a = torch.cat([*interleave.rows_of_a(sources, wide)])
        found_b = torch.cat([rows.clone() for rows in stack_b.rows(sources)])
        assert torch.equal(found_a, torch.cat(a).to(wide))
        assert torch.equal(found_b, torch.cat(b, dim=1).to(wide))


def test_a_disk_that_is_full_at_any_byte_is_an_error_and_the_next_try_is_whole(world, tmp_path):
    """The largest size that a file may have stands for the room on the disk."""
    adapters = [reader.read(folder) for folder in world.adapters.values()]
    whole = tmp_path / "whole"
    stack_adapters(adapters, whole)
    size, before = whole.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 8, *range(1000, size, size // 20), size - 1):
        out = tmp_path / f"out-{room}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                stack_adapters(adapters, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        out.unlink(missing_ok=True)
        stack_adapters(adapters, out)
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()


@pytest.fixture
def few_files():
    """A limit of open files that leaves two."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)  # of the numbers that are free
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_files")
@pytest.mark.skipif(sys.platform != "linux", reason="it counts descriptors as Linux gives them")
@pytest.mark.parametrize("allowed", [True, False])
def test_more_adapters_than_open_files_raise_the_limit_or_say_so(
    world, tmp_path, monkeypatch, allowed
):
    sizes = linear_sizes(world.base)
    adapters = [fit_to_base(reader.read(folder), sizes) for folder in world.adapters.values()]
    if allowed:
        stack_adapters(adapters, tmp_path / EXPERTS)
        assert file_sha256(tmp_path / EXPERTS) == file_sha256(world.checkpoint / EXPERTS)
        return
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(OpenFilesError, match=r"4 adapters are open at once .* `ulimit -n 260`"):
        stack_adapters(adapters, tmp_path / EXPERTS)
    monkeypatch.undo()
