"""Text from a fused model."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from transformers import TextStreamer

from meteora.encode import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers._typing import GenerativePreTrainedModel


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    stream: bool = False,
) -> str:
    """The greedy answer to one prompt, in the chat template where the tokenizer has one.

    Args:
        stream: print the text on stdout as it comes
    """
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        out = cast("GenerativePreTrainedModel", model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=streamer if stream else None,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
