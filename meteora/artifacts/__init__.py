"""The nouns of the project and their ids. Standard library only; read this file first.

    Recipe ─resolve▶ AdapterRef ─read▶ AdapterSpec ─stack▶ FusedSpec ─fit▶ RouterSpec ─ask▶ Score
                                                   ╰ FusedCheckpoint   ╰ RouterBuild

A *spec* says what is to be made or measured. Its `id` is a hash of its fields. It is known before
the work, so finished work is found by its id and skipped. A *build* is the result; `weights_sha256`
is the hash of the bytes that were made. A spec's `parents` are the ids that it depends on: lineage.

    specs     bases, adapters, stacks, merges, and pools of prompts without labels
    identity  base classes: JSON and back, and the id
    routers   how a fused model routes, and the result of fitting its gates
    scores    what is measured: benchmarks, comparisons, routing, speed
"""

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
    file_sha256,
    short,
)
from meteora.artifacts.routers import (
    NULL,
    ROUTER_KINDS,
    SHARED,
    WITH_GATES,
    Control,
    JointSettings,
    RouterBuild,
    RouterOptions,
    RouterSpec,
    Unfitted,
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
    ScoreTurn,
    SpeedBuild,
    SpeedSpec,
)
from meteora.artifacts.specs import (
    QUANTISED,
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
    PoolBuild,
    PoolShare,
    PoolSpec,
    Publication,
    Reason,
)

__all__ = [
    "COMMIT", "NULL", "QUANTISED", "REPO_ID", "ROUTER_KINDS", "SHA256", "SHARED", "WITH_GATES",
    "AdapterModule", "AdapterRef", "AdapterSpec", "ArtifactId", "BaseSpec", "BenchmarkSpec",
    "BuiltBase", "ComparisonBuild", "ComparisonSpec", "Control", "Difference", "Fingerprint",
    "FusedCheckpoint", "FusedSpec", "JointSettings", "LinearSize", "MergeSpec", "MeteoraError",
    "Noun", "PoolBuild", "PoolShare", "PoolSpec", "Publication", "Rate", "Reason",
    "RouterBuild", "RouterOptions", "RouterSpec", "RoutingBuild", "RoutingDetail",
    "RoutingScore", "RoutingShare", "RoutingSpec", "RoutingSwitch", "Score", "ScorePair",
    "ScorePart", "ScoreTurn", "Spec", "SpeedBuild", "SpeedSpec", "Unfitted",
    "canonical_json", "canonical_sha256", "file_sha256", "short",
]  # fmt: skip
