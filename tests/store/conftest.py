"""A ledger of two nightly runs, small enough to know every answer by heart."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet
import pytest

import store.recording
from meteora.artifacts import (
    AdapterModule,
    AdapterSpec,
    ArtifactId,
    BaseSpec,
    BenchmarkSpec,
    ComparisonBuild,
    ComparisonSpec,
    Difference,
    FusedSpec,
    MergeSpec,
    PoolBuild,
    PoolShare,
    PoolSpec,
    Publication,
    Rate,
    Reason,
    RouterBuild,
    RouterSpec,
    RoutingBuild,
    RoutingScore,
    RoutingSpec,
    Score,
    ScorePair,
    ScorePart,
    ScoreTurn,
    SpeedBuild,
    SpeedSpec,
    file_sha256,
)
from meteora.artifacts.scores import Abstention
from store.events import AdapterVerdict, Failure, RunEnded, RunStarted
from store.ledger import Ledger
from store.query import LIMITS, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from meteora.artifacts import Spec

ROOT = Path(__file__).parents[2]
HOSTILE = "x'); DROP TABLE scores; --"
COMMIT = "c0ffee" + "0" * 34
BASE = BaseSpec("tiny/base", COMMIT)


def adapter(number: int) -> AdapterSpec:
    modules = tuple(
        AdapterModule(f"model.layers.{layer}.self_attn.q_proj", 8, 8, 4 * number, 8.0, 2.0)
        for layer in range(2)
    )
    return AdapterSpec(f"{number:064x}", "tiny/base", False, "F16", modules)


TURNS = (ScoreTurn(1, 0.9, 40.0, 40.0, 5.0, 0.25), ScoreTurn(2, 0.5, 80.0, 35.0, 6.0, 0.5))


def fused(*adapters: AdapterSpec) -> FusedSpec:
    names = tuple(f"expert-{number}" for number, _ in enumerate(adapters))
    return FusedSpec(BASE.id, names, tuple(spec.id for spec in adapters))


def router(of: FusedSpec, seed: int = 0) -> RouterSpec:
    return RouterSpec(of.id, "gate", 1, 1.0, "calibrate", "e" * 64, seed)


def benchmark(subject_id: ArtifactId, task: str, seed: int = 0) -> BenchmarkSpec:
    return BenchmarkSpec(
        subject_id=subject_id,
        task=task,
        rows_sha256="f" * 64,
        metric="exact_match",
        num_fewshot=0,
        max_new_tokens=64,
        seed=seed,
        base_id=BASE.id,
    )


def score(spec: BenchmarkSpec, value: float, outputs_sha256: str) -> Score:
    return Score(
        spec=spec,
        value=value,
        stderr=0.02,
        low=value - 0.04,
        high=value + 0.04,
        num_samples=100,
        outputs_sha256=outputs_sha256,
        harness="lm-eval 0.4.13",
        wall_seconds=1.5,
    )


def write_segment(root: Path, texts: dict[str, str]) -> Path:
    """Write a segment with any texts under any names, and name it by its bytes."""
    root.mkdir(parents=True, exist_ok=True)
    named = dict.fromkeys(("sha256", "kind", "subject", "text"), pyarrow.string())
    rows = [
        {"sha256": sha256, "kind": "artifact", "subject": "", "text": text}
        for sha256, text in texts.items()
    ]
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(named))
    pyarrow.parquet.write_table(table, root / "new")
    return (root / "new").rename(root / f"{file_sha256(root / 'new')}.parquet")


@dataclass
class Shelf:
    """A ledger, short ways to fill it, and the specs that it is filled with."""

    home: Path
    hostile = HOSTILE
    base = BASE
    adapter = staticmethod(adapter)
    fused = staticmethod(fused)
    router = staticmethod(router)
    benchmark = staticmethod(benchmark)
    score = staticmethod(score)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.home)

    def make(self, spec: Spec, weights: str = "", run_id: str = "r1") -> ArtifactId:
        blob = self.ledger.blobs.put_bytes((weights or spec.id).encode())
        return self.ledger.record_artifact(spec, weights_sha256=blob, blobs=[blob], run_id=run_id)

    def measure(
        self,
        subject: Spec,
        task: str,
        value: float,
        run_id: str = "r1",
        turns: tuple[ScoreTurn, ...] = (),
    ) -> Score:
        blob = self.ledger.blobs.put_bytes(f"{subject.id} {task}".encode())
        measured = replace(score(benchmark(subject.id, task), value, blob), turns=turns)
        self.ledger.record_score(measured, run_id=run_id)
        return measured

    def views(self) -> dict[str, list[tuple]]:
        """Every row of every view and table but the bookkeeping, in one order."""
        with opened(self.ledger.index.snapshot, LIMITS.memory_bytes) as connection:
            names = connection.execute(
                "SELECT DISTINCT name FROM dictionary"
                " WHERE name NOT IN ('migrations', 'read_files') ORDER BY ALL"
            ).fetchall()
            return {name: connection.table(name).order("ALL").fetchall() for (name,) in names}


@pytest.fixture
def make_shelf(tmp_path: Path) -> Callable[[str], Shelf]:
    return lambda name: Shelf(tmp_path / name)


@pytest.fixture
def shelf(make_shelf: Callable[[str], Shelf]) -> Shelf:
    return make_shelf("home")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of `filled`, made once."""
    seconds = itertools.count()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            store.recording, "now", lambda: str(start + timedelta(seconds=next(seconds)))[:19] + "Z"
        )
        shelf = Shelf(tmp_path_factory.mktemp("template") / "home")
        fill(shelf)
    shelf.ledger.ingest()
    return shelf.home


