"""A base that is not whole is refused: nothing is drawn at random in its place."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

from meteora.base.loading import fingerprint_of, load_folder, sizes_of
from meteora.base.sources import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


@pytest.fixture
def base(build_base: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny base that may be damaged."""
    return shutil.copytree(build_base("llama"), tmp_path / "base")


@pytest.mark.parametrize("part", ["lm_head.", "model.layers.1.mlp."])
def test_a_base_that_lacks_weights_is_refused(part: str, base: Path) -> None:
    weights = load_file(base / WEIGHTS)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(part)}
    assert len(kept) < len(weights)
    save_file(kept, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(SourceError, match=rf"not in its files, such as {part}"):
        load_folder(base)


def test_a_base_without_a_head_of_its_own_lacks_nothing(base: Path) -> None:
    weights = load_file(base / WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, base / WEIGHTS, {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    model, _ = load_folder(base)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (WEIGHTS, None, "the model cannot be loaded"),
        (WEIGHTS, slice(0, 5000), "the model cannot be loaded"),
        (TOKENIZER, None, "the tokenizer cannot be loaded"),
        (TOKENIZER, slice(0, 1), "the tokenizer cannot be loaded"),
    ],
)
def test_a_damaged_file_of_a_base_is_refused_in_one_sentence(
    file: str, content: slice | None, says: str, base: Path
) -> None:
    whole = (base / file).read_bytes()
    (base / file).unlink()
    if content is not None:
        (base / file).write_bytes(whole[content])
    with pytest.raises(SourceError, match=rf"{base.name}: {says} .*download or save the base"):
        load_folder(base)


def test_weights_of_other_sizes_than_the_config_says_are_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    with pytest.raises(SourceError, match="the model cannot be loaded"):
        load_folder(base)


@pytest.mark.parametrize("named", [5, {"a": 1}, [], [3], None])
def test_a_config_without_a_name_of_its_architecture_has_that_of_its_kind(
    named: object, base: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert fingerprint_of(base).architecture == "LlamaConfig"


def test_a_router_that_returns_its_choices_too_is_no_linear_layer() -> None:
    config = Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    router = Llama4Router(config)
    assert isinstance(router, nn.Linear)
    assert isinstance(router(torch.ones(1, 8)), tuple)
    assert sizes_of(router) is None
