"""Find experts that change nothing in the output of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from meteora.base.chat_template import encode_prompt
from meteora.model.fused import force_expert, without_experts
from meteora.model.generate import batch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "List three things that you can do, and answer this: what is 12 plus 30?"
LEAST_CHANGE = 1e-5
LEAST_STEPS = 8
"""A change counts if it is more than `LEAST_CHANGE` of the largest logit, and more than
`LEAST_STEPS` steps of the dtype. Six trained adapters on a base of 30 layers change 0.54 to 0.89 of
it, in float32 and in bfloat16. Rounding alone (B scaled to nearly zero) changes 2e-6 and 0.05."""


@torch.inference_mode()
def silent_experts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> dict[str, float]:
    """Those of some experts that, if forced, change nothing on one short prompt beyond rounding.

    Returns:
        For each silent expert, the largest change of any logit as a share of the base's largest
        logit.
    """
    ids = batch_of(model, encode_prompt(tokenizer, PROMPT))
    least = max(LEAST_CHANGE, LEAST_STEPS * torch.finfo(model.dtype).eps)
    with without_experts(model):
        base = model(ids, use_cache=False).logits.float()
    silent = {}
    for name in names:
        with force_expert(model, name):
            logits = model(ids, use_cache=False).logits.float()
        change = ((logits - base).abs().max() / base.abs().max()).item()
        if change <= least:
            silent[name] = change
    return silent
