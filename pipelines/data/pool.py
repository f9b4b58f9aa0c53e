"""Divide a pool of prompts without labels among the experts.

1. The base reads every prompt once, and the examples of the experts that have some. Prompts of one
   task are close in its hidden states, so the prompts are clustered.
2. An expert's updates are larger on prompts like those that it was trained on. Their size is
   standardised for each expert, since some have large updates everywhere, and compared with the
   median of all experts, since all experts have large updates on some prompts.
3. A cluster goes to the expert with the highest score on it, or to no expert.
4. Each expert without examples answers its prompts. Prompts and answers are its examples.

The prompts of experts with examples are read, too. Otherwise these experts would be standardised on
prompts of other tasks, and would get some of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from lm_eval.models.utils import resolve_max_length

from meteora.artifacts import canonical_sha256
from meteora.base.chat_template import encode_prompt
from meteora.model.fused import force_expert
from meteora.model.generate import answer_all
from meteora.model.update_sizes import read_prompts
from pipelines.data.background import MAX_NEW_TOKENS, background_rows
from pipelines.data.claims import Claim
from pipelines.data.rows import ExamplesError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
    Answers = list[list[int]]

CLUSTERS_PER_EXPERT = 4
"""A task has several kinds of prompts, and some prompts belong to no expert."""
OUTSIDERS = 16
"""Background prompts that are read, too, as prompts that belong to no expert."""
CHECKED = 16
"""The prompts of an expert that `known_shares` reads."""
CHECKED_TOKENS = 256
"""The own tokens of a prompt that it reads, so that a batch of 16 takes little memory."""
LEAST_SCORE, LEAST_SHARE = 0.75, 0.4
"""The least score of an expert that gets a cluster: in standard deviations, and as a share of its
best score. In the two pools of `tests/benchmarks/results/pool.md` clusters of an expert had 1.24
and a share of 0.50 at least, the others 0.68 and a share of 0.31 at most."""


def divide(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    names: Sequence[str],
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    limit: int,
    seed: int = 0,
    bar: Bar = lambda _what, _total, _unit: nullcontext(lambda _count: None),
    once: Callable[[str, Callable[[], Answers]], Answers] = lambda _key, ask: ask(),
) -> list[Claim]:
    """Divide prompts among experts.

    Args:
        model: with its experts
        prompts: different ones, in any order
        names: of all experts, in order
        known: prompts of the experts that have examples, by expert
        limit: the most examples of an expert, drawn from its prompts
        seed: of that draw
        bar: shows progress, as `console.bar` does
        once: called with a key of an expert's prompts and a function that answers them; may return
            answers, as token ids, that a stopped call has saved under that key

    Returns:
        one claim for each prompt, in order. Prompts that do not fit into the base's context, with
        an answer, go to no expert.

    Raises:
        ExamplesError: no prompt fits.
    """
    rng = random.Random(seed)  # noqa: S311  (a draw, no secret)
    most = resolve_max_length(model.config, tokenizer) - MAX_NEW_TOKENS
    ids_of = {prompt: encode_prompt(tokenizer, prompt) for prompt in prompts}
    texts = [prompt for prompt, ids in ids_of.items() if 0 < len(ids) <= most]
    if not texts:
        raise ExamplesError(
            f"gates.pool: none of its {len(prompts):,} prompts has 1 to {most:,} tokens, which are"
            " what fits into the base's context; name shorter ones"
        )
    pool_ids = [ids_of[prompt] for prompt in texts]
    known_ids = [encode_prompt(tokenizer, prompt) for own in known.values() for prompt in own]
    known_ids = [ids for ids in known_ids if 0 < len(ids) <= most]
    all_ids = pool_ids + known_ids + [encode_prompt(tokenizer, text) for text in outsiders()]
    with bar("reading the pool", len(all_ids), "prompts") as advance:
        means, sizes = read_prompts(model, tokenizer, all_ids, len(names), advance)
    points = means[: len(pool_ids) + len(known_ids)].numpy()
    claims = claims_of(texts, points, sizes.double().numpy(), names)
    chosen = {name: _draw(claims, name, limit, rng) for name in names if name not in known}
    total = sum(map(len, chosen.values()))
    with bar("answering as the expert", total, "answers") as advance:
        for name, own in chosen.items():
            ids = [pool_ids[i] for i in own]
            with force_expert(model, name):
                ask = partial(answer_all, model, tokenizer, ids, MAX_NEW_TOKENS, advance)
                answers = once(canonical_sha256([name, ids]), ask)
            for i, answer in zip(own, answers, strict=True):
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                claims[i] = replace(claims[i], response=text)
    by_prompt = {claim.prompt: claim for claim in claims}
    return [by_prompt.get(text) or Claim(text, "", -1, 0.0, 0.0) for text in prompts]


def known_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, Sequence[str]],
    names: Sequence[str],
) -> dict[str, float]:
    """The share of an expert's first prompts that are of clusters on which its updates stand out.

    An expert stands out from the others. Where half of them have learnt one task, none of these
    stands out on it. Of each example, by expert, only the beginning is read.
    """
    first = {name: [*dict.fromkeys(prompts)][:CHECKED] for name, prompts in examples.items()}
    place = {
        text: i for i, text in enumerate(dict.fromkeys(t for own in first.values() for t in own))
    }
    ids = [encode_prompt(tokenizer, text) for text in [*place, *outsiders()]]
    means, sizes = read_prompts(model, tokenizer, ids, len(names), most_tokens=CHECKED_TOKENS)
    clusters = clusters_of(means[: len(place)].numpy(), CLUSTERS_PER_EXPERT * len(names))
    scores = stand_out(sizes.double().numpy(), clusters)
    knows = (scores >= least_scores(scores))[clusters]
    return {
        name: float(np.mean([knows[place[text], names.index(name)] for text in own]))
        for name, own in first.items()
        if own
    }


def outsiders() -> list[str]:
    """Prompts that belong to no expert."""
    return [row.prompt for row in background_rows() if row.prompt][:OUTSIDERS]


def least_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least score [E] of each expert that gets a cluster, from its scores [clusters, E]."""
    return np.maximum(LEAST_SCORE, LEAST_SHARE * scores.max(0))


