"""Rank and scaling of each module are those that PEFT itself computes, on nine architectures."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from meteora.adapters import reader
from meteora.adapters.config import UNDERSTOOD, VARIANTS, WITHOUT_EFFECT
from meteora.untrusted.findings import AdapterError

LLAMA = ["q_proj", "v_proj", "down_proj"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|ffn)\.(?:(?:q_proj|up_proj)))"
)
"""As Unsloth writes `target_modules`."""
TARGETS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "phi": ["q_proj", "v_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D; c_proj is two layers of different widths
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc2"],
    "bloom": ["query_key_value", "dense"],
}


def peft_facts(base: Path, out: Path, **lora: Any) -> dict[str, tuple[int, int, int, float]]:
    """Save an adapter; return PEFT's own inputs, outputs, r and scaling of each module."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    model = get_peft_model(model, config)
    model.save_pretrained(str(out))
    return {
        path.removeprefix("base_model.model."): (
            layer.in_features,
            layer.out_features,
            layer.r["default"],
            layer.scaling["default"],
        )
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def facts_of(folder: Path) -> dict[str, tuple[int, int, int, float]]:
    modules = reader.read(folder, modules_to_save="strip").spec.modules
    return {m.path: (m.in_features, m.out_features, m.r, m.scaling) for m in modules}


# PEFT asks transformers for an attribute that it renamed, flips fan_in_fan_out for Conv1D,
# saves the base's own head beside a LoRA on it, and takes a bias of B for a torn matrix.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:.*LoRA tensor.s. have invalid shape",
)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_module_is_what_peft_says(
    kind: str, build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Patterns, a float alpha and rsLoRA in one adapter: the second target has its own rank."""
    first, second, *_ = TARGETS[kind]
    lora = {
        "r": 4,
        "lora_alpha": 12.5,
        "use_rslora": True,
        "target_modules": TARGETS[kind],
        "rank_pattern": {rf".*\.1\..*{second}": 3, second: 2},
        "alpha_pattern": {f"^.*0.*{first}": 7, second: 5},
    }
    expected = peft_facts(build_base(kind), tmp_path / "adapter", **lora)
    assert facts_of(tmp_path / "adapter") == expected
    assert len({r for _, _, r, _ in expected.values()}) == 3


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 5, "lora_alpha": 7},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*\.(q|down)_proj"},
        {"r": 4, "layers_to_transform": [1], "target_modules": LLAMA},
        {"r": 4, "layers_to_transform": 0, "layers_pattern": "layers", "target_modules": LLAMA},
        {"r": 4, "target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        {"r": 4, "target_modules": LLAMA, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"r": 4, "target_modules": [*LLAMA, "lm_head"]},
        {"r": 4, "target_modules": LLAMA, "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*\.[1-9]\.mlp.*"},
        {"r": 4, "target_modules": UNSLOTH},
    ],
    ids=[
        "defaults",
        "all_linear",
        "regex",
        "one_layer",
        "the_first_layer",
        "paths",
        "rslora",
        "head",
        "excluded",
        "excluded_regex",
        "unsloth",
    ],
)
def test_every_way_to_target_is_what_peft_says(
    lora: dict[str, Any], build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = peft_facts(build_base("llama"), tmp_path / "adapter", **lora)
    assert expected
    assert facts_of(tmp_path / "adapter") == expected
    codes = {reason.code for reason in reader.check(tmp_path / "adapter").reasons}
    assert not codes & {"untargeted", "idle_target", "pattern_unchecked"}


def test_every_field_of_pefts_config_is_known() -> None:
    """A field that a new PEFT adds has to be judged before its adapters pass."""
    known = UNDERSTOOD | WITHOUT_EFFECT | set(VARIANTS)
    assert {field.name for field in fields(LoraConfig)} <= known


def test_heads_that_peft_saved_are_stripped_by_policy(
    build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = {"r": 4, "target_modules": LLAMA, "modules_to_save": ["lm_head"]}
    expected = peft_facts(build_base("llama"), tmp_path / "adapter", **lora)
    with pytest.raises(AdapterError, match="modules_to_save"):
        reader.read(tmp_path / "adapter")
    found = reader.read(tmp_path / "adapter", modules_to_save="strip")
    assert found.spec.stripped == ("base_model.model.lm_head.weight",)
    assert {module.path for module in found.spec.modules} == set(expected)


def test_all_modules_whose_paths_end_as_peft_was_asked_are_stripped(
    build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    peft_facts(build_base("llama"), tmp_path, target_modules=LLAMA, modules_to_save=["norm"])
    stripped = reader.read(tmp_path, modules_to_save="strip").spec.stripped
    assert {key.split(".")[-2] for key in stripped} == {
        "norm", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip


def test_the_base_s_own_head_under_a_lora_is_told_from_a_trained_one(
    build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    peft_facts(build_base("llama"), tmp_path, target_modules=["q_proj", "lm_head"])
    (reason,) = (one for one in reader.check(tmp_path).reasons if one.code == "modules_to_save")
    assert reason.message.startswith(
        "it holds the base's own weights under its LoRA: base_model.model.lm_head.base_layer.weight"
    )


@pytest.mark.parametrize(
    ("lora", "code"),
    [
        ({"use_dora": True}, "dora"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_tokens"),
        ({"target_modules": ["embed_tokens"]}, "modules_to_save"),
    ],
    ids=["dora", "lora_bias", "bias", "tokens", "embedding"],
)
def test_variants_that_peft_saved_are_refused_by_their_tensors_too(
    lora: dict[str, Any], code: str, build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """The base is Qwen2's, whose attention has biases; the config is made to claim plain LoRA."""
    peft_facts(build_base("qwen2"), tmp_path, **{"r": 4, "target_modules": LLAMA} | lora)
    config = tmp_path / "adapter_config.json"
    assert code in codes(tmp_path)
    plain = json.loads(config.read_text(encoding="utf-8")) | dict.fromkeys(lora) | {"bias": "none"}
    config.write_text(json.dumps(plain), encoding="utf-8")
    assert code in codes(tmp_path)


def codes(folder: Path) -> set[str]:
    return {reason.code for reason in reader.check(folder).reasons}
