"""Statistics of a router: the experts of tokens, its certainty, and its delay at switches.

Routing is recorded in ordinary forward passes, so each layer sees the outputs of the routed layers
below it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora.artifacts import NULL, RoutingDetail, RoutingSwitch
from meteora.artifacts.scores import Abstention
from meteora.base.chat_template import Template, encode_pair, encode_prompt
from meteora.base.padding import by_length, padded_and_mask
from meteora.base.placement import input_device
from meteora.model.fused import expert_names
from meteora.model.shared_prefix import share_prefix
from meteora.routing.hooks import recorded_logits, recorded_routes
from meteora.routing.layer import routed_layers
from pipelines.data.composites import Composite, compose, fits
from pipelines.evaluation.harness import room_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.rows import Row

QUESTIONS, COMPOSITES, SEED = 3, 48, 0
"""The composites for the measurement of switches: questions in each, the most of them, the seed."""


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens for one routed module; see `RoutingDetail` for their meaning."""

    counts: Tensor
    """Tokens whose first choice is each expert, or `(base)` if it is a choice: [C]."""
    num_tokens: int
    entropy_bits: float
    weight: float
    agreement: float

    def __add__(self, other: RoutingSums) -> RoutingSums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return RoutingSums(*(one + more for one, more in pairs))

    def detail(self, module: str) -> RoutingDetail:
        """The means over the tokens."""
        n = self.num_tokens
        return RoutingDetail(module, self.entropy_bits / n, self.weight / n, self.agreement / n)


def add(total: dict[str, RoutingSums], more: Mapping[str, RoutingSums]) -> None:
    """Add the sums of each module to its total, in place."""
    for path, sums in more.items():
        total[path] = total[path] + sums if path in total else sums


def measure_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _rows: None,
) -> dict[str, RoutingSums]:
    """The routes of the tokens of some rows, summed by routed module.

    The model reads each prompt with its reference answer. Tokens of the template's opening do not
    count: they are the same in every prompt, so no router can tell the expert from them. Tokens
    beyond the base's context length do not count either.
    """
    opening, room = len(Template.of(tokenizer).opening), room_of(model.config)
    total: dict[str, RoutingSums] = {}
    encoded = [encode_pair(tokenizer, row.prompt, row.response)[:room] for row in rows]
    for indices in by_length(encoded, batch_size):
        batch = padded_and_mask([encoded[i] for i in indices])
        ids, mask = (part.to(input_device(model)) for part in batch)
        started = share_prefix(model, ids, mask, at_most=opening)
        counted = started.mask.bool() & (started.mask.cumsum(1) > opening)
        add(total, _sums(model, started.to_read(), counted[:, started.num_read :].flatten()))
        advance(len(indices))
    return total


def _sums(model: PreTrainedModel, batch: dict[str, Any], counted: Tensor) -> dict[str, RoutingSums]:
    """The sums of one forward pass over a batch [B, L], of tokens that are `counted`, [B × L]."""
    with (
        torch.inference_mode(),
        recorded_logits(model) as logits,
        recorded_routes(model) as routes,
    ):
        model(**batch, logits_to_keep=1)
    num_experts = len(expert_names(model))
    temperature = {
        path: layer.router.options.temperature
        for path, layer in routed_layers(model).items()
        if layer.router is not None
    }
    chosen = {path: experts[counted, 0] for path, (_, experts) in routes.items()}
    votes = sum(torch.nn.functional.one_hot(own, num_experts) for own in chosen.values())
    majority = torch.as_tensor(votes).argmax(-1)
    sums = {}
    for path, (weights, _) in routes.items():
        shares = torch.softmax(logits[path][counted].float() / temperature[path], dim=-1)
        sums[path] = RoutingSums(
            counts=torch.bincount(chosen[path], minlength=num_experts).cpu(),
            num_tokens=len(chosen[path]),
            entropy_bits=float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0))),
            weight=float(weights[counted, 0].sum()),
            agreement=float((chosen[path] == majority).sum()),
        )
    return sums


