"""What prompts without labels show: how sure an expert is of its answers, and which are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from meteora.base.chat_template import Template
from meteora.base.placement import input_device
from meteora.model.fused import without_experts
from meteora.model.generate import (
    PROMPTS_PER_BATCH,
    end_tokens,
    generate_in_batches,
    padding_token,
    until_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _prompts: None,
) -> list[float]:
    """How sure the model is of its own greedy answer to each prompt, given as token ids.

    Returns:
        For each prompt how far the best logit is above the second best, in nats, as the mean over
        the answer's first `max_new_tokens` tokens, its end included.
    """
    margins, ends = [0.0] * len(prompts), end_tokens(model, tokenizer)
    batches = generate_in_batches(model, tokenizer, prompts, max_new_tokens, logits=True)
    for chosen, width, out in batches:
        best = torch.stack(out.logits or (), dim=1).float().topk(2, dim=-1).values  # [B, T, 2]
        gaps = best[..., 0] - best[..., 1]
        for row, i in enumerate(chosen):
            length = len(until_end(ends, out.sequences[row, width:].tolist()))
            margins[i] = gaps[row, :length].mean().item()
        advance(len(chosen))
    return margins


@torch.inference_mode()
def prompt_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda _prompts: None,
) -> Tensor:
    """Where prompts lie in the base's hidden states: [N, H], float32, on the CPU.

    Each is the mean over a prompt's own tokens, without those of the chat template, halfway through
    the base's layers. Prompts of one task lie together there.
    """
    template = Template.of(tokenizer)
    start, end = len(template.opening), len(template.closing)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    means: list[Tensor] = [torch.empty(0)] * len(prompts)
    for first in range(0, len(prompts), PROMPTS_PER_BATCH):
        chosen = by_length[first : first + PROMPTS_PER_BATCH]
        width = len(prompts[chosen[-1]])
        ids = torch.full((len(chosen), width), padding_token(tokenizer) or 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            mask[row, : len(prompts[i])] = 1
        with without_experts(model):
            states = model(
                ids.to(input_device(model)),
                attention_mask=mask.to(input_device(model)),
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=1,
            ).hidden_states
        halfway = states[len(states) // 2].float()  # [B, L, H]
        if halfway.dim() > 3:  # Gemma 3n has four states of each token, its layers read the first
            halfway = halfway[0]
        for row, i in enumerate(chosen):
            own = slice(start, max(start + 1, len(prompts[i]) - end))
            means[i] = halfway[row, own].mean(0).cpu()
        advance(len(chosen))
    return torch.stack(means)
