"""Pools: prompts without labels, and which expert gets each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from meteora.artifacts.identity import ArtifactId, Noun, Spec


@dataclass(frozen=True)
class PoolSpec(Spec):
    """Prompts without labels, to be dealt to the experts of a stack."""

    kind: ClassVar[str] = "pool"
    made_of: ClassVar[tuple[str, ...]] = ("fused_id",)

    fused_id: ArtifactId
    prompts_sha256: str
    """Of the canonical JSON of all prompts, in order; empty where experts write them."""
    examples_per_expert: int
    """Greatest number of prompts that an expert is given, and answers."""
    seed: int = 0
    template: str = "auto"
    """As in `RouterSpec`."""
    known_sha256: str = ""
    """Of the canonical JSON of the prompts of experts that have examples, by expert; they are read
    beside the pool. Empty where no expert has any."""
    writers: tuple[str, ...] = ()
    """Experts that write the prompts themselves."""


@dataclass(frozen=True)
class PoolShare(Noun):
    """What one expert was given of a pool."""

    expert: str
    """Empty for the prompts that no expert got."""
    num_prompts: int
    num_clusters: int
    score: float
    """How much larger the expert's updates are on these prompts than on the whole pool, in standard
    deviations; for prompts that no expert got, the largest value of any expert. Where experts wrote
    them: how much likelier they are for the expert than for the base, in nats a token."""
    lead: float
    """How far that is above the next expert's. Where experts wrote the prompts: how much likelier
    they are in the user's place than the expert's answers there."""


@dataclass(frozen=True)
class PoolBuild(Noun):
    """The result of dealing a pool."""

    spec: PoolSpec
    labels_sha256: str
    """Of a file with a line of JSON for each prompt: prompt, expert, score, lead, and its answer if
    it is an example."""
    shares: tuple[PoolShare, ...]
    """One for each expert in order, and one for the prompts that no expert got."""
    wall_seconds: float
    device: str