@pytest.fixture(scope="session")
def asked(template: Path) -> Shelf:
    """The same home for everybody who only reads."""
    return Shelf(template)


@pytest.fixture(scope="session")
def views_of_filled(asked: Shelf) -> dict[str, list[tuple]]:
    """What `filled` holds before anything happens to it."""
    return asked.views()


@pytest.fixture
def filled(template: Path, tmp_path: Path) -> Shelf:
    """Two nights of one recipe, ingested; the second night's model is worse at sorting."""
    shutil.copytree(template, tmp_path / "home")
    return Shelf(tmp_path / "home")


def fill(shelf: Shelf) -> None:
    ledger = shelf.ledger
    experts = adapter(1), adapter(2)
    stack = fused(*experts)
    for night in (1, 2):
        run_id = f"r{night}"
        ledger.record_run(RunStarted(run_id, "nightly", "9" * 64, {"torch": "2.13.0"}, "cpu"))
        shelf.make(BASE, run_id=run_id)
        for number, spec in enumerate(experts):
            shelf.make(spec, run_id=run_id)
            verdict = AdapterVerdict(
                name=f"expert-{number}",
                source=f"someone/lora-{number}@main",
                repo_id=f"someone/lora-{number}",
                revision=COMMIT,
                verdict="accept",
                licence=("mit", "apache-2.0")[number],
                author="someone",
                adapter_id=spec.id,
            )
            ledger.record_adapter(verdict, run_id=run_id)
        shelf.make(stack, run_id=run_id)
        gates = router(stack, seed=night)
        build = RouterBuild(gates, f"{night:064x}", 5012, 0.93, 12.5, "cpu")
        ledger.record_artifact(
            gates, weights_sha256=build.weights_sha256, built=build, run_id=run_id
        )
        for task, base, oracle, routed in (
            ("parentheses", 0.10, 0.80, 0.75),
            ("sorting", 0.05, 0.90, 0.88 if night == 1 else 0.70),
        ):
            shelf.measure(BASE, task, base, run_id)
            shelf.measure(experts[task == "sorting"], task, oracle, run_id)
            turns = TURNS if (task, night) == ("sorting", 2) else ()
            shelf.measure(gates, task, routed, run_id, turns)
        compare(shelf, gates, experts[1], run_id)
        deal(shelf, gates, run_id)
        ledger.record_routing(
            [
                RoutingScore(
                    gates.id, f"model.layers.{layer}.self_attn.q_proj", truth, chosen, count
                )
                for layer in range(2)
                for truth, chosen, count in (
                    ("expert-0", "expert-0", 90),
                    ("expert-0", "expert-1", 10),
                    ("expert-1", "expert-1", 60),
                )
            ],
            run_id=run_id,
        )
        watched = RoutingSpec(gates.id, "5" * 64)
        told = Abstention(30, 20, 0.05, 0.75, 0.987) if night == 2 else None
        shelf.ledger.record_artifact(
            watched,
            weights_sha256="",
            built=RoutingBuild(watched, 0.9, (), 260, 1.0, abstention=told),
            run_id=run_id,
        )
        ledger.record_run(RunEnded(run_id, "ok", "", 60.0 * night, {"stack": 1.0, "fit": 50.0}))
    ledger.record_publication(Publication(gates.id, "someone/model", COMMIT), run_id="r2")
    reasons = (Reason("E_DORA", "it uses DoRA, which cannot be stacked"),)
    ledger.record_adapter(
        AdapterVerdict(HOSTILE, HOSTILE, "evil/lora", COMMIT, "refuse", reasons), run_id="r3"
    )
    ledger.record_run(RunStarted("r3", "nightly", "9" * 64, {}, "cpu"))
    ledger.record_failure(Failure("check", HOSTILE, "AdapterError", "it uses DoRA"), run_id="r3")


