"""Check that a server keeps the outputs of a projection in the order of the base's file.

Bloom's file has the outputs of `query_key_value` head by head, and vLLM puts them in the order
q, k, v when it loads them. Experts change outputs in the file's order, so in vLLM they would change
the wrong ones, without an error.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from meteora.base.shapes import weight_key
from meteora.serving.vllm_version import UnservableError

SAMPLES = 16
"""The number of outputs of a projection that are compared."""


def refuse_another_order(base: Path, path: str, weight: Tensor) -> None:
    """Compare some rows of a projection with the same rows of the base's file.

    A module that has another name in the file, or is joined with others there, is not compared.

    Args:
        base: a folder with safetensors
        path: of the module in transformers
        weight: [OUT, IN], of the server

    Raises:
        UnservableError: they differ.
    """
    shards = _shards(base)
    key = weight_key(path, shards)
    if key is None:
        return
    last = len(weight) - 1  # by integers: a server may compute numbers in 16 bits by default
    places = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    with safe_open(shards[key], framework="pt", backend="pread") as file:
        stored = file.get_slice(key)
        shape = stored.get_shape()
        candidates = []
        if shape == [*weight.shape]:
            candidates.append(torch.cat([stored[i : i + 1] for i in places]))
        if shape == [*weight.T.shape]:  # GPT-2's Conv1D
            candidates.append(torch.cat([stored[:, i : i + 1] for i in places], dim=1).T)
    held = weight[places].cpu()
    if candidates and not any(torch.equal(rows.to(held.dtype), held) for rows in candidates):
        raise UnservableError(
            f"{path}: vLLM keeps its weights in another order than {shards[key].name}, so experts"
            " would change other outputs than their own; drop the experts that target it, or serve"
            " the checkpoint with `meteora chat-server`"
        )


@cache
def _shards(base: Path) -> dict[str, Path]:
    """The file of each tensor."""
    shards = {}
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt", backend="pread") as file:
            shards |= dict.fromkeys(file.keys(), shard)
    return shards