def composites_of(tests: Mapping[str, Sequence[Row]]) -> list[Composite]:
    """The composites for the measurement of switches, from rows by expert.

    Empty if fewer than two experts have rows that fit into composites.
    """
    rows = {name: fit for name, own in tests.items() if (fit := [row for row in own if fits(row)])}
    if len(rows) < 2:
        return []
    count = num_composites(sum(map(len, rows.values())))
    return compose(rows, min(QUESTIONS, len(rows)), count, SEED)


def num_composites(num_rows: int) -> int:
    """The number of composites that are made of so many rows: of few, as many as there are rows.

    More would only ask the same rows again.
    """
    return min(COMPOSITES, num_rows)


def measure_switches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    composites: Sequence[Composite],
    *,
    advance: Callable[[int], None] = lambda _prompts: None,
) -> tuple[RoutingSwitch, ...]:
    """The delays, in tokens, between the start of a task's text and the switch to its expert.

    Routing has switched at the first token whose largest mean weight over all modules is that of
    the task's own expert; `delay` is None if there is no such token. Composites longer than the
    base's context do not count.
    """
    names, room = expert_names(model), room_of(model.config)
    counts: Counter[tuple[str, bool, int | None]] = Counter()
    for composite in composites:
        ids, owners = composite.encode(tokenizer)
        if len(ids) > room:
            advance(1)
            continue
        with torch.inference_mode(), recorded_routes(model) as routes:
            model(input_ids=torch.tensor([ids], device=input_device(model)), logits_to_keep=1)
        shares = torch.zeros(len(ids), len(names), device=input_device(model))
        for weights, experts in routes.values():
            shares.scatter_add_(1, experts, weights.float())
        winners = [names[e] for e in shares.argmax(-1).tolist()]
        answer = len(encode_prompt(tokenizer, composite.prompt))
        for start, end in _runs(owners):
            own = str(owners[start])
            delay = next((t - start for t in range(start, end) if winners[t] == own), None)
            counts[own, start >= answer, delay] += 1
        advance(1)
    return tuple(
        RoutingSwitch(expert, in_answer, delay, count)
        for (expert, in_answer, delay), count in sorted(counts.items(), key=str)
    )


def measure_abstention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own: Sequence[Row],
    rows_without_expert: Sequence[Row],
    *,
    advance: Callable[[int], None] = lambda _prompts: None,
) -> Abstention:
    """How well the base's probability separates prompts of no expert from the experts' own."""
    from scipy.stats import mannwhitneyu  # noqa: PLC0415  (slow to import; only this needs it)

    place, template = expert_names(model).index(NULL), Template.of(tokenizer)
    shares: list[list[float]] = []
    for rows in (own, rows_without_expert):
        shares.append([])
        for row in rows:
            ids = encode_prompt(tokenizer, row.prompt)
            end = max(len(ids) - len(template.closing), len(template.opening) + 1)
            with torch.inference_mode(), recorded_logits(model) as logits:
                model(input_ids=torch.tensor([ids], device=input_device(model)), logits_to_keep=1)
            means = [
                one[len(template.opening) : end].float().softmax(-1)[:, place].mean().cpu()
                for one in logits.values()
            ]
            shares[-1].append(float(torch.stack(means).mean()))
            advance(1)
    inside, outside = shares
    return Abstention(
        num_own=len(inside),
        num_nobodys=len(outside),
        own_share=fmean(inside),
        nobodys_share=fmean(outside),
        auroc=float(mannwhitneyu(outside, inside).statistic) / len(inside) / len(outside),
    )


def _runs(owners: Sequence[str | None]) -> list[tuple[int, int]]:
    """Start and end of each run of tokens of one task; tokens of no task are in no run."""
    runs, start = [], 0
    for owner, own in groupby(owners):
        end = start + len([*own])
        if owner is not None:
            runs.append((start, end))
        start = end
    return runs
