"""One adapter or several for each prompt, each with its share of the update.

    y = W x + sum over the prompt's adapters  share_e · scaling_e · B_e A_e x

It adds outputs. As the shares of a prompt are fixed, to add the matrices share_e · scaling_e ·
B_e A_e is the same arithmetic. To average A and B each by itself, as LoraRetriever's fusion does,
is not; it needs adapters of one rank on the same modules, and in that paper it is behind the mean
of outputs. An adapter that does not change a module adds nothing there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from meteora.artifacts import RouterOptions
from meteora.base.padding import by_length, padded_and_mask, padding_token
from meteora.model.generate import PROMPTS_PER_BATCH, generate_ids
from meteora.routing.layer import routed_by
from meteora.routing.routers import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Shares(Router):
    """Gives all tokens of a prompt the prompt's shares."""

    def __init__(self, shares: Tensor) -> None:
        """Take shares [B, E] of the prompts of a batch, which sum to one."""
        most = int((shares > 0).sum(-1).max())
        super().__init__(shares.shape[-1], RouterOptions("fixed", most, 1.0))
        self.logits = shares.log()  # their softmax is the shares

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [T, E] of the tokens [T, IN] of B prompts that are padded to one length."""
        return self.logits.repeat_interleave(len(tokens) // len(self.logits), 0)


def shares_of(scores: Tensor, k: int, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """The shares [N, E] of the k adapters of N prompts that have the best of scores [N, E].

    Args:
        weigh: turns the best scores [N, k] into shares
    """
    best, adapters = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, adapters, weigh(best))


def equal(scores: Tensor) -> Tensor:
    """As LoraRetriever's mixture."""
    return torch.full_like(scores, 1 / scores.shape[-1])


def softmax(scores: Tensor, temperature: float) -> Tensor:
    """As LoRAuter."""
    return (scores / temperature).softmax(-1)


def in_proportion(scores: Tensor) -> Tensor:
    """As LoGo."""
    return scores / scores.sum(-1, keepdim=True)


@torch.inference_mode()
def answer_all_mixed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    shares: Tensor,
) -> list[list[int]]:
    """Answer N prompts greedily, given as token ids, each by its adapters' shares [N, E]."""
    answers: list[list[int]] = [[] for _ in prompts]
    for chosen in by_length(prompts, PROMPTS_PER_BATCH):
        pad = padding_token(tokenizer) or 0
        ids, mask = padded_and_mask([prompts[i] for i in chosen], pad, "left")
        with routed_by(model, lambda _layer, own=shares[chosen]: Shares(own)):
            out = generate_ids(model, tokenizer, ids, max_new_tokens, attention_mask=mask)
        for row, i in enumerate(chosen):
            answers[i] = out[row, ids.shape[1] :].tolist()
    return answers
