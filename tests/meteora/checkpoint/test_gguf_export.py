"""Experts in GGUF are read back by gguf's own reader as what PEFT has."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from peft.tuners.lora import Linear as LoraLayer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from meteora.checkpoint import tensors as checkpoint_tensors
from meteora.checkpoint.edit import drop_expert
from meteora.checkpoint.export import ExportError, export_expert
from meteora.checkpoint.gguf_export import export_gguf
from meteora.checkpoint.manifest import EXPERTS, MANIFEST, CheckpointError, UnknownExpertError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from tests.conftest import World

HEADS = {"q_proj": 4, "k_proj": 2}
PATH = "model.layers.0.self_attn.q_proj"


def in_order_of_transformers(rows: np.ndarray, path: str) -> np.ndarray:
    """What transformers makes of rows in a GGUF file of a Llama."""
    heads = HEADS.get(path.rpartition(".")[2])
    if heads is None:
        return rows
    processor = LlamaTensorProcessor(config={})
    return processor._reverse_permute_weights(rows, heads, heads)


@pytest.mark.parametrize("name", ["all_seven", "attention", "patterns"])
def test_the_update_of_every_module_is_that_of_peft(
    world: World, tmp_path: Path, name: str
) -> None:
    """Ranks 2 to 5, rsLoRA, one module with another alpha, one layer only."""
    (file,) = export_gguf(world.checkpoint, tmp_path / "out", name)
    reader = gguf.GGUFReader(file)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert facts["general.type"] == "adapter"
    assert facts["general.architecture"] == "llama"
    assert facts["adapter.type"] == "lora"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = 0
    for name_in_peft, layer in world.load_peft(name).named_modules():
        path = name_in_peft.removeprefix("base_model.model.")
        if isinstance(layer, LoraLayer):
            a, b = (tensors.pop(f"{known.get_name(path)}.weight.lora_{kind}") for kind in "ab")
            scaling = facts["adapter.lora.alpha"] / len(a)
            update = in_order_of_transformers(b, path) @ a * scaling
            expected = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(torch.from_numpy(update), expected)
            found += 1
    assert found > 1
    assert not tensors


def test_of_a_stack_only_the_expert_s_own_numbers_are_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the time to export all experts grows with the square of their number."""
    with checkpoint_tensors.open_experts(world.checkpoint, world.manifest) as stack:
        for e in range(len(world.manifest.names)):
            for path, *own in stack.of_expert(e):
                ranks = [*world.manifest.modules[path].ranks]
                a, b = stack.factors(path)
                whole = (a.split(ranks)[e], b.split(ranks, dim=1)[e])
                torch.testing.assert_close(tuple(own), whole, rtol=0, atol=0)
    monkeypatch.delattr(checkpoint_tensors.ExpertsFile, "factors")
    assert len(export_gguf(world.checkpoint, tmp_path / "out")) == len(world.manifest.names)
    assert export_expert(world.checkpoint, "attention", tmp_path / "peft")


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "F32")])
def test_numbers_of_16_bits_are_written_exactly(
    world: World, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    manifest = drop_expert(world.checkpoint, "q_and_v", tmp_path / EXPERTS, dtype=dtype)
    licensed = [dataclasses.replace(one, licence="mit") for one in manifest.experts]
    manifest = dataclasses.replace(manifest, experts=tuple(licensed))
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    reader = gguf.GGUFReader(export_gguf(tmp_path, tmp_path / "out", "all_seven")[0])
    assert reader.fields["general.license"].contents() == "mit"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {kind}
    (v,) = (one.data for one in reader.tensors if one.name == "blk.0.attn_v.weight.lora_b")
    with checkpoint_tensors.open_experts(tmp_path, manifest) as stack:
        own = {path: b for path, _, b in stack.of_expert(0)}["model.layers.0.self_attn.v_proj"]
        assert (v == own.float().numpy()).all()


@pytest.mark.parametrize(
    ("architecture", "in_pairs"),
    [("GraniteForCausalLM", True), ("SmolLM3ForCausalLM", True), ("Qwen2ForCausalLM", False)],
)
def test_the_rows_of_other_bases_lie_as_llama_cpp_has_them(
    world: World, tmp_path: Path, architecture: str, in_pairs: bool
) -> None:
    base = world.manifest.base
    other = dataclasses.replace(base.fingerprint, architecture=architecture)
    manifest = dataclasses.replace(
        world.manifest, base=dataclasses.replace(base, fingerprint=other)
    )
    (tmp_path / EXPERTS).symlink_to(world.checkpoint / EXPERTS)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    tensors = [
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for file in (
            *export_gguf(world.checkpoint, tmp_path / "llama", "all_seven"),
            *export_gguf(tmp_path, tmp_path / "other", "all_seven"),
        )
    ]
    llama, found = (one["blk.0.attn_q.weight.lora_b"] for one in tensors)
    assert (llama == found).all() == in_pairs


def test_all_experts_have_a_file_each_and_the_stack_is_checked_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = checkpoint_tensors.open_sound

    def count(folder: Path, name: str, *further: Any, **named: Any) -> Any:
        checked.append(name)
        return check(folder, name, *further, **named)

    monkeypatch.setattr(checkpoint_tensors, "open_sound", count)
    files = export_gguf(world.checkpoint, tmp_path / "out")
    assert [file.name for file in files] == [f"{name}.gguf" for name in world.manifest.names]
    assert checked == [EXPERTS]


def test_what_llama_cpp_does_not_know_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UnknownExpertError, match=r"there is no expert 'no_such'.* has all_seven"):
        export_gguf(world.checkpoint, tmp_path / "out", "no_such")
    base = world.manifest.base
    (tmp_path / EXPERTS).symlink_to(world.checkpoint / EXPERTS)
    for change, said in (
        ({"architecture": "BloomForCausalLM"}, "its base is a BloomForCausalLM"),
        ({"num_attention_heads": 0}, "q_proj has 32 outputs, which are not those of 0 heads"),
        ({"num_key_value_heads": 24}, "k_proj has 16 outputs, which are not those of 24 heads"),
    ):
        other = dataclasses.replace(base.fingerprint, **change)
        manifest = dataclasses.replace(
            world.manifest, base=dataclasses.replace(base, fingerprint=other)
        )
        (tmp_path / MANIFEST).write_text(manifest.to_json())
        with pytest.raises(ExportError, match=said):
            export_gguf(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_module_that_no_expert_changes_any_more_needs_no_name(
    world: World, tmp_path: Path
) -> None:
    """It stays for its gate or its offsets when its experts are dropped."""
    kept = dataclasses.replace(world.manifest.modules[PATH], ranks=(0, 0, 0, 0))
    modules = world.manifest.modules | {"model.layers.0.other": kept}
    (tmp_path / MANIFEST).write_text(dataclasses.replace(world.manifest, modules=modules).to_json())
    (tmp_path / EXPERTS).symlink_to(world.checkpoint / EXPERTS)
    assert export_gguf(tmp_path, tmp_path / "out", "attention")


def test_an_expert_on_a_head_that_is_the_embeddings_is_refused(
    world: World, tmp_path: Path
) -> None:
    """llama.cpp has no tensor of that name then, and loads none of the expert."""
    (tmp_path / EXPERTS).symlink_to(world.checkpoint / EXPERTS)
    on_head = dataclasses.replace(world.manifest.modules[PATH], ranks=(4, 0, 0, 0))
    modules = world.manifest.modules | {"lm_head": on_head}
    (tmp_path / MANIFEST).write_text(dataclasses.replace(world.manifest, modules=modules).to_json())
    config = json.loads((world.base / "config.json").read_text()) | {"tie_word_embeddings": True}
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="an expert is on lm_head, whose weights are the embedd"):
        export_gguf(tmp_path, tmp_path / "out", base=tied)
    assert export_gguf(tmp_path, tmp_path / "out", "attention", base=tied)
    with pytest.raises(CheckpointError, match="lm_head"):  # no tensors are there, and it went on
        export_gguf(tmp_path, tmp_path / "all", base=world.base)
