"""A base in 8 or 4 bit: experts in full precision on it are what PEFT makes of them there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import meteora
from meteora.base.shapes import linear_sizes, weight_norms
from meteora.base.sources import SourceError
from meteora.fitting.calibrate import calibrate
from meteora.routing.layer import routed_layers
from tests.conftest import ATTENTION, MLP, peft_is_behind
from tests.meteora.model.test_architectures import sequences

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")

CONFIGS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**CONFIGS[request.param])


@pytest.fixture
def base(build_base: Callable[[str], Path]) -> Path:
    return build_base("llama_64")  # bitsandbytes packs 64 numbers in 4 bit at a time


@pytest.fixture
def adapters(base: Path, build_adapter: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    asked = {"all_seven": [*ATTENTION, *MLP], "q_and_v": ["q_proj", "v_proj"]}
    return {
        name: build_adapter(base, tmp_path / name, seed=seed, r=4, target_modules=targets)
        for seed, (name, targets) in enumerate(asked.items())
    }


def quantised(base: Path, config: BitsAndBytesConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config
    ).eval()


@torch.no_grad()
def test_a_forced_expert_is_peft_on_the_same_quantised_base(
    base: Path,
    adapters: dict[str, Path],
    config: BitsAndBytesConfig,
    fuse_adapters: Callable[..., Any],
    tmp_path: Path,
) -> None:
    fuse_adapters(base, adapters, tmp_path / "fused")
    model, _ = meteora.load(
        tmp_path / "fused", base_folder=base, dtype=torch.float32, quantization_config=config
    )
    assert {layer.weight.dtype for layer in routed_layers(model).values()} <= {
        torch.int8,
        torch.uint8,
    }
    ids = torch.randint(3, 250, (2, 11))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    assert (quantised(base, config)(ids).logits - plain).abs().max() > 1e-2
    for name, folder in adapters.items():
        with peft_is_behind():
            expected = PeftModel.from_pretrained(quantised(base, config), folder).eval()(ids).logits
        with meteora.force_expert(model, name):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (calibrate(model, sequences(8)).heldout_accuracy or 0) > 0.9


@torch.no_grad()
def test_a_base_that_was_saved_quantised_is_the_same_base(
    base: Path,
    adapters: dict[str, Path],
    config: BitsAndBytesConfig,
    fuse_adapters: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """As mirrors on the Hub are: its sizes and fingerprint are those of what it was made from."""
    fuse_adapters(base, adapters, tmp_path / "fused")
    made = quantised(base, config)
    made.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((base / name).read_bytes())
    sizes = linear_sizes(tmp_path / "packed")
    assert sizes == linear_sizes(base)
    assert "model.layers.0.self_attn.q_proj" not in weight_norms(tmp_path / "packed", sizes)
    model, _ = meteora.load(tmp_path / "fused", base_folder=tmp_path / "packed")
    ids = torch.randint(3, 250, (2, 11))
    with meteora.force_expert(model, "q_and_v"), peft_is_behind():
        expected = PeftModel.from_pretrained(made, adapters["q_and_v"]).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_gguf_file_is_not_quantised_again(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("meteora.checkpoint.resolve.base_files", lambda *_: file)
    with pytest.raises(SourceError, match="takes no quantization_config"):
        meteora.load(world.checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
