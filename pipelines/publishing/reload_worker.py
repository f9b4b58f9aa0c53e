"""The process that loads a checkpoint from here and from the Hub, and compares the logits.

It starts like the process of any user who downloads the checkpoint: without the imports and the
memory of the publishing process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2  # what huggingface_hub speaks HTTP with
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from meteora.artifacts import MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.base.placement import input_device
from meteora.checkpoint.resolve import find_checkpoint
from meteora.model.silent_experts import PROMPT
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.processes.child import connect_to_parent


@torch.inference_mode()
def logits(found: FoundCheckpoint) -> Tensor:
    """The logits of every token of a fixed prompt, on the CPU: [tokens, vocabulary]."""
    model, tokenizer = found.load()
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)]).to(input_device(model))
    return model(ids, use_cache=False).logits[0].cpu()


def compare(
    folder: str,
    repo_id: str,
    revision: str,
    names: list[str],
    cache_dir: str,
    base_folder: str | None,
    download: dict[str, str | bool],
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The folder of the download, and the largest difference of any logit.

    Args:
        folder: of the checkpoint here
        names: of all files of the publication: a load downloads only some of them
        base_folder, download, device, dtype: as in `FoundCheckpoint`, for both checkpoints
    """
    token = os.environ.get("HF_TOKEN") or False  # of the publisher, for this repository
    there = find_checkpoint(repo_id, revision, download={"cache_dir": cache_dir, "token": token})
    for name in names:
        hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, token=token)
    ours = FoundCheckpoint(
        Path(folder),
        None if base_folder is None else Path(base_folder),
        download,
        device,
        dtype,
    )
    here, again = (logits(replace(ours, folder=place)) for place in (ours.folder, there))
    if torch.equal(here, again):
        return {"folder": str(there), "difference": 0.0}
    return {"folder": str(there), "difference": (here - again).abs().max().item()}


def main() -> None:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)  # sums on a GPU in one order
    publisher = connect_to_parent()
    _, request = publisher.receive()
    try:
        kind, value = "answer", compare(**request)
    except MeteoraError as error:
        kind, value = "error", str(error)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        kind, value = "error", f"{type(error).__name__}: {error}"
    publisher.send(kind, value)


if __name__ == "__main__":
    main()
