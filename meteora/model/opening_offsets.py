"""Offsets: constant vectors that make up for an opening that all experts computed together.

    the expert's own opening     o o o o │ q q q q a a a     every token is routed to the expert
    the opening of all experts   m m m m │ q q q q a a a     the opening to the mean of all

The same expert computes the tokens after the opening in both cases. They differ because attention
reads other keys and values of the opening, above all those of its first token (an attention sink).
The mean of this difference over an expert's tokens is a constant vector for each module: an offset,
which the module adds wherever that expert is chosen. The modules right after attention need one;
with it, the means of later modules are nearly the same in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora.artifacts import SHARED, RouterOptions
from meteora.base.padding import padded, padded_and_mask
from meteora.base.placement import input_device, replaced_forward
from meteora.model.fused import expert_names, without_dropout
from meteora.routing.layer import (
    MoELoRALinear,
    require_a_row_of_each_token,
    routed_by,
    routed_layers,
)
from meteora.routing.routers import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


EXAMPLES = 8
"""Most examples of one expert."""
MAX_TOKENS = 1 << 14
"""Most tokens of one pass, with padding."""
MAX_LENGTH = MAX_TOKENS // (2 * EXAMPLES)
"""Longer examples are cut at this many tokens, so that one pass reads all examples of an expert."""
LEAST_SHARE = 0.1
"""A module gets offsets if the means explain at least this share of the squared differences. So
SmolLM2-135M with the quickstart's six adapters has them at the `o_proj` of 27 layers of 30, with
fourteen adapters at all 30, and nowhere else."""


@dataclass(frozen=True)
class _Example:
    """A sequence of one expert, cut before the tokens of any other choice."""

    ids: tuple[int, ...]
    expert: int
    is_own: tuple[bool, ...]
    """For each token, whether it belongs to the expert, and not to an opening."""


class _Pairs(Router):
    """Routes each example twice: with the expert's own opening, and with that of all experts."""

    def __init__(self, examples: Sequence[_Example], shared: int, num_choices: int) -> None:
        super().__init__(num_choices, RouterOptions("pairs", 1, 1.0))
        rows = padded_and_mask([example.ids for example in examples])
        self.ids, self.mask = (part.repeat(2, 1) for part in rows)
        self.own = padded([example.is_own for example in examples]).bool()
        """[B, L]"""
        experts = torch.tensor([[example.expert] for example in examples]).expand_as(self.own)
        self.labels = experts[self.own]
        """[T] the expert of each of its own tokens"""
        choices = torch.cat([experts, torch.where(self.own, experts, shared)])
        self.choices = choices[self.mask.bool()][:, None]
        """[T, 1] of each token that is no padding"""
        self.offsets_of: dict[str, Tensor] = {}

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        choices = self.choices.to(tokens.device)
        return torch.ones_like(choices, dtype=torch.float32), choices

    def without_padding(
        self, path: str, layer: MoELoRALinear, forward: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """A layer's output for x [..., IN], computed for its tokens alone; zero for padding."""
        is_token = self.mask.flatten().bool().to(x.device)
        require_a_row_of_each_token(path, x, len(is_token))
        with layer.whole():
            rows = forward(x.reshape(len(is_token), -1)[is_token])
        out = rows.new_zeros(len(is_token), rows.shape[-1])
        out[is_token] = rows
        return out.view(*x.shape[:-1], -1)

    def find_and_add(
        self, path: str, least: float, _module: nn.Module, _inputs: object, output: Tensor
    ) -> Tensor:
        """Keep each expert's mean difference as its offset, if it explains enough, and add it.

        It is added to the expert's tokens after an opening of all experts, so that later modules
        see it.
        """
        labels, own = self.labels.to(output.device), self.own.to(output.device)
        pair = output.reshape(2, *own.shape, -1)
        differences = pair[0, own].float() - pair[1, own].float()
        counts = torch.bincount(labels, minlength=self.num_choices)[:, None]
        sums = differences.new_zeros(self.num_choices, differences.shape[-1])
        means = sums.index_add(0, labels, differences) / counts.clamp_min(1)
        explained = (counts * means.square()).sum()
        if explained <= least * differences.square().sum():
            return output
        self.offsets_of[path] = means.cpu()
        corrected = pair.clone()
        corrected[1, own] += means[labels].to(output.dtype)
        return corrected.view(output.shape)


@torch.inference_mode()
def find_offsets(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    modules: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Compute the offsets of each module and expert, from at most `EXAMPLES` of its examples.

    Args:
        model: with its experts inserted; its routers do not change
        sequences: token ids and the choice of each token
        modules: paths of the modules that get offsets; None: see `LEAST_SHARE`

    Returns:
        [C, OUT] in float32 by module path; zero for a choice without examples after an opening.
        Empty if the mean of all experts is no choice.

    Raises:
        MeteoraError: the base's modules see other rows than one for each token.
    """
    if SHARED not in (names := expert_names(model)):
        return {}
    shared = names.index(SHARED)  # after all experts
    layers = routed_layers(model)
    sums: dict[str, Tensor] = {}
    device = input_device(model)
    for examples in _in_passes(_examples_of(sequences, shared)):
        pairs = _Pairs(examples, shared, len(names))
        least = LEAST_SHARE if modules is None else -1.0
        with ExitStack() as hooks, routed_by(model, lambda _layer, pairs=pairs: pairs):
            hooks.enter_context(without_dropout(model))
            for path, layer in layers.items():
                forward = partial(pairs.without_padding, path, layer, layer.forward)
                hooks.enter_context(replaced_forward(layer, forward))
            for path in layers if modules is None else modules:
                hook = partial(pairs.find_and_add, path, least)
                hooks.enter_context(layers[path].register_forward_hook(hook))
            ids, mask = pairs.ids.to(device), pairs.mask.to(device)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        modules = list(pairs.offsets_of)  # all experts get offsets where the first ones do
        for path, offsets in pairs.offsets_of.items():
            sums[path] = sums.get(path, 0.0) + offsets  # each expert is in one pass alone
    with torch.inference_mode(mode=False):  # gates may be trained beside them later
        return {path: offsets.clone() for path, offsets in sums.items()}


def _examples_of(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], shared: int
) -> list[list[_Example]]:
    """The first examples of each expert that begin with an opening."""
    by_expert: dict[int, list[_Example]] = {}
    for ids, choices in sequences:
        experts = [choice for choice in choices if choice >= 0 and choice != shared]
        if not experts or experts[0] > shared or choices[0] == experts[0]:
            continue
        end = next((i for i, c in enumerate(choices) if c in {*experts} - {experts[0]}), len(ids))
        end = min(end, MAX_LENGTH)
        is_own = tuple(choice == experts[0] for choice in choices[:end])
        if any(is_own):
            example = _Example(tuple(ids[:end]), experts[0], is_own)
            by_expert.setdefault(experts[0], []).append(example)
    return [by_expert[expert][:EXAMPLES] for expert in sorted(by_expert)]


def _in_passes(examples: Sequence[list[_Example]]) -> Iterator[list[_Example]]:
    """Group examples into passes; all examples of an expert are in the same pass."""
    together: list[_Example] = []
    for own in examples:
        more = [*together, *own]
        if together and 2 * len(more) * max(len(one.ids) for one in more) > MAX_TOKENS:
            yield together
            more = own
        together = more
    if together:
        yield together
