"""A pool: prompts that nobody has labelled, each dealt to the expert that knows its answer.

1. Prompts of one task lie together in the base's hidden states: they are put into clusters.
2. Every expert answers some prompts of each cluster. It is surer of its answers to its own task
   than of others: the best token is further above the second best. That is standardised for each
   expert by itself, since some are sure of everything.
3. A cluster belongs to the expert that stands out most there, or to nobody.
4. Each expert answers the prompts that it was dealt. With its answers they are its examples.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from meteora.base.chat_template import encode_prompt
from meteora.model.confidence import answer_margins, prompt_means
from meteora.model.fused import force_expert
from meteora.model.generate import answer_all
from pipelines.data.background import background_rows
from pipelines.data.claims import Claim
from pipelines.data.labels import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

CLUSTERS_PER_EXPERT = 4
"""A task has several kinds of prompts, and some prompts are nobody's."""
VOTERS = 8
"""Prompts of a cluster that every expert answers."""
VOTER_TOKENS = 8
"""How much of these answers is generated."""
OUTSIDERS = 16
"""Background prompts that every expert answers, too: it is not to be sure of them."""
LEAST_SCORE, LEAST_SHARE = 0.4, 0.4
"""In standard deviations, and as a share of the expert's best cluster: where none stands out so
much, a cluster is nobody's. With six experts and 24 clusters the least share of a cluster of their
own tasks was 0.49. Of four tasks that no expert knows and background prompts, four had at most
0.14, and one 0.36 to 0.57."""


def deal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    names: Sequence[str],
    *,
    limit: int,
    seed: int = 0,
    bar: Bar = lambda _what, _total, _unit: nullcontext(lambda _count: None),
) -> tuple[list[Claim], int]:
    """Deal prompts to experts.

    Args:
        model: with its experts
        prompts: different ones, in any order
        names: of all experts, in order
        limit: the greatest number of examples of an expert, drawn from its prompts
        seed: of that draw, and of which prompts are voters
        bar: shows progress, as `console.bar` does

    Returns:
        one claim for each prompt, in order, and the number of short answers that were asked for.
    """
    rng = random.Random(seed)  # noqa: S311  (a draw, no secret)
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    with bar("reading the pool", len(asked), "prompts") as advance:
        means = prompt_means(model, tokenizer, asked, advance)
    clusters = clusters_of(means.numpy(), CLUSTERS_PER_EXPERT * len(names))
    members = [np.flatnonzero(clusters == c).tolist() for c in range(clusters.max() + 1)]
    voters = [i for own in members for i in rng.sample(own, min(VOTERS, len(own)))]
    outsiders = [row.prompt for row in background_rows() if row.prompt][:OUTSIDERS]
    ballot = [asked[i] for i in voters] + [encode_prompt(tokenizer, text) for text in outsiders]
    margins = np.empty((len(ballot), len(names)))
    with bar("asking every expert", margins.size, "answers") as advance:
        for e, name in enumerate(names):
            with force_expert(model, name):
                margins[:, e] = answer_margins(model, tokenizer, ballot, VOTER_TOKENS, advance)
    scores = votes(margins, clusters[voters])
    claims = _claims(prompts, clusters, scores, names)
    chosen = {name: _draw(claims, name, limit, rng) for name in names}
    total = sum(map(len, chosen.values()))
    with bar("answering as the expert", total, "answers") as advance:
        for name, own in chosen.items():
            ids = [asked[i] for i in own]
            with force_expert(model, name):
                said = answer_all(model, tokenizer, ids, MAX_NEW_TOKENS, advance)
            for i, answer in zip(own, said, strict=True):
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                claims[i] = replace(claims[i], response=text)
    return claims, margins.size


def clusters_of(points: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The cluster of each point, from 0: Ward's method on the directions from the mean.

    Args:
        points: [N, H]
        count: the greatest number of clusters
    """
    if len(points) <= count:
        return np.arange(len(points))
    centred = points - points.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return fcluster(linkage(centred, "ward"), count, "maxclust").astype(np.int64) - 1


def votes(margins: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far each expert stands out in each cluster: [clusters, E], in standard deviations.

    Args:
        margins: [V + outsiders, E], how sure each expert is of its answer to each voter
        clusters: [V], the cluster of each voter; every cluster has one
    """
    spread = np.maximum(margins.std(0), 1e-12)
    scores = ((margins - margins.mean(0)) / spread)[: len(clusters)]
    return np.stack([scores[clusters == c].mean(0) for c in range(clusters.max() + 1)])


def _claims(
    prompts: Sequence[str],
    clusters: NDArray[np.int64],
    scores: NDArray[np.float64],
    names: Sequence[str],
) -> list[Claim]:
    """Every prompt with the owner of its cluster.

    Args:
        scores: [clusters, E], as from `votes`
    """
    least = np.maximum(LEAST_SCORE, LEAST_SHARE * scores.max(0))
    owners = []
    for row in scores:
        best = int(row.argmax())
        lead = row[best] - np.delete(row, best).max(initial=0.0 if len(row) == 1 else -np.inf)
        owner = names[best] if row[best] >= least[best] else ""
        owners.append((owner, round(float(row[best]), 3), round(float(lead), 3)))
    return [
        Claim(text, owners[c][0], int(c), *owners[c][1:])
        for text, c in zip(prompts, clusters, strict=True)
    ]


def _draw(claims: Sequence[Claim], name: str, limit: int, rng: random.Random) -> list[int]:
    own = [i for i, claim in enumerate(claims) if claim.expert == name]
    return sorted(rng.sample(own, min(limit, len(own))))
