from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteora.artifacts import (
    AdapterModule,
    AdapterRef,
    AdapterSpec,
    ArtifactId,
    BaseSpec,
    BenchmarkSpec,
    BuiltBase,
    Fingerprint,
    FusedSpec,
    LinearSize,
    RouterSpec,
    RoutingSpec,
    Score,
    Spec,
    canonical_json,
    short,
)

BASE = BaseSpec("owner/base", "a" * 40)
MODULE = AdapterModule("model.layers.0.self_attn.q_proj", 32, 16, 8, 16.0, 2.0)
ADAPTER = AdapterSpec("b" * 64, "owner/base", use_rslora=False, dtype="F16", modules=(MODULE,))
FUSED = FusedSpec(BASE.id, ("one",), (ADAPTER.id,))
ROUTER = RouterSpec(FUSED.id, "gate", 1, 1.0, "calibrate", "c" * 64, 0)
BENCHMARK = BenchmarkSpec(ROUTER.id, "task", "d" * 64, "exact_match", 0, 32, 0, BASE.id)
ROUTING = RoutingSpec(ROUTER.id, "e" * 64)

GOLDEN: dict[Spec, str] = {
    BASE: "base:486315eb56e58978ab669c3ee5f44615b194768d44e21f310e6c90380f481138",
    ADAPTER: "adapter:193e828aacf01ef88463375c81b0a3c4baf09ee4808b256da913df76676fe9f9",
    FUSED: "fused:ae7c74bc7f9a360074bf920bb289b58136d300e5bd6497a1e8c856272204ce16",
    ROUTER: "router:b3fa335490285b4f0f36b59a8c41935207b12445eb1bde66b9cf3192b3fc170d",
    BENCHMARK: "benchmark:36c216cf39f62d4c6706a2dc575e4c57be115e77af2c434dbd4631eb4b16f5e0",
    ROUTING: "routing:a12961db50a53384219eabf247bedbbf6903861c13c8f94460426bc48f758c97",
}


@pytest.mark.parametrize("spec", GOLDEN, ids=lambda spec: spec.kind)
def test_ids_are_stable_across_releases(spec: Spec) -> None:
    """A changed hash here orphans every artifact on disk: bump `version` where that is meant."""
    assert spec.id == GOLDEN[spec]


texts = st.text(max_size=8)
ids = texts.map(ArtifactId)
fused_specs = st.builds(
    FusedSpec,
    base_id=ids,
    names=st.lists(texts, max_size=3).map(tuple),
    adapter_ids=st.lists(ids, max_size=3).map(tuple),
)
router_specs = st.builds(
    RouterSpec,
    fused_id=ids,
    router=texts,
    top_k=st.integers(1, 4),
    temperature=st.floats(0.1, 10),
    seed=st.integers(0, 3),
)


@given(fused_specs, fused_specs)
def test_ids_are_equal_exactly_where_specs_are(one: FusedSpec, other: FusedSpec) -> None:
    assert (one.id == other.id) == (one == other)


@given(fused_specs | router_specs)
def test_a_spec_comes_back_from_json_equal(spec: Spec) -> None:
    assert type(spec).from_dict(spec.to_dict()) == spec


def test_the_order_of_experts_is_part_of_the_id() -> None:
    two = (ADAPTER.id, ArtifactId("adapter:" + "f" * 64))
    swapped = FusedSpec(BASE.id, ("a", "b"), two[::-1])
    assert FusedSpec(BASE.id, ("a", "b"), two).id != swapped.id


def test_specs_of_different_kinds_never_share_an_id() -> None:
    assert len({spec.id for spec in GOLDEN}) == len(GOLDEN)


def test_a_nested_noun_comes_back_as_itself() -> None:
    fingerprint = Fingerprint("Llama", 32, 48, 2, 4, 2, 259, "a" * 64)
    built = BuiltBase(BASE, "b" * 64, fingerprint, (LinearSize("model.q", 32, 16),))
    again = BuiltBase.from_dict(built.to_dict())
    assert again == built
    assert again.sizes == {"model.q": (32, 16)}


def test_fingerprints_say_where_they_differ() -> None:
    one = Fingerprint("Llama", 32, 48, 2, 4, 2, 259, "a" * 64)
    other = Fingerprint("Llama", 64, 48, 2, 4, 2, 259, "b" * 64)
    assert one.differences(one) == []
    assert one.differences(other) == [
        "hidden_size 32, not 64",
        f"vocabulary_sha256 {'a' * 16}, not {'b' * 16}",
    ]


@pytest.mark.parametrize("revision", ["main", "a" * 39, "A" * 40, "sha256:" + "a" * 40, ""])
def test_an_adapter_is_never_referred_to_by_a_branch(revision: str) -> None:
    with pytest.raises(ValueError, match="is not a commit"):
        AdapterRef("owner/name", revision)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValueError, match="value is"):
        Score(BENCHMARK, value, 0.0, 0.0, 1.0, 1, "f" * 64, "lm-eval", 1.0)
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json({"value": value})


def test_an_id_is_shown_short_and_kept_whole() -> None:
    assert short(BASE.id) == BASE.id[: len("base:") + 12]
