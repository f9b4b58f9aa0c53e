"""Adding or dropping an expert leaves the numbers of the others bit for bit as they were."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora.adapters import reader
from meteora.adapters.compatibility import fit_to_base
from meteora.adapters.weights import ChangedAdapterError
from meteora.base.shapes import linear_sizes
from meteora.checkpoint.edit import EditError, add_expert, drop_expert, larger_bytes
from meteora.checkpoint.manifest import EXPERTS, MANIFEST, UnknownExpertError, read_manifest
from meteora.checkpoint.tensors import read_experts
from tests.meteora.checkpoint.checkpoint_maker import gated


def slices(folder, manifest):
    """Each expert's A and B of every module that it targets, by name and path."""
    found = {}
    for path, a, b in read_experts(folder, manifest):
        ranks = list(manifest.modules[path].ranks)
        for name, own_a, own_b in zip(
            manifest.names, a.split(ranks), b.split(ranks, dim=1), strict=True
        ):
            if len(own_a):
                found[name, path] = own_a.clone(), own_b.clone()
    return found


@pytest.fixture
def smaller(world, tmp_path):
    """The world's checkpoint without its third expert."""
    folder = tmp_path / "smaller"
    folder.mkdir()
    manifest = drop_expert(world.checkpoint, "q_and_v", folder / EXPERTS)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def test_dropping_leaves_every_other_expert_as_it_was(world, smaller):
    manifest = read_manifest(smaller)
    assert manifest.names == ["all_seven", "attention", "patterns"]
    before = slices(world.checkpoint, world.manifest)
    after = slices(smaller, manifest)
    assert {key for key in before if key[0] != "q_and_v"} == after.keys()
    for key, pair in after.items():
        assert all(torch.equal(*both) for both in zip(pair, before[key], strict=True))


def test_adding_brings_back_what_was_dropped_at_the_end(world, smaller, tmp_path):
    sizes = linear_sizes(world.base)
    adapter = fit_to_base(reader.read(world.adapters["q_and_v"]), sizes)
    entry = world.manifest.experts[2]
    grown = tmp_path / "grown"
    grown.mkdir()
    manifest = add_expert(smaller, adapter, entry, grown / EXPERTS)
    assert manifest.names == ["all_seven", "attention", "patterns", "q_and_v"]
    before, after = slices(world.checkpoint, world.manifest), slices(grown, manifest)
    assert before.keys() == after.keys()
    for key, pair in after.items():
        assert all(torch.equal(*both) for both in zip(pair, before[key], strict=True))
    place = [world.manifest.names.index(name) for name in manifest.names]
    for path, module in manifest.modules.items():
        old = world.manifest.modules[path]
        assert module.scaling == tuple(old.scaling[e] for e in place)


def test_the_only_expert_stays(world, fuse_adapters, tmp_path):
    fuse_adapters(world.base, {"alone": world.adapters["q_and_v"]}, tmp_path)
    with pytest.raises(EditError, match="'alone' is the only expert"):
        drop_expert(tmp_path, "alone", tmp_path / "out")


