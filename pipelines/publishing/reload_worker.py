"""The process that loads a checkpoint from here and from the Hub, and compares the logits.

It starts as the process of a user does who downloads the checkpoint: without anything that the
publishing process has imported or keeps in memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from meteora.artifacts import MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.resolve import find_checkpoint
from meteora.model.fused import load
from meteora.model.silent_experts import PROMPT
from pipelines.workspace.processes import parent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@torch.inference_mode()
def logits(
    folder: str | Path, base_folder: str | None, download: Mapping[str, Any] | None = None
) -> Tensor:
    """The logits of every token of a fixed prompt: [tokens, vocabulary]."""
    model, tokenizer = load(folder, base_folder=base_folder, device="cpu", download=download)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    return model(ids, use_cache=False).logits[0]


def compare(
    folder: str,
    repo_id: str,
    revision: str,
    cache_dir: str,
    base_folder: str | None,
    download: Mapping[str, str | bool],
) -> dict[str, Any]:
    """The folder of the download, and the largest difference of any logit.

    Args:
        download: How a base on the Hub is downloaded.
    """
    token = os.environ.get("HF_TOKEN") or False  # of the publisher, for this repository
    there = find_checkpoint(repo_id, revision, download={"cache_dir": cache_dir, "token": token})
    here, again = (logits(place, base_folder, download) for place in (folder, there))
    if torch.equal(here, again):
        return {"folder": str(there), "difference": 0.0}
    return {"folder": str(there), "difference": (here - again).abs().max().item()}


def main() -> None:
    publisher = parent()
    _, request = publisher.receive()
    try:
        kind, value = "answer", compare(**request)
    except MeteoraError as error:
        kind, value = "error", str(error)
    except (OSError, ValueError, RuntimeError) as error:
        kind, value = "error", f"{type(error).__name__}: {error}"
    publisher.send(kind, value)


if __name__ == "__main__":
    main()
