"""Pools: prompts without labels, and which expert gets each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from meteora.artifacts.identity import ArtifactId, Noun, Spec


@dataclass(frozen=True)
class PoolSpec(Spec):
    """Prompts without labels, to be divided among the experts of a stack."""

    kind: ClassVar[str] = "pool"
    made_of: ClassVar[tuple[str, ...]] = ("fused_id",)

    fused_id: ArtifactId
    prompts_sha256: str
    """Of the canonical JSON of all prompts, in order; empty where experts write them."""
    examples_per_expert: int
    """The most prompts that one expert gets and answers."""
    seed: int = 0
    template: str = "auto"
    """As in `RouterSpec`."""
    known_sha256: str = ""
    """Of the canonical JSON of the prompts of experts that have examples, by expert; these prompts
    are compared with the pool's. Empty if no expert has examples."""
    writers: tuple[str, ...] = ()
    """Experts that write the prompts themselves."""


@dataclass(frozen=True)
class PoolShare(Noun):
    """The part of a pool that one expert got."""

    expert: str
    """Empty for the prompts that no expert got."""
    num_prompts: int
    num_clusters: int
    score: float
    """How much larger the expert's updates are on these prompts than on the whole pool, in standard
    deviations; for prompts that no expert got, the largest value of any expert. If experts wrote
    the prompts: their log likelihood under the expert minus that under the base, nats per token."""
    lead: float
    """The score minus that of the next expert. If experts wrote the prompts: their log likelihood
    in the user's place minus that of the expert's answers there."""


@dataclass(frozen=True)
class PoolBuild(Noun):
    """The result of dividing a pool."""

    spec: PoolSpec
    labels_sha256: str
    """Of a file with a line of JSON for each prompt: prompt, expert, score, lead, and its answer if
    it is an example."""
    shares: tuple[PoolShare, ...]
    """One for each expert in order, and one for the prompts that no expert got."""
    wall_seconds: float
    device: str