def test_modules_that_only_one_expert_targeted_come_and_go_with_it(world, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(world.checkpoint, folder)
    manifest = drop_expert(folder, "all_seven", tmp_path / EXPERTS)
    assert not any("up_proj" in path for path in manifest.modules)
    (folder / MANIFEST).write_text(manifest.to_json())
    (tmp_path / EXPERTS).rename(folder / EXPERTS)
    adapter = fit_to_base(reader.read(world.adapters["all_seven"]), linear_sizes(world.base))
    grown = add_expert(folder, adapter, world.manifest.experts[0], tmp_path / EXPERTS)
    assert list(grown.modules) == list(world.manifest.modules)
    assert grown.modules["model.layers.0.mlp.up_proj"].ranks == (0, 0, 0, 4)


def test_a_module_stays_without_ranks_where_its_gate_decides_for_others(world, tmp_path):
    up = "model.layers.0.mlp.up_proj"
    manifest = drop_expert(world.checkpoint, "all_seven", tmp_path / EXPERTS, keep={up})
    assert manifest.modules[up].ranks == (0, 0, 0)
    assert [path for path in manifest.modules if "up_proj" in path] == [up]


def test_a_changed_stack_has_none_of_the_old_names_and_gates(world, tmp_path):
    folder = tmp_path / "gated"
    ids = {"fused_id": f"fused:{'0' * 64}", "router_id": f"router:{'0' * 64}"}
    before = dataclasses.replace(gated(world, folder), **ids)
    assert before.gates != {} != before.files
    (folder / MANIFEST).write_text(before.to_json())
    left = drop_expert(folder, "q_and_v", tmp_path / EXPERTS)
    assert (left.gates, left.fused_id, left.router_id, left.files) == ({}, "", "", {})


def test_a_newcomer_of_mlx_lm_in_a_wider_dtype_is_added_exactly(world, tmp_path):
    folder, mlx = tmp_path / "narrow", tmp_path / "mlx"
    for made in (folder, mlx):
        made.mkdir()
    narrow = drop_expert(world.checkpoint, "q_and_v", folder / EXPERTS, dtype=torch.bfloat16)
    (folder / MANIFEST).write_text(narrow.to_json())
    peft = reader.read(world.adapters["q_and_v"])
    own = load_file(peft.weights)
    turned = {}
    for path, names in peft.tensors.items():
        turned[f"{path}.lora_a"] = own[names.a_key].T.contiguous()
        turned[f"{path}.lora_b"] = own[names.b_key].T.contiguous()
    save_file(turned, mlx / "adapters.safetensors")
    claims = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2}}
    (mlx / "adapter_config.json").write_text(json.dumps(claims))
    adapter = fit_to_base(reader.read(mlx), linear_sizes(world.base))
    num_bytes = larger_bytes(folder, adapter)
    manifest = add_expert(folder, adapter, world.manifest.experts[2], tmp_path / EXPERTS)
    before, after = slices(world.checkpoint, world.manifest), slices(tmp_path, manifest)
    assert sum(part.nbytes for pair in after.values() for part in pair) == num_bytes
    drop_expert(folder, "patterns", tmp_path / "dropped")
    assert {one.dtype for one in load_file(tmp_path / "dropped").values()} == {torch.bfloat16}
    for (name, path), pair in after.items():
        for one, other in zip(pair, before[name, path], strict=True):
            same = other if name == "q_and_v" else other.bfloat16().float()
            assert torch.equal(one, same)


def test_a_strangers_stack_of_several_dtypes_keeps_its_numbers(world, tmp_path):
    folder = shutil.copytree(world.checkpoint, tmp_path / "several")
    own = load_file(folder / EXPERTS)
    first = sorted(own)[0].rpartition(".")[0]
    own |= {key: tensor.half() for key, tensor in own.items() if key.startswith(first)}
    (folder / EXPERTS).chmod(0o644)
    save_file(own, folder / EXPERTS)
    before = slices(folder, world.manifest)
    manifest = drop_expert(folder, "q_and_v", folder / "smaller.safetensors")
    (folder / "smaller.safetensors").replace(folder / EXPERTS)
    for key, pair in slices(folder, manifest).items():
        for one, other in zip(pair, before[key], strict=True):
            assert torch.equal(one.float(), other.float())


def test_a_newcomer_that_changed_after_it_was_checked_is_refused(world, smaller, tmp_path):
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "adapter")
    adapter = reader.read(folder)
    poisoned = load_file(adapter.weights)
    next(iter(poisoned.values()))[0, 0] = torch.inf
    save_file(poisoned, adapter.weights)
    entry = dataclasses.replace(world.manifest.experts[0], name="new")
    with pytest.raises(ChangedAdapterError, match="changed after it was read"):
        add_expert(smaller, adapter, entry, tmp_path / "out")


def test_what_cannot_be_added_or_dropped_is_refused(world, tmp_path):
    adapter = reader.read(world.adapters["q_and_v"])
    with pytest.raises(EditError, match="an expert 'attention' already"):
        add_expert(world.checkpoint, adapter, world.manifest.experts[1], tmp_path / "out")
    asked = r"no expert 'all_sven' \(did you mean 'all_seven'\?\)"
    with pytest.raises(UnknownExpertError, match=asked):
        drop_expert(world.checkpoint, "all_sven", tmp_path / "out")
    unsafe = dataclasses.replace(world.manifest.experts[1], name="a/b")
    with pytest.raises(EditError, match=r"'a/b' cannot be the name .* give another name"):
        add_expert(world.checkpoint, adapter, unsafe, tmp_path / "out")
    module = dataclasses.replace(adapter.spec.modules[0], in_features=99)
    spec = dataclasses.replace(adapter.spec, modules=(module, *adapter.spec.modules[1:]))
    other = dataclasses.replace(adapter, spec=spec)
    entry = dataclasses.replace(world.manifest.experts[0], name="other")
    with pytest.raises(EditError, match=r"takes 99 inputs .* another base"):
        add_expert(world.checkpoint, other, entry, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read_manifest(world.checkpoint) == world.manifest
