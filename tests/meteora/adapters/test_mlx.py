"""MLX-LM's adapters: a forced expert is what MLX-LM computes, y = x W + scale · (x A) B."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

import meteora
from meteora.adapters import reader
from meteora.checkpoint.export import export_expert
from tests.conftest import load_peft
from tests.meteora.adapters.adapter_maker import Q0, safetensors, with_header, write_mlx

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from torch import Tensor, nn

    Factors = dict[str, tuple[Tensor, Tensor]]

NEW = {"fine_tune_type": "lora", "num_layers": 1}
OLD = {"lora_layers": 1, "use_dora": False}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "new": ({"rank": 4, "dropout": 0.0, "scale": 20.0}, NEW, 20.0),
    "of_rank_one": ({"rank": 1, "dropout": 0.0, "scale": 20.0}, NEW, 20.0),
    "with_keys": (
        {"rank": 4, "dropout": 0.0, "scale": 2.5, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
        NEW,
        2.5,
    ),
    "idle_alpha": ({"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}, NEW, 10.0),
    "old": ({"rank": 4, "dropout": 0.0, "scale": 20.0}, OLD, 20.0),
    "old_alpha_of_one": ({"rank": 4, "alpha": 4, "dropout": 0.0, "scale": 10.0}, OLD, 10.0),
}
"""Of each `lora_parameters`, the rest of the config, and the factor that MLX-LM multiplies by."""


def written(
    folder: Path, parameters: dict[str, Any], config: dict[str, Any], dtype: Any
) -> Factors:
    """An adapter of the base's last layer, as `mlx_lm.lora` writes it; returns its factors."""
    r = parameters["rank"]
    sizes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (48, 32)}
    factors = {
        f"model.layers.1.{path}": (
            torch.randn(inputs, r).div(inputs**0.5).to(dtype),
            torch.randn(r, outputs).mul(0.02).to(dtype),
        )
        for path, (inputs, outputs) in sizes.items()
        if path in parameters.get("keys", ("self_attn.q_proj", "self_attn.v_proj"))
    }
    folder.mkdir()
    claims = {"model": "org/base", "lora_parameters": parameters, "adapter_path": "adapters"}
    (folder / "adapter_config.json").write_text(json.dumps(claims | config), encoding="utf-8")
    tensors = {f"{path}.lora_a": a for path, (a, _) in factors.items()}
    tensors |= {f"{path}.lora_b": b for path, (_, b) in factors.items()}
    (folder / "adapters.safetensors").write_bytes(mlx_file(tensors))
    return factors


def mlx_file(tensors: dict[str, Tensor]) -> bytes:
    """What `mx.save_safetensors` writes: no table of metadata, but null."""
    header: dict[str, Any] = {"__metadata__": None}
    data = b""
    for name, tensor in sorted(tensors.items()):
        part = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "data_offsets": [len(data), len(data) + len(part)],
            "dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype],
            "shape": list(tensor.shape),
        }
        data += part
    return with_header(json.dumps(header, separators=(",", ":")).encode(), data)


