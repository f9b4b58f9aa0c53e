"""Where every token of a prompt and of its answer was sent, module by module.

The answer is generated as usual, with a cache: no route is forced, and no token is fed twice.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from meteora.artifacts import MeteoraError
from meteora.base.chat_template import encode_prompt
from meteora.model.fused import expert_names
from meteora.routing.hooks import recorded_routes

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers._typing import GenerativePreTrainedModel

LAYER = re.compile(r"\.(\d+)\.")
"""Finds the number of a layer in a module's path, as the ledger's views do."""


class TraceError(MeteoraError):
    """No module of the model is routed."""


@dataclass(frozen=True)
class Trace:
    """M routed modules in the order of the model, T tokens, K experts chosen for each."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """The text of each token; together they are the whole text, special tokens included."""
    num_prompt: int
    """How many of the tokens are the prompt; the others are the answer."""
    experts: tuple[str, ...]
    modules: tuple[str, ...]
    chosen: Tensor
    """[M, T, K] numbers of experts, the strongest first."""
    weights: Tensor
    """[M, T, K], which sum to one over K."""

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layer of each module; None where its path has no number."""
        found = (LAYER.search(path) for path in self.modules)
        return tuple(int(match[1]) if match else None for match in found)

    def shares(self, layer: int | None = None) -> Tensor:
        """How much of each token goes to each expert: the mean weight over modules, [T, E].

        Args:
            layer: over the modules of this layer only
        """
        kept = [m for m, found in enumerate(self.layers) if layer is None or found == layer]
        weights = torch.zeros(len(kept), len(self.pieces), len(self.experts))
        return weights.scatter(2, self.chosen[kept], self.weights[kept]).mean(0)


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 0,
) -> Trace:
    """Answer a prompt greedily, and record which experts each token is sent to.

    Args:
        model: fused
        prompt: text, which is put into the tokenizer's chat template as `generate` does; or token
            ids, which are taken as they are
        max_new_tokens: the answer is cut at this many tokens; 0 traces the prompt alone

    Raises:
        TraceError: no module of the model has a router, as inside `without_experts`.
    """
    if isinstance(prompt, str):
        prompt = encode_prompt(tokenizer, prompt)
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode(), _every_pass(model) as passes:
        if max_new_tokens:
            out: Any = cast("GenerativePreTrainedModel", model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                return_dict_in_generate=True,
            )
            ids = out.sequences
            # generation ended with the last token, so it was never fed
            model(input_ids=ids[:, -1:], past_key_values=out.past_key_values)
        else:
            model(input_ids=ids)
    modules = tuple(passes[0])
    if not modules:
        raise TraceError("no module of the model is routed, so there is nothing to trace")
    return Trace(
        ids=tuple(ids[0].tolist()),
        pieces=_pieces(tokenizer, ids[0].tolist()),
        num_prompt=len(prompt),
        experts=tuple(expert_names(model)),
        modules=modules,
        chosen=_joined(passes, 1).cpu(),
        weights=_joined(passes, 0).float().cpu(),
    )


def _joined(passes: list[dict[str, tuple[Tensor, Tensor]]], part: int) -> Tensor:
    """Weights (0) or experts (1) of all passes end to end, [M, T, K]."""
    return torch.stack([torch.cat([each[path][part] for each in passes]) for path in passes[0]])


@contextmanager
def _every_pass(
    model: PreTrainedModel,
) -> Generator[list[dict[str, tuple[Tensor, Tensor]]]]:
    """Collect the routes of every forward pass, in order."""
    passes: list[dict[str, tuple[Tensor, Tensor]]] = []
    with recorded_routes(model) as routes:
        hook = model.register_forward_hook(lambda *_: passes.append(dict(routes)))
        try:
            yield passes
        finally:
            hook.remove()


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, ...]:
    """The text that each token adds; a character of several tokens belongs to its last one."""
    pieces: list[str] = []
    begun, shown = 0, 0  # tokens before `shown` are written out; those from `begun` are context
    for end in range(1, len(ids) + 1):
        before = str(tokenizer.decode(ids[begun:shown]))
        text = str(tokenizer.decode(ids[begun:end]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        begun, shown = shown, end
    return tuple(pieces)
