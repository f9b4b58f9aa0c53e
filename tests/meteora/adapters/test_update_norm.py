"""Experts that change nothing, and experts whose update is too large, are reported."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import meteora
from meteora.adapters import reader
from meteora.adapters.update_norm import LIMIT, check_proportion, update_norms
from meteora.base.shapes import linear_sizes, weight_norms
from meteora.model.silent_experts import silent_experts


@pytest.fixture
def whisper(world, tmp_path):
    """PEFT's own file, with a B that is tiny and not zero."""
    folder = tmp_path / "whisper"
    folder.mkdir()
    source = world.adapters["q_and_v"]
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    quiet = {name: t * 1e-9 if "lora_B" in name else t for name, t in tensors.items()}
    save_file(quiet, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_changes_nothing_is_named_and_a_healthy_one_is_not(
    world, whisper, fuse_adapters, tokenizer, tmp_path, dtype
):
    assert "no_op" not in {reason.code for reason in reader.check(whisper).reasons}
    loud = {"loud": world.adapters["all_seven"], "whisper": whisper}
    fuse_adapters(world.base, loud, tmp_path / "fused")
    model, _ = meteora.load(tmp_path / "fused", base_folder=world.base, dtype=dtype)
    assert silent_experts(model, tokenizer, [*loud]).keys() == {"whisper"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "bloom"])
def test_the_norm_of_every_weight_is_read_from_the_files(build_base, kind):
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    sizes = linear_sizes(build_base(kind))
    norms = weight_norms(build_base(kind), sizes)
    weights = AutoModelForCausalLM.from_pretrained(build_base(kind), dtype="float32").state_dict()
    for path in sizes.keys() - {"lm_head"}:  # which may be the embedding under another name
        norm = weights[f"{path}.weight"].norm().item()
        assert norms[path] == pytest.approx(norm, rel=1e-5)


def test_an_update_has_the_norm_of_what_peft_would_merge(world):
    for name in ("attention", "patterns"):
        merged = world.load_peft(name).merge_and_unload().state_dict()
        before = world.load_base().state_dict()
        for path, norm in update_norms(reader.read(world.adapters[name])).items():
            added = (merged[f"{path}.weight"] - before[f"{path}.weight"]).norm().item()
            assert norm == pytest.approx(added, rel=1e-4)


def test_an_update_out_of_all_proportion_is_pointed_out_with_its_numbers(
    world, build_adapter, tmp_path
):
    sizes = linear_sizes(world.base)
    norms = weight_norms(world.base, sizes)
    targets = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    mild = reader.read(
        build_adapter(world.base, tmp_path / "mild", seed=1, lora_alpha=1, **targets)
    )
    (ratio, *_) = sorted(
        (norm / norms[path] for path, norm in update_norms(mild).items()), reverse=True
    )
    assert ratio < LIMIT
    assert check_proportion(mild, norms) == ()
    wild = reader.read(
        build_adapter(world.base, tmp_path / "wild", seed=1, lora_alpha=1_000, **targets)
    )
    (reason,) = check_proportion(wild, norms)
    assert reason.code == "large_update"
    assert f"{1000 * ratio:.3g} times the norm" in reason.message
    assert "in 4 of 4 modules" in reason.message
    assert check_proportion(wild, {}) == ()
