"""The nouns of the project and their ids. Standard library only; read this file first.

    Recipe ─resolve▶ AdapterRef ─read▶ AdapterSpec ─stack▶ FusedSpec ─fit▶ RouterSpec ─ask▶ Score
                                                   ╰ FusedCheckpoint   ╰ RouterBuild

A *spec* says what is asked; its `id` is the hash of the asking and is known before the work, so it
is the key by which finished work is skipped. A built noun adds `weights_sha256`, the hash of the
bytes that came out. Lineage is read off the specs: `parents` names what each was made from.

    specs     bases, adapters, stacks and merges: what is asked for, and what came out
    identity  what makes a noun: JSON and back, and the hash that is its id
    routers   how a fused model routes, and what fitting its gates gave
    scores    what is measured: benchmarks, comparisons, routing, speed
    reasons   why an adapter is refused, or taken with a warning
"""

from __future__ import annotations

from meteora.artifacts.identity import (
    COMMIT,
    REPO_ID,
    SHA256,
    ArtifactId,
    MeteoraError,
    Noun,
    Spec,
    canonical_json,
    canonical_sha256,
    short,
)
from meteora.artifacts.reasons import Reason
from meteora.artifacts.routers import (
    NULL,
    ROUTER_KINDS,
    JointSettings,
    RouterBuild,
    RouterOptions,
    RouterSpec,
)
from meteora.artifacts.scores import (
    BenchmarkSpec,
    ComparisonBuild,
    ComparisonSpec,
    Difference,
    Rate,
    RoutingBuild,
    RoutingDetail,
    RoutingScore,
    RoutingShare,
    RoutingSpec,
    RoutingSwitch,
    Score,
    ScorePair,
    ScorePart,
    SpeedBuild,
    SpeedSpec,
)
from meteora.artifacts.specs import (
    AdapterModule,
    AdapterRef,
    AdapterSpec,
    BaseSpec,
    BuiltBase,
    Fingerprint,
    FusedCheckpoint,
    FusedSpec,
    LinearSize,
    MergeSpec,
    Publication,
)

__all__ = [
    "COMMIT", "NULL", "REPO_ID", "ROUTER_KINDS", "SHA256", "AdapterModule", "AdapterRef",
    "AdapterSpec", "ArtifactId", "BaseSpec", "BenchmarkSpec", "BuiltBase", "ComparisonBuild",
    "ComparisonSpec", "Difference", "Fingerprint", "FusedCheckpoint", "FusedSpec", "JointSettings",
    "LinearSize", "MergeSpec", "MeteoraError", "Noun", "Publication", "Rate", "Reason",
    "RouterBuild", "RouterOptions", "RouterSpec", "RoutingBuild", "RoutingDetail", "RoutingScore",
    "RoutingShare",
    "RoutingSpec", "RoutingSwitch", "Score", "ScorePair", "ScorePart", "Spec", "SpeedBuild",
    "SpeedSpec", "canonical_json", "canonical_sha256", "short",
]  # fmt: skip
