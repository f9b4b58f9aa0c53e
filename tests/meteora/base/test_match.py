"""Bases are compared by their sizes first, then their tokens, then their class."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from meteora.base.match import UnreadableBaseError, compare_bases


@pytest.fixture
def profile(build_base: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the config and the tokenizer of a tiny base, some of it changed."""

    def copy(kind: str = "llama", **changed: Any) -> Path:
        folder = tmp_path / f"profile-{kind}"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(build_base(kind) / name, folder)
        config = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def compared(folder: Path, ours: Path) -> tuple[str, str]:
    """The code of what is found, and its sentence."""
    found = compare_bases("org/named", folder, ours)
    (reason,) = (*found.refusals, *found.warnings)
    assert "org/named" in reason.message
    return reason.code, reason.message


MLX = {"group_size": 64, "bits": 4}
COPIES: dict[str, dict[str, Any]] = {
    "padded": {"vocab_size": 320},  # rows that pad the embedding
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "mlx": {"quantization": MLX, "quantization_config": MLX},
    "renamed": {"_name_or_path": "/home/me/llama", "torch_dtype": "float16"},
}


@pytest.mark.parametrize("changed", COPIES.values(), ids=COPIES)
def test_a_copy_under_another_name_is_a_warning(
    changed: dict[str, Any], profile: Callable[..., Path], world: Any
) -> None:
    code, message = compared(profile(**changed), world.base)
    assert code == "base_alias"
    assert "taken for a copy" in message


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, not 2 as the base at hand"),
        ({"hidden_size": 64}, "hidden_size 64, not 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, not 2"),
    ],
)
def test_the_first_size_that_differs_is_named(
    changed: dict[str, int], difference: str, profile: Callable[..., Path], world: Any
) -> None:
    code, message = compared(profile(**changed), world.base)
    assert code == "other_base"
    assert difference in message


def test_a_stranger_of_the_same_sizes_is_known_by_its_tokens(
    profile: Callable[..., Path], world: Any
) -> None:
    """As Mistral-7B and Llama-3-8B are: every linear layer of one has the shape of the other's."""
    folder = profile("mistral")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    body = json.loads(text)
    vocab = body["model"]["vocab"]
    moved = {
        token: (at - 3 + 7) % (len(vocab) - 3) + 3 if at > 2 else at for token, at in vocab.items()
    }
    body["model"]["vocab"] = moved
    (folder / "tokenizer.json").write_text(json.dumps(body), encoding="utf-8")
    code, message = compared(folder, world.base)
    assert code == "other_base"
    assert "the token " in message


def test_tokens_that_were_added_are_a_warning(profile: Callable[..., Path], world: Any) -> None:
    folder = profile()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    code, message = compared(folder, world.base)
    assert code == "other_vocabulary"
    assert "261 tokens where the base at hand has 259, 259 of them the same" in message


def test_without_a_tokenizer_the_sizes_count_and_the_architecture(
    profile: Callable[..., Path], world: Any
) -> None:
    for kind, expected in (("llama", "base_alias"), ("mistral", "other_base")):
        folder = profile(kind)
        (folder / "tokenizer.json").unlink()
        found = compare_bases("org/named", folder, world.base)
        assert (*found.refusals, *found.warnings)[0].code == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model_type": "of nobody"}',
        '{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}',
        '{"model_type": "llama", "hidden_size": "large"}',
        '{"model_type": "gpt2", "hidden_size": null}',
        '{"model_type": "gpt2", "vocab_size": [32]}',
        '{"model_type": "vit"}',
        '{"model_type": "llama", "num_hidden_layers": 300000000}',
        '{"model_type": "llama", "num_hidden_layers": 0}',
    ],
)
def test_a_config_that_cannot_be_read_is_one_sentence(
    text: str, world: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(UnreadableBaseError, match="org/named") as error:
        compare_bases("org/named", tmp_path, world.base)
    assert "\n" not in str(error.value)
