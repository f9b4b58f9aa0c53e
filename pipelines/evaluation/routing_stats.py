"""Where a router sends tokens: how often to whom, how surely, and how soon it follows a change.

Routing is watched as it happens, with the choices of the layers below feeding those above.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import RoutingDetail, RoutingSwitch
from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.model.fused import expert_names
from meteora.routing.hooks import recorded_logits, recorded_routes
from meteora.routing.layer import routed_layers
from pipelines.data.composites import compose, encode_composite, fits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.rows import Row

QUESTIONS, COMPOSITES, SEED = 3, 48, 0
"""Prompts in which a router has to follow: how many questions each, how many of them, drawn how."""


@dataclass(frozen=True)
class Sums:
    """Of one routed module, over tokens."""

    counts: Tensor
    """Tokens sent to each expert, [E]: the one with the largest logit."""
    num_tokens: int
    entropy_bits: float
    weight: float
    agreement: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.counts + other.counts,
            self.num_tokens + other.num_tokens,
            self.entropy_bits + other.entropy_bits,
            self.weight + other.weight,
            self.agreement + other.agreement,
        )

    def detail(self, module: str) -> RoutingDetail:
        n = self.num_tokens
        return RoutingDetail(module, self.entropy_bits / n, self.weight / n, self.agreement / n)


def add(total: dict[str, Sums], more: Mapping[str, Sums]) -> None:
    """Add up the sums of the same modules."""
    for path, sums in more.items():
        total[path] = total[path] + sums if path in total else sums


def watch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _rows: None,
) -> dict[str, Sums]:
    """Where the tokens of some rows are sent, by routed module.

    Prompt and answer are fed as they stand; the template's opening, the same in front of every
    prompt, is left out, since no router could tell anything from it.
    """
    opening = len(Template.of(tokenizer).opening)
    total: dict[str, Sums] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        encoded = [encode_pair(tokenizer, row.prompt, row.response) for row in batch]
        longest = max(map(len, encoded))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, own in enumerate(encoded):
            ids[i, : len(own)] = torch.tensor(own)
        place = torch.arange(longest)
        there = place < torch.tensor([len(own) for own in encoded])[:, None]  # [B, L]
        add(total, _sums(model, ids, there, (there & (place >= opening)).flatten()))
        advance(len(batch))
    return total


def _sums(model: PreTrainedModel, ids: Tensor, there: Tensor, asked: Tensor) -> dict[str, Sums]:
    """One forward pass over ids [B, L]; of its tokens those count that are `asked` [B × L]."""
    with (
        torch.inference_mode(),
        recorded_logits(model) as logits,
        recorded_routes(model) as routes,
    ):
        model(
            input_ids=ids.to(model.device),
            attention_mask=there.long().to(model.device),
            logits_to_keep=1,
        )
    num_experts = len(expert_names(model))
    temperature = {
        path: layer.router.options.temperature
        for path, layer in routed_layers(model).items()
        if layer.router is not None
    }
    asked = asked.to(model.device)
    chosen = {path: experts[asked, 0] for path, (_, experts) in routes.items()}
    votes = sum(torch.nn.functional.one_hot(own, num_experts) for own in chosen.values())
    majority = torch.as_tensor(votes).argmax(-1)
    found = {}
    for path, (weights, _) in routes.items():
        shares = torch.softmax(logits[path][asked].float() / temperature[path], dim=-1)
        found[path] = Sums(
            counts=torch.bincount(chosen[path], minlength=num_experts).cpu(),
            num_tokens=len(chosen[path]),
            entropy_bits=float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0))),
            weight=float(weights[asked, 0].sum()),
            agreement=float((chosen[path] == majority).sum()),
        )
    return found


def switches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Mapping[str, Sequence[Row]],
    *,
    advance: Callable[[int], None] = lambda _prompts: None,
) -> tuple[RoutingSwitch, ...]:
    """How many tokens pass, where one task's text ends and another's begins, until routing follows.

    A token follows when the expert with the largest mean weight over all modules is the task's own.

    Args:
        tests: rows by expert; prompts of several questions are made of them
    """
    rows = {name: fit for name, own in tests.items() if (fit := [row for row in own if fits(row)])}
    if len(rows) < 2:
        return ()
    names = expert_names(model)
    found: Counter[tuple[str, bool, int | None]] = Counter()
    for composite in compose(rows, min(QUESTIONS, len(rows)), COMPOSITES, SEED):
        ids, owners = encode_composite(tokenizer, composite)
        with torch.inference_mode(), recorded_routes(model) as routes:
            model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
        shares = torch.zeros(len(ids), len(names), device=model.device)
        for weights, experts in routes.values():
            shares.scatter_add_(1, experts, weights.float())
        winners = [names[e] for e in shares.argmax(-1).tolist()]
        answer = len(encode_prompt(tokenizer, composite.prompt))
        for start, end in _runs(owners):
            own = str(owners[start])
            delay = next((t - start for t in range(start, end) if winners[t] == own), None)
            found[own, start >= answer, delay] += 1
        advance(1)
    return tuple(
        RoutingSwitch(expert, in_answer, delay, count)
        for (expert, in_answer, delay), count in sorted(found.items(), key=str)
    )


def _runs(owners: Sequence[str | None]) -> list[tuple[int, int]]:
    """Where each stretch of tokens of one task begins and ends; nobody's tokens are no stretch."""
    runs: list[tuple[int, int]] = []
    for t, owner in enumerate(owners):
        if owner is None:
            continue
        if runs and runs[-1][1] == t and owners[t - 1] == owner:
            runs[-1] = (runs[-1][0], t + 1)
        else:
            runs.append((t, t + 1))
    return runs