@contextmanager
def mlx(model: nn.Module, factors: Factors, scale: float) -> Generator[None]:
    """MLX-LM's own formula at the modules that have factors, written down a second time."""

    def add(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        a, b = a.float(), b.float()
        return lambda _, args, y: y + scale * ((args[0] @ a) @ b)

    hooks = [
        model.get_submodule(path).register_forward_hook(add(*pair))
        for path, pair in factors.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_forced_expert_is_what_mlx_lm_computes(
    layout: str, dtype: Any, world: Any, fuse_adapters: Callable[..., Any], tmp_path: Path
) -> None:
    parameters, config, scale = LAYOUTS[layout]
    factors = written(tmp_path / "mlx", parameters, config, dtype)
    both = {"mlx": tmp_path / "mlx", "peft": world.adapters["all_seven"]}
    fuse_adapters(world.base, both, tmp_path / "fused")
    model, _ = meteora.load(tmp_path / "fused", base_folder=world.base)
    base = world.load_base()
    ids = torch.randint(3, 250, (2, 11))
    plain = base(ids).logits
    with mlx(base, factors, scale):
        expected = base(ids).logits
    assert (expected - plain).abs().max() > 1e-2
    with meteora.force_expert(model, "mlx"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with meteora.force_expert(model, "peft"):
        torch.testing.assert_close(
            model(ids).logits, world.load_peft("all_seven")(ids).logits, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_exported_it_is_an_adapter_with_which_peft_says_the_same(
    world: Any, fuse_adapters: Callable[..., Any], tmp_path: Path
) -> None:
    parameters, config, scale = LAYOUTS["with_keys"]
    factors = written(tmp_path / "mlx", parameters, config, torch.float32)
    fuse_adapters(world.base, {"mlx": tmp_path / "mlx"}, tmp_path / "fused")
    assert not export_expert(tmp_path / "fused", "mlx", tmp_path / "peft")
    base = world.load_base()
    ids = torch.randint(3, 250, (2, 11))
    with mlx(base, factors, scale):
        expected = base(ids).logits
    found = load_peft(world.base, tmp_path / "peft")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_facts_are_what_its_config_claims(tmp_path: Path) -> None:
    """MLX-LM trains language models alone, and does not say so."""
    parameters, config, scale = LAYOUTS["with_keys"]
    written(tmp_path / "mlx", parameters, config, torch.float32)
    claimed = {
        "format": "mlx",
        "base_model": "org/base",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "scale": scale,
        "target_modules": tuple(sorted(parameters["keys"])),
    }
    found = reader.check(tmp_path / "mlx").facts
    assert {name: found.get(name) for name in claimed} == claimed


def test_an_alpha_that_some_versions_multiplied_by_is_not_guessed(tmp_path: Path) -> None:
    """What both 0.14.1 and 0.14.2 write by default; the first scaled by 20, the second by 10."""
    parameters = {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    written(tmp_path / "mlx", parameters, OLD, torch.float32)
    refused = {reason.code: reason.message for reason in reader.check(tmp_path / "mlx").reasons}
    assert "scaled by 20 if MLX-LM 0.14.1" in refused["mlx_alpha"]
    assert "by 10 if 0.14.2 to 0.18" in refused["mlx_alpha"]


@pytest.mark.parametrize(
    ("path", "a", "b", "code"),
    [
        ("model.embed_tokens", (99, 4), (4, 8), "modules_to_save"),
        ("model.layers.0.mlp.switch_mlp.up_proj", (3, 4, 8), (3, 6, 4), "not_linear"),
        ("model.layers.0.mlp.switch_mlp.up_proj", (12, 8), (3, 6, 4), "not_linear"),
    ],
    ids=["embedding", "experts", "older_experts"],
)
def test_what_mlx_lm_puts_on_other_layers_is_no_linear_layer(
    path: str, a: tuple[int, ...], b: tuple[int, ...], code: str, tmp_path: Path
) -> None:
    """An embedding's A has a row for each token; fused experts have three axes."""
    folder = write_mlx(tmp_path / "mlx", {"rank": 4, "scale": 20.0})
    more = {
        f"{Q0}.lora_a": ("F32", (8, 4), 0.5), f"{Q0}.lora_b": ("F32", (4, 6), 0.5),
        f"{path}.lora_a": ("F32", a, 0.5), f"{path}.lora_b": ("F32", b, 0.5),
    }  # fmt: skip
    (folder / "adapters.safetensors").write_bytes(safetensors(more))
    assert code in {reason.code for reason in reader.check(folder).reasons}


def test_a_parameter_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """As in a config of PEFT's: it may change what the tensors mean."""
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["q_proj"], "use_dora": False}
    assert reader.check(write_mlx(tmp_path / "idle", parameters)).verdict != "refuse"
    found = reader.check(write_mlx(tmp_path / "active", {**parameters, "use_dora": True}))
    assert [r.message for r in found.reasons if r.code == "unknown_key"] == [
        "use_dora of lora_parameters is set and not known here; a newer version may know it"
    ]


def test_weights_of_mlx_lm_s_first_years_are_called_by_their_name(tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", {"rank": 4, "scale": 20.0})
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")
    (reason, *_) = reader.check(folder).reasons
    assert reason.code == "no_weights"
    assert "adapters.npz" in reason.message
