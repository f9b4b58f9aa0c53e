import math
from dataclasses import dataclass, replace
from typing import ClassVar

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
    ComparisonBuild,
    ComparisonSpec,
    Difference,
    Fingerprint,
    FusedSpec,
    LinearSize,
    MergeSpec,
    RouterSpec,
    RoutingSpec,
    Score,
    ScorePair,
    ScorePart,
    Spec,
    SpeedSpec,
    canonical_json,
    identity,
    short,
)

BASE = BaseSpec("owner/base", "a" * 40)
MODULE = AdapterModule("model.layers.0.self_attn.q_proj", 32, 16, 8, 16.0, 2.0)
ADAPTER = AdapterSpec("b" * 64, "owner/base", use_rslora=False, dtype="F16", modules=(MODULE,))
FUSED = FusedSpec(BASE.id, ("one",), (ADAPTER.id,))
ROUTER = RouterSpec(FUSED.id, "gate", 1, 1.0, "calibrate", "c" * 64, 0)
BENCHMARK = BenchmarkSpec(ROUTER.id, "task", "d" * 64, "exact_match", 0, 32, 0, BASE.id)
ROUTING = RoutingSpec(ROUTER.id, "e" * 64)
MERGE = MergeSpec(FUSED.id, "ties", 1.0, 0.2)
COMPARISON = ComparisonSpec(ROUTER.id, "fused", "base", (ScorePair(BENCHMARK.id, BASE.id),))
SPEED = SpeedSpec(ROUTER.id, BASE.id, 256, 64, 1, 7)

GOLDEN: dict[Spec, str] = {
    BASE: "base:486315eb56e58978ab669c3ee5f44615b194768d44e21f310e6c90380f481138",
    ADAPTER: "adapter:a6d61c055641d4d1f966f22610a9a894ee086c4b542602b202cdb3e38c00469e",
    FUSED: "fused:6ccc10f63aee7277415044b5fea3558ed07ede464dc43a411c0ea55c59d05d44",
    ROUTER: "router:b70738a70fbff83773dec6e7b8b4363fbc3378a79956a60b5d2db76fe7b91953",
    BENCHMARK: "benchmark:1ecfe854fc613d645453d970ef56f21a972f164aa0a033c0a7f34cfc97276ba4",
    ROUTING: "routing:ea84fe27bb795fc4b379e11f87883d9090d491894dec13c17e32f599154ae4e2",
    MERGE: "merge:9cc9d20e5d4d5ead2b7f02606c52b8e9e78b215e5addb5decbe41340d18120e9",
    COMPARISON: "comparison:41e79a37fd6d78e5114ae88f02c6229784be9911e6364166acf3296c4b9e33d7",
    SPEED: "speed:d923afe00bd23375750b5e54868351fd1c6fe18efcebef78a06fdd56601e6564",
}


@pytest.mark.parametrize("spec", GOLDEN, ids=lambda spec: spec.kind)
def test_ids_are_stable_across_releases(spec: Spec) -> None:
    """A changed hash here orphans every artifact on disk: bump `version` where that is meant."""
    assert spec.id == GOLDEN[spec]


def test_an_id_is_computed_once_for_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of 1,024 adapters compares the id of each with those of all others."""
    spec = replace(ADAPTER)
    before = spec.id
    monkeypatch.delattr(identity, "canonical_sha256")
    assert spec.id == before == ADAPTER.id
    assert replace(spec) == spec
    monkeypatch.undo()
    assert replace(spec, dtype="F32").id != before  # a copy has its own


def test_the_types_of_a_noun_s_fields_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may have 100,000 modules; to find the types takes longer than to read one."""
    found = AdapterSpec.from_dict(ADAPTER.to_dict())
    monkeypatch.delattr(identity, "get_type_hints")
    assert AdapterSpec.from_dict(ADAPTER.to_dict()) == found


def test_a_quantised_base_is_another_base_and_was_made_of_the_stored_one() -> None:
    narrow = BaseSpec(BASE.base_model, BASE.base_revision, "4bit")
    assert narrow.id == "base:283c37fd6424163126a4f7265b3858fb46bac768174855afbd7f4726366ddfdc"
    assert narrow.stored == BASE
    assert (narrow.parents, BASE.parents) == ((BASE.id,), ())


def test_a_field_that_is_added_with_a_default_leaves_old_ids_and_records_alone() -> None:
    @dataclass(frozen=True)
    class Asked(Spec):
        kind: ClassVar[str] = "asked"

        size: int

    @dataclass(frozen=True)
    class AskedMore(Asked):
        colour: str = "any"

    assert AskedMore(3).id == Asked(3).id
    assert AskedMore(3, "red").id != Asked(3).id
    assert AskedMore.from_dict(Asked(3).to_dict()) == AskedMore(3)


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


def test_scores_and_comparisons_come_back_equal_and_old_scores_are_read() -> None:
    part = ScorePart("one", 0.5, 4, 3)
    score = Score(BENCHMARK, 0.5, 0.1, 0.3, 0.7, 8, "f" * 64, "lm-eval", 1.0, parts=(part,))
    assert Score.from_dict(score.to_dict()) == score
    old = {name: value for name, value in score.to_dict().items() if name != "parts"}
    del old["spec"]["template"]
    assert Score.from_dict(old).parts == ()
    assert Score.from_dict(old).spec.id == BENCHMARK.id

    apart = Difference(
        "t", "exact_match", BENCHMARK.id, BASE.id, 0.1, 0.0, 0.2, 0.01, 0.06, "mcnemar", 8
    )
    made = ComparisonBuild(COMPARISON, (apart,), 0.1, 0.0, 0.2)
    assert ComparisonBuild.from_dict(made.to_dict()) == made
    assert not apart.mark(higher_is_better=True)  # it is the corrected p that counts


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
