"""Measure prompts without labels: which are alike, and how large each expert's updates are.

Training moves the rows of a LoRA's A along the inputs that it sees. So the update B A x is larger
for similar inputs than for others. This held for fourteen adapters that began from a random A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.padding import by_length, padded_and_mask, padding_token
from meteora.base.placement import input_device
from meteora.model.fused import make_router, without_experts
from meteora.model.generate import PROMPTS_PER_BATCH
from meteora.routing.layer import routed_layers
from meteora.routing.prompt_router import LEAST_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.routing.routers import Router


@torch.inference_mode()
def read_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    num_experts: int,
    advance: Callable[[int], None] = lambda _prompts: None,
    *,
    most_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read prompts, given as token ids, with the base alone.

    Args:
        most_tokens: a prompt is read up to this many of its own tokens; None: as a whole

    Returns:
        Two tensors in float32 on the CPU, each a mean over a prompt's own tokens, without those of
        the chat template: the hidden states halfway through the base's layers [N, H], where prompts
        of one task are close; and the sizes of the experts' updates, log(s |B A x| / |x|), [N, E],
        averaged over the modules of an expert.
    """
    template = Template.of(tokenizer)
    start, end = len(template.opening), len(template.closing)
    means: list[Tensor] = [torch.empty(0)] * len(prompts)
    sizes = torch.zeros(len(prompts), num_experts, dtype=torch.float32)
    num_modules = torch.zeros(num_experts, dtype=torch.float32)
    ends = [max(start + 1, len(ids) - end) for ids in prompts]
    if most_tokens is not None:
        ends = [min(last, start + most_tokens) for last in ends]
        prompts = [ids[:last] for ids, last in zip(prompts, ends, strict=True)]
    spans: dict[int, tuple[int, slice]] = {}
    device = input_device(model)

    def measure(
        norm: Router, has: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...], _output: object
    ) -> None:
        x = inputs[0].reshape(len(spans), -1, inputs[0].shape[-1])  # OPT: tokens [B × L, IN]
        updates = norm(x.flatten(0, 1)).float().view(*x.shape[:2], -1)[..., :num_experts]
        ratios = updates / x.float().norm(dim=-1, keepdim=True).clamp_min(LEAST_SIZE)
        logs = ratios.clamp_min(LEAST_SIZE).log().cpu()
        for i, (row, own) in spans.items():
            sizes[i] += torch.where(has, logs[row, own].mean(0), 0.0)

    with ExitStack() as hooks:
        for layer in routed_layers(model).values():
            has = torch.tensor([rank > 0 for rank in layer.stack.ranks[:num_experts]])
            num_modules += has
            norm = make_router(RouterOptions("norm", 1, 1.0), layer)
            hook = partial(measure, norm, has)
            hooks.enter_context(layer.projection.register_forward_hook(hook))
        for chosen in by_length(prompts, PROMPTS_PER_BATCH):
            spans.clear()
            for row, i in enumerate(chosen):
                spans[i] = row, slice(start, ends[i])
            rows = [prompts[i] for i in chosen]
            ids, mask = padded_and_mask(rows, padding_token(tokenizer) or 0)
            with without_experts(model):
                states = model(
                    ids.to(device),
                    attention_mask=mask.to(device),
                    use_cache=False,
                    output_hidden_states=True,
                    logits_to_keep=1,
                ).hidden_states
            halfway = states[len(states) // 2].float()  # [B, L, H]
            if halfway.dim() > 3:  # Gemma 3n has four states of each token, its layers read one
                halfway = halfway[0]
            for i, (row, own) in spans.items():
                means[i] = halfway[row, own].mean(0).cpu()
            advance(len(chosen))
    return torch.stack(means), sizes / num_modules.clamp_min(1)
