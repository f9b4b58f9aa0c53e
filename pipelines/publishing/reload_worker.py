"""Load a checkpoint from here and from the Hub, and tell whether the two give the same logits.

In a process of its own, as whoever downloads it will do: nothing that this one imported or keeps in
memory helps it. A line of JSON comes on standard input, the answer goes to standard output. The
process ends when its input closes, so it never outlives the one that asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch

from meteora.artifacts import MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.resolve import find_checkpoint
from meteora.model.fused import load
from meteora.model.silent_experts import PROMPT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@torch.inference_mode()
def logits(folder: str | Path, base_folder: str | None) -> Tensor:
    """Of every token of the probe: [tokens, vocabulary]."""
    model, tokenizer = load(folder, base_folder=base_folder, device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    return model(ids, use_cache=False).logits[0]


def compare(
    folder: str, repo_id: str, revision: str, cache_dir: str, base_folder: str | None
) -> dict[str, Any]:
    """Where it was downloaded to, and the largest difference of any logit."""
    there = find_checkpoint(repo_id, revision, download={"cache_dir": cache_dir})
    here, again = logits(folder, base_folder), logits(there, base_folder)
    if torch.equal(here, again):
        return {"folder": str(there), "difference": 0.0}
    return {"folder": str(there), "difference": (here - again).abs().max().item()}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = compare(**request)
    except MeteoraError as error:
        answer = {"error": str(error)}
    except (OSError, ValueError, RuntimeError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))  # noqa: T201  (the answer)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # unbuffered: no lock is held when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