def clusters_of(points: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The cluster of each of the points [N, H], from 0, and at most `count` of them.

    It is Ward's method on the directions from the mean.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415  (slow to import; only pools need it)

    if len(points) <= count:
        return np.arange(len(points))
    centred = points - points.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return fcluster(linkage(centred, "ward"), count, "maxclust").astype(np.int64) - 1


def stand_out(sizes: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean score of each expert on each cluster: [clusters, E], in standard deviations.

    Args:
        sizes: [N + outsiders, E], the logarithm of the size of an expert's updates on each prompt
        clusters: [N], the cluster of each prompt
    """
    scores = _standardised(sizes)
    if scores.shape[1] > 1:  # all experts have larger updates on some prompts
        scores = _standardised(scores - np.median(scores, axis=1, keepdims=True))
    scores = scores[: len(clusters)]
    return np.stack([scores[clusters == c].mean(0) for c in range(clusters.max() + 1)])


def _standardised(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    return (columns - columns.mean(0)) / np.maximum(columns.std(0), 1e-12)


def claims_of(
    prompts: Sequence[str],
    points: NDArray[np.float32],
    sizes: NDArray[np.float64],
    names: Sequence[str],
) -> list[Claim]:
    """Every prompt with the owner of its cluster.

    Args:
        prompts: N of them
        points: [N + K, H], the mean hidden states of these prompts, and of K prompts of experts
            that have examples
        sizes: [N + K + outsiders, E], the logarithm of the size of each expert's updates on each
        names: of all experts, in order
    """
    clusters = clusters_of(points, CLUSTERS_PER_EXPERT * len(names))
    scores = stand_out(sizes, clusters)
    least = least_scores(scores)
    owners = []
    for row in scores:
        best = int(row.argmax())
        lead = row[best] - np.delete(row, best).max(initial=0.0 if len(row) == 1 else -np.inf)
        owner = names[best] if row[best] >= least[best] else ""
        owners.append((owner, round(float(row[best]), 3), round(float(lead), 3)))
    return [
        Claim(text, owners[c][0], int(c), *owners[c][1:])
        for text, c in zip(prompts, clusters[: len(prompts)], strict=True)
    ]


def _draw(claims: Sequence[Claim], name: str, limit: int, rng: random.Random) -> list[int]:
    own = [i for i, claim in enumerate(claims) if claim.expert == name]
    return sorted(rng.sample(own, min(limit, len(own))))
