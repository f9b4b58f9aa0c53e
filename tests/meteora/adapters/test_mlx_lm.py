"""MLX-LM itself, on a CPU: a forced expert answers as its adapter does there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import meteora
from tests.meteora.adapters.adapter_maker import write_mlx

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx = pytest.importorskip("mlx.utils")
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
tuner = pytest.importorskip("mlx_lm.tuner.utils")


@torch.no_grad()
def test_an_adapter_that_mlx_lm_made_says_what_it_says_there(
    world: Any, fuse_adapters: Callable[..., Any], tmp_path: Path
) -> None:
    """Not the formula, but the program: it makes the layers, writes the file and reads it."""
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    model, _ = mlx_lm.load_model(world.base)
    model.freeze()
    tuner.linear_to_lora_layers(model, 2, parameters)
    mx.random.seed(0)
    tensors = {
        name: 0.02 * mx.random.normal(tensor.shape) if name.endswith("lora_b") else tensor
        for name, tensor in mlx.tree_flatten(model.trainable_parameters())
    }
    folder = write_mlx(tmp_path / "mlx", parameters)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    ids = torch.randint(3, 250, (2, 11))
    theirs = tuner.load_adapters(mlx_lm.load_model(world.base)[0], str(folder))
    expected = torch.from_numpy(np.array(theirs(mx.array(ids.numpy()))))

    fuse_adapters(world.base, {"mlx": folder}, tmp_path / "fused")
    model, _ = meteora.load(tmp_path / "fused", base_folder=world.base)
    with meteora.force_expert(model, "mlx"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
