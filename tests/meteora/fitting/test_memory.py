"""A base that does not fit in memory is fitted one layer at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

LAYERS, HIDDEN, INTERMEDIATE = 6, 256, 8192
LAYER_BYTES = 4 * 3 * HIDDEN * INTERMEDIATE  # 25 MB; attention is a fiftieth of it


@pytest.fixture
def large(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    build_adapter: Callable[..., Path],
    fuse_adapters: Callable[..., Any],
) -> tuple[Path, Path]:
    """A checkpoint, and its base of 150 MB."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    base, fused = tmp_path / "base", tmp_path / "fused"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = {
        str(seed): build_adapter(
            base, tmp_path / str(seed), seed=seed, r=2, target_modules=["q_proj"]
        )
        for seed in (1, 2)
    }
    fuse_adapters(base, adapters, fused)
    return fused, base


def fitted(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.meteora.fitting.memory_child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_one_layer_at_a_time_takes_the_memory_of_one_and_gives_the_same_gates(
    large: tuple[Path, Path],
) -> None:
    whole, by_layer = fitted(*large), fitted(*large, "by-layer")
    assert by_layer["gates"] == whole["gates"]
    assert whole["bytes"] - by_layer["bytes"] > (LAYERS - 2) * LAYER_BYTES
