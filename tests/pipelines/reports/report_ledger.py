"""A ledger that holds one of everything that a report asks for, under names that mean harm."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from meteora.artifacts import (
    AdapterModule,
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
    MergeSpec,
    Rate,
    Reason,
    RouterBuild,
    RouterSpec,
    RoutingBuild,
    RoutingDetail,
    RoutingScore,
    RoutingSpec,
    RoutingSwitch,
    Score,
    ScorePair,
    ScorePart,
    ScoreTurn,
    Spec,
    SpeedBuild,
    SpeedSpec,
)
from meteora.artifacts.scores import Abstention
from store.events import AdapterVerdict, RunEnded, RunStarted
from store.ledger import Ledger

HOSTILE = "</script><img src=x onerror=alert(1)>--> $x_1$ | `a`"
NAMES = ("dates", HOSTILE, "sums")
COMMIT = "c0ffee" + "0" * 34
RUN = "run-1"
BASE = BaseSpec("tiny/base", COMMIT)
ADAPTERS = tuple(
    AdapterSpec(
        f"{n:064x}",
        "tiny/base",
        False,
        "F16",
        (AdapterModule("model.layers.0.q_proj", 8, 8, 4 * n, 8.0, 2.0),),
    )
    for n in (1, 2, 3)
)
FUSED = FusedSpec(BASE.id, NAMES, tuple(adapter.id for adapter in ADAPTERS))
GATE = RouterSpec(
    FUSED.id, "gate", 1, 1.0, "calibrate", "e" * 64, composites=(3,), stand_in="norm",
    stand_ins=(HOSTILE,),
)  # fmt: skip
ARROW = RouterSpec(FUSED.id, "arrow", 1, 1.0)
SWAP = RouterSpec(FUSED.id, "swap", 1, 1.0)
TIES = MergeSpec(FUSED.id, "ties", 1.0, 0.5)
COUNTS = {
    ("dates", "dates"): 90, ("dates", "sums"): 10,
    (HOSTILE, HOSTILE): 50, (HOSTILE, "dates"): 25, (HOSTILE, "sums"): 5,
    ("sums", "sums"): 60,
}  # fmt: skip


def fill(home: Path) -> ArtifactId:
    """Record everything, and give the id of the router."""
    ledger = Ledger(home)
    ledger.record_run(RunStarted(RUN, HOSTILE, "9" * 64, {"torch": "2.13.0"}, "cpu"))
    size = Fingerprint("LlamaForCausalLM", 32, 48, 2, 4, 4, 259, "f" * 64)
    _make(ledger, BASE, BuiltBase(BASE, "a" * 64, size, ()))
    for name, adapter in zip(NAMES, ADAPTERS, strict=True):
        _make(ledger, adapter)
        verdict = AdapterVerdict(
            name=name,
            source=f"someone/lora-{adapter.weights_sha256[-1]}@main",
            repo_id=f"someone/lora-{adapter.weights_sha256[-1]}",
            revision=COMMIT,
            verdict="accept",
            licence=HOSTILE if name == "sums" else "mit",
            adapter_id=adapter.id,
        )
        ledger.record_adapter(verdict, run_id=RUN)
    reasons = (Reason("dora", "use_dora is set"), Reason("rank", f"r is {HOSTILE}"))
    refused = AdapterVerdict(
        "found", "someone/dora", "someone/dora", COMMIT, "refuse", reasons, downloads=7
    )
    ledger.record_adapter(refused, run_id=RUN)
    _make(ledger, FUSED)
    _make(ledger, GATE, RouterBuild(GATE, "b" * 64, 5012, 0.93, 12.5, "cpu"))
    _make(ledger, ARROW)
    _make(ledger, SWAP)
    _make(ledger, TIES)
    _measure(ledger)
    ledger.record_routing(
        [
            RoutingScore(GATE.id, f"model.layers.{layer}.self_attn.{kind}", *pair, count)
            for layer in range(3)
            for kind in ("q_proj", "k_proj", "o_proj")
            for pair, count in COUNTS.items()
        ],
        run_id=RUN,
    )
    _watch(ledger)
    ledger.record_run(RunEnded(RUN, "ok", "", 60.0, {"stack": 1.5, "gates": 50.25}))
    ledger.ingest()
    return GATE.id


def measure_again(home: Path) -> None:
    """Record all of it on other rows, on which dates are done less well."""
    ledger = Ledger(home)
    _measure(ledger, "d" * 64, dates=0.8)
    _watch(ledger, "d" * 64)
    ledger.ingest()


def ask_others(home: Path) -> None:
    """Ask as many systems one more task, one of them no system of the other tasks."""
    ledger = Ledger(home)
    for subject in (GATE, BASE, TIES, ARROW, SWAP):
        _score(ledger, "f" * 64, subject, "further", 0.5)
    ledger.ingest()


def compare_alone(
    home: Path, subject: Spec = BASE, other: str = "base", rows_sha256: str = "f" * 64
) -> None:
    """Test one of the differences again, as if it were the only one; it gets another p."""
    ledger = Ledger(home)
    pair = [_spec(one, "sums", rows_sha256).id for one in (GATE, subject)]
    spec = ComparisonSpec(GATE.id, "fused", other, (ScorePair(*pair),))
    ours, theirs = (ledger.scores_of(pair)[one] for one in pair)
    found = replace(_difference(ours, theirs), p_holm=0.001 if subject == BASE else 1.0)
    _make(ledger, spec, ComparisonBuild(spec, (found,), 0.0, -0.1, 0.1))
    ledger.ingest()


def time_again(home: Path) -> None:
    """Time prompts of another length: twice as slow."""
    ledger = Ledger(home)
    _time(ledger, 64, 2.2)
    ledger.ingest()


def rate_again(home: Path) -> None:
    """Rate the answers by a metric that no comparison tests, too."""
    ledger = Ledger(home)
    for subject in (GATE, BASE, ADAPTERS[0]):
        _score(ledger, "f" * 64, subject, "dates", 0.3, metric="rougeL")
    ledger.ingest()


def _watch(ledger: Ledger, rows_sha256: str = "e" * 64) -> None:
    watched = RoutingSpec(GATE.id, rows_sha256)
    _make(
        ledger,
        watched,
        RoutingBuild(
            watched,
            accuracy=200 / 240,
            by_expert=(),
            num_tokens=240,
            wall_seconds=1.0,
            details=tuple(
                RoutingDetail(f"model.layers.{layer}.self_attn.q_proj", 0.5, 0.9, 0.7 + layer / 10)
                for layer in range(3)
            ),
            switches=(
                RoutingSwitch("dates", False, 0, 6), RoutingSwitch("dates", True, 0, 8),
                RoutingSwitch("sums", False, 2, 3), RoutingSwitch("sums", False, None, 1),
            ),
            abstention=Abstention(30, 20, 0.05, 0.75, 0.987),
        ),
    )  # fmt: skip


def _make(ledger: Ledger, spec: Spec, built: object = None) -> None:
    blob = ledger.blobs.put_bytes(spec.id.encode())
    ledger.record_artifact(
        spec,
        weights_sha256=blob,
        built=built,  # ty: ignore[invalid-argument-type]
        blobs=[blob],
        run_id=RUN,
    )


def _measure(ledger: Ledger, rows_sha256: str = "f" * 64, dates: float = 0.9) -> None:
    """Dates are done well, sums are done worse than by their adapter, the third not at all."""
    score = partial(_score, ledger, rows_sha256)
    fused = {"dates": dates, HOSTILE: 0.0, "sums": 0.4, "composite-3": 0.55}
    spread = [
        ("fused", GATE, 0.0),
        ("base", BASE, -1.0),
        ("arrow", ARROW, -0.3),
        ("ties", TIES, -0.2),
    ]
    scores: dict[tuple[str, str], Score] = {}
    for task, value in fused.items():
        for system, subject, shift in spread:
            scores[task, system] = score(subject, task, max(0.0, value + shift))
        for name, adapter in zip(NAMES, ADAPTERS, strict=True):
            own = 0.95 if name == task else 0.05
            scored = score(adapter, task, own)
            if name == task:
                scores[task, "oracle"] = scored
    pairs = {
        other: tuple(
            ScorePair(scores[task, "fused"].spec.id, scores[task, other].spec.id)
            for task in fused
            if (task, other) in scores
        )
        for other in ("oracle", "base")
    }
    for other, own in pairs.items():
        spec = ComparisonSpec(GATE.id, "fused", other, own)
        differences = tuple(
            _difference(scores[task, "fused"], scores[task, other])
            for task in fused
            if (task, other) in scores
        )
        _make(ledger, spec, ComparisonBuild(spec, differences, 0.0, -0.1, 0.1))
    score(GATE, "composite-3", 0.65, metric="composite_attempted")
    for subject, values, computed in ((GATE, (1.0, 0.25, 0.5), 30), (SWAP, (1.0, 0.75, 0.5), 60)):
        turns = tuple(
            ScoreTurn(n, value, 60.0 * n, float(computed), 8.0, computed / 100)
            for n, value in enumerate(values, 1)
        )
        score(subject, "conversation-3", sum(values) / 3, turns=turns)
    _time(ledger, 128, 1.1)


def _time(ledger: Ledger, prompt_tokens: int, ratio: float) -> None:
    speed = SpeedSpec(GATE.id, BASE.id, prompt_tokens, 32, 1, 5)
    rates = (
        Rate("prefill", 1000.0, 900.0, 1.11, 1.05, 1.2),
        Rate("decode", 50.0, 45.0, ratio, 1.0, 2.5),
    )
    built = SpeedBuild(
        speed, rates, 538_000_000, 13_000_000, None, None, 13_600_000, "cpu", 1, "float32", 9.0
    )
    _make(ledger, speed, built)


def _spec(subject: Spec, task: str, rows_sha256: str, metric: str = "exact_match") -> BenchmarkSpec:
    return BenchmarkSpec(subject.id, task, rows_sha256, metric, 0, 64, 0, BASE.id)


def _score(
    ledger: Ledger,
    rows_sha256: str,
    subject: Spec,
    task: str,
    value: float,
    metric: str = "exact_match",
    turns: tuple[ScoreTurn, ...] = (),
) -> Score:
    spec = _spec(subject, task, rows_sha256, metric)
    parts = (ScorePart("dates", 0.6, 30, 28),) if task == "composite-3" else ()
    score = Score(
        spec=spec,
        value=value,
        stderr=0.02,
        low=max(0.0, value - 0.1),
        high=min(1.0, value + 0.04),
        num_samples=30 if metric == "composite_attempted" else 100,
        outputs_sha256=ledger.blobs.put_bytes(spec.id.encode()),
        harness="lm-eval 0.4.13",
        wall_seconds=1.5,
        num_truncated=3,
        mean_prompt_tokens=210.4,
        max_prompt_tokens=333,
        parts=parts,
        turns=turns,
    )
    ledger.record_score(score, run_id=RUN)
    return score


def _difference(one: Score, other: Score) -> Difference:
    apart = one.value - other.value
    return Difference(
        task=one.spec.task,
        metric="exact_match",
        score_id=one.spec.id,
        other_id=other.spec.id,
        difference=apart,
        low=apart - 0.1,
        high=apart + 0.1,
        p_value=0.001 if abs(apart) > 0.3 else 0.4,
        p_holm=0.004 if abs(apart) > 0.3 else 1.0,
        test="mcnemar",
        num_samples=100,
    )