def deal(shelf: Shelf, gates: RouterSpec, run_id: str) -> None:
    """A pool of prompts, dealt to the experts of a stack."""
    pool = PoolSpec(gates.fused_id, "7" * 64, 64)
    labels = shelf.ledger.blobs.put_bytes(b"labels")
    shares = PoolShare("expert-0", 30, 2, 1.5, 0.7), PoolShare("", 12, 3, 0.1, 0.2)
    made = PoolBuild(pool, labels, shares, 60.0, "cpu")
    shelf.ledger.record_artifact(
        pool, weights_sha256=labels, built=made, blobs=[labels], run_id=run_id
    )


def compare(shelf: Shelf, gates: RouterSpec, oracle: AdapterSpec, run_id: str) -> None:
    """A comparison, a timing, and a merge that was asked composites."""
    own, other = (benchmark(subject.id, "sorting").id for subject in (gates, oracle))
    spec = ComparisonSpec(gates.id, "fused", "oracle", (ScorePair(own, other),))
    drop = -0.02 if run_id == "r1" else -0.2
    found = Difference(
        "sorting", "exact_match", own, other, drop, drop - 0.05, drop + 0.05,
        0.4 if run_id == "r1" else 0.001, 0.4 if run_id == "r1" else 0.001, "mcnemar", 100,
    )  # fmt: skip
    made = ComparisonBuild(spec, (found,), drop, drop - 0.05, drop + 0.05)
    shelf.ledger.record_artifact(spec, weights_sha256="", built=made, run_id=run_id)

    speed = SpeedSpec(gates.id, BASE.id, 256, 64, 1, 5)
    rates = (
        Rate("prefill", 2000.0, 1800.0, 1.11, 1.09, 1.13),
        Rate("decode", 40.0, 33.0, 1.21, 1.2, 1.22),
    )
    timed = SpeedBuild(speed, rates, 10**9, 10**8, 10**6, None, 10**7, "cpu", 1, "float32", 9.0)
    shelf.ledger.record_artifact(speed, weights_sha256="", built=timed, run_id=run_id)

    merge = MergeSpec(gates.fused_id, "ties", 1.0, 0.2)
    shelf.ledger.record_artifact(merge, weights_sha256="", run_id=run_id)
    parts = (ScorePart("sorting", 0.4, 20, 19), ScorePart("parentheses", 0.2, 20, 15))
    outputs = shelf.ledger.blobs.put_bytes(b"composites")
    composites = score(benchmark(merge.id, "composite-2"), 0.3, outputs)
    shelf.ledger.record_score(
        replace(composites, parts=parts, interval="bootstrap", num_truncated=3), run_id=run_id
    )


PIPE_BYTES = 1 << 20
"""Room for what a worker says in ten minutes: a test may listen only when they are over."""


@pytest.fixture
def worker() -> Generator[Callable[..., subprocess.Popen[str]], None, None]:
    """Start `worker.py` with these arguments; its standard output is a pipe."""
    with ExitStack() as started:

        def start(*arguments: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.store.worker", *map(str, arguments)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                pipesize=PIPE_BYTES,
                text=True,
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start
