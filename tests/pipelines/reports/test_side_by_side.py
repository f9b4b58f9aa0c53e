"""Two checkpoints side by side: what differs is shown, and tested over the rows of both."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from operator import mul
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import lxml.html
import pytest

from meteora.artifacts import (
    AdapterModule,
    AdapterSpec,
    ArtifactId,
    BaseSpec,
    BenchmarkSpec,
    BuiltBase,
    ComparisonSpec,
    Fingerprint,
    FusedSpec,
    RouterBuild,
    RouterSpec,
    Score,
    ScorePair,
    ScoreTurn,
)
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    BaseEntry,
    ExpertEntry,
    Manifest,
    ModuleEntry,
)
from pipelines.evaluation.measurements import Measurement
from pipelines.reports.queries import ReportError
from pipelines.reports.report import comparison_page
from pipelines.reports.side_by_side import SideBySide, compare_checkpoints
from pipelines.scoring.compare import compare, recorded_scores, scores_in_common
from pipelines.scoring.outputs import write_outputs
from pipelines.stages.measure import _note_untested
from store.events import RunStarted
from store.ledger import Ledger
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.reports.html_reader import Elements, drawings_at
from tests.pipelines.reports.report_ledger import HOSTILE

if TYPE_CHECKING:
    from pathlib import Path

    from selenium import webdriver

    from pipelines.planning.plan import Plan

RUN, COMMIT = "run-1", "c0ffee" + "0" * 34
BASE = BaseSpec("tiny/base", COMMIT)
SIZES = Fingerprint("LlamaForCausalLM", 32, 48, 2, 4, 4, 259, "f" * 64)
MODULE = AdapterModule("model.layers.0.q_proj", 32, 32, 8, 16.0, 2.0)
ONE, TWO, THREE = (
    AdapterSpec(f"{n:064x}", "tiny/base", False, "F16", (MODULE,)) for n in (1, 2, 3)
)
RIGHT = {"dates": (30, 38), HOSTILE: (20, 20), "sums": (35, 20)}
"""How many of 40 rows A and B have right; those of the smaller number are among the larger's."""


def router_of(ledger: Ledger, experts: dict[str, AdapterSpec], top_k: int = 1) -> RouterSpec:
    fused = FusedSpec(BASE.id, tuple(experts), tuple(one.id for one in experts.values()))
    router = RouterSpec(fused.id, "gate", top_k, 1.0)
    for spec in (fused, router):
        built = RouterBuild(router, "b" * 64, 12, 0.9, 12.5, "cpu") if spec is router else None
        ledger.record_artifact(spec, weights_sha256="b" * 64, built=built, run_id=RUN)
    return router


def write_checkpoint(
    folder: Path, router: RouterSpec, experts: dict[str, AdapterSpec], num_bytes: int
) -> Path:
    folder.mkdir()
    (folder / EXPERTS).write_bytes(bytes(num_bytes))
    entries = tuple(
        ExpertEntry(name, one.id, "someone/lora", COMMIT, one.weights_sha256, "mit", "8")
        for name, one in experts.items()
    )
    module = ModuleEntry(32, 32, (8,) * len(experts), (2.0,) * len(experts))
    manifest = Manifest(
        BaseEntry(BASE.base_model, BASE.base_revision, SIZES), entries,
        {MODULE.path: module}, router.options, fused_id=router.fused_id,
        router_id=router.id, files={EXPERTS: "b" * 64, GATES: "b" * 64},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def measure(
    ledger: Ledger, router: RouterSpec, task: str, values: list[float], rows: str = "f", **more: Any
) -> None:
    """Record a score with the value of every row, as a benchmark does."""
    begin, metric = (
        more.pop("begin", ""),
        more.pop("metric", "conversation_right" if "turns" in more else "exact_match"),
    )
    spec = BenchmarkSpec(router.id, task, rows * 64, metric, 0, 64, 0, BASE.id)
    path = ledger.home / "outputs.parquet"
    prompts = [f"{begin}{number}" for number in range(len(values))]
    rows_of = zip(prompts, values, strict=True)
    write_outputs([{"prompt": one, metric: value, "of": spec.id} for one, value in rows_of], path)
    mean = sum(values) / len(values)
    outputs = ledger.blobs.put(path, move=True)
    ledger.record_score(
        Score(spec, mean, 0.02, mean - 0.1, mean, len(values), outputs, "lm-eval", 1.5, **more),
        run_id=RUN,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Path, Path]:
    """A ledger with two routers, and the folders of both."""
    home = tmp_path_factory.mktemp("pair")
    ledger = Ledger(home)
    ledger.record_run(RunStarted(RUN, "both", "9" * 64, {}, "cpu"))
    built = BuiltBase(BASE, "a" * 64, SIZES, ())
    ledger.record_artifact(BASE, weights_sha256="a" * 64, built=built, run_id=RUN)
    for adapter in (ONE, TWO, THREE):
        ledger.record_artifact(adapter, weights_sha256=adapter.weights_sha256, run_id=RUN)
    before = {"dates": ONE, "sums": TWO, "gone": THREE}
    after = {"dates": ONE, "sums": THREE}
    a = router_of(ledger, before)
    b = router_of(ledger, after, top_k=2)
    for task, counts in RIGHT.items():
        for router, count in zip((a, b), counts, strict=True):
            measure(ledger, router, task, [1.0] * count + [0.0] * (40 - count))
    for router, value in ((a, 0.25), (b, 0.75)):  # a second metric of the first task
        measure(ledger, router, "dates", [value] * 40, metric="rougeL")
    measure(ledger, a, "sums", [1.0] * 40, metric="rougeL")  # which B does not have
    for router, values in ((a, (0.25, 0.5)), (b, (0.75, 0.5))):
        turns = tuple(
            ScoreTurn(n, value, 60.0, 30.0, 8.0, 0.25) for n, value in enumerate(values, 1)
        )
        measure(ledger, router, "conversation-2", [sum(values) / 2] * 10, turns=turns)
    measure(ledger, a, "words", [1.0] * 4)
    measure(ledger, b, "words", [1.0] * 4, rows="e")  # the same task, and other rows
    measure(ledger, a, "gone", [1.0] * 4)
    return (
        ledger,
        write_checkpoint(home / "a", a, before, 1_200_000),
        write_checkpoint(home / "b", b, after, 3_400_000),
    )


@pytest.fixture(scope="module")
def found(pair: tuple[Ledger, Path, Path]) -> SideBySide:
    return compare_checkpoints(*pair)


def two_routers(home: Path) -> tuple[Ledger, RouterSpec, RouterSpec]:
    """A ledger with two routers over one adapter."""
    ledger = Ledger(home)
    ledger.record_run(RunStarted(RUN, "both", "9" * 64, {}, "cpu"))
    for spec in (BASE, ONE):
        ledger.record_artifact(spec, weights_sha256="a" * 64, run_id=RUN)
    a, b = router_of(ledger, {"dates": ONE}), router_of(ledger, {"dates": ONE}, top_k=2)
    return ledger, a, b


def test_where_lower_is_better_a_difference_counts_the_other_way(tmp_path: Path) -> None:
    ledger, a, b = two_routers(tmp_path)
    for router, values in ((a, (0.5, 0.75)), (b, (0.75, 0.5))):
        measure(ledger, router, "dates", [values[0]] * 9)
        measure(ledger, router, "errors", [values[1]] * 9, higher_is_better=False)
    ledger.ingest()
    pairs = scores_in_common(ledger, b.id, a.id, BASE.id).values()
    chosen = tuple(ScorePair(one.spec.id, other.spec.id) for ((one, other),) in pairs)
    found = compare(ledger, ComparisonSpec(b.id, "B", "A", chosen))
    assert [one.difference for one in found.differences] == [0.25, -0.25]
    assert found.mean_difference == 0.25
    first = found.differences[0]  # the second is its mirror image
    assert (found.high - 0.25) * math.sqrt(2) == pytest.approx(first.high - 0.25)
    assert (0.25 - found.low) * math.sqrt(2) == pytest.approx(0.25 - first.low)


def test_a_test_asks_how_often_random_signs_would_differ_as_much(tmp_path: Path) -> None:
    """Of rows that are right or wrong, and of those that may be partly right."""
    ledger, a, b = two_routers(tmp_path)
    apart = {"mcnemar": [1.0, 1.0, 1.0, 1.0, -1.0, 0.0], "sign-flip": [0.25, 0.5, 0.75, -0.125]}
    for test, values in apart.items():
        measure(ledger, a, test, [0.0 if value >= 0 else -value for value in values])
        measure(ledger, b, test, [max(value, 0.0) for value in values])
    ledger.ingest()
    pairs = scores_in_common(ledger, b.id, a.id, BASE.id).values()
    chosen = tuple(ScorePair(one.spec.id, other.spec.id) for ((one, other),) in pairs)
    for one in compare(ledger, ComparisonSpec(b.id, "B", "A", chosen)).differences:
        values = apart[one.task]
        sums = [abs(sum(map(mul, signs, values))) for signs in product((1, -1), repeat=len(values))]
        as_much = sum(found >= abs(sum(values)) - 1e-9 for found in sums)
        assert (one.test, one.p_value) == (one.task, pytest.approx(as_much / len(sums)))


def test_scores_on_other_prompts_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a task of lm-eval's own, before and after lm-eval or the data set changed. The date in
    a chat template is no other prompt."""
    ledger, a, b = two_routers(tmp_path)
    for router, begin, day in ((a, "old ", 29), (b, "new ", 30)):
        measure(ledger, router, "same", [1.0] * 4, begin=f"Today Date: {day} Nov 2026. ")
        measure(ledger, router, "other", [1.0] * 4, begin=begin)
        measure(ledger, router, "more", [1.0] * (3 if router is a else 4))
    ledger.ingest()
    assert [*scores_in_common(ledger, b.id, a.id, BASE.id)] == ["same"]
    of_b, of_a = (recorded_scores(ledger, router.id) for router in (b, a))
    pairs = tuple(
        ScorePair(one.spec.id, other.spec.id) for one, other in zip(of_b, of_a, strict=True)
    )
    found = compare(ledger, ComparisonSpec(b.id, "fused", "base", pairs))
    assert [one.task for one in found.differences] == ["same"]
    alone = compare(ledger, ComparisonSpec(b.id, "fused", "base", pairs[1:]))
    assert (alone.differences, alone.mean_difference) == ((), 0.0)
    measured = SimpleNamespace(measurements=[Measurement("fused", "", one.spec) for one in of_b])
    _note_untested(cast("Plan", measured), found)
    assert "other, more: fused and base were asked other prompts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(found: SideBySide) -> str:
    return comparison_page(found)


def test_scores_on_the_same_rows_are_tested_against_each_other(found: SideBySide) -> None:
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["dates", "dates: rougeL", HOSTILE, "sums", "conversation-2"]
    raw = {}
    for task, (a, b) in RIGHT.items():
        one = rows[task].difference
        assert (rows[task].a.value, rows[task].b.value) == (a / 40, b / 40)
        assert one.difference == pytest.approx((b - a) / 40)
        assert one.low < one.difference < one.high
        assert one.test == "mcnemar"
        apart = abs(a - b)  # all of these rows go one way: the exact test is a coin's
        raw[task] = min(1.0, 2 * math.comb(apart, 0) / 2**apart)
        assert one.p_value == pytest.approx(raw[task])
    p_values = sorted(row.difference.p_value for row in rows.values())
    place = p_values.index(rows["dates"].difference.p_value)  # over all five lines
    assert rows["dates"].difference.p_holm == pytest.approx((5 - place) * raw["dates"], rel=1e-6)
    assert [row.mark for row in rows.values()] == ["+", "+", "", "-", "+"]
    assert rows["dates: rougeL"].difference.difference == pytest.approx(0.5)
    assert found.build is not None
    del rows["dates: rougeL"]  # the mean is over tasks
    mean = sum(row.difference.difference for row in rows.values()) / 4
    assert found.build.mean_difference == pytest.approx(mean)
    assert found.unmeasured == {"A": ["words"], "B": ["words", "gone"]}


def test_what_differs_in_experts_and_options_is_named(found: SideBySide) -> None:
    source = f"someone/lora@{COMMIT[:16]} of rank 8"
    assert [tuple(one) for one in found.experts] == [
        ("dates", 1, 1, ""),
        ("sums", 2, 2, f"another adapter: {source}, then {source}"),
        ("gone", 3, None, "only in A; the other calls the same adapter sums"),
    ]
    assert found.options == [("top_k", 1, 2)]
    assert ("experts.safetensors", ["1.2 MB", "3.4 MB"]) in found.costs
    assert ("time: fit", ["12.5 s", "12.5 s"]) in found.costs


def test_the_page_has_it_all_and_asks_for_nothing(found: SideBySide, page: str) -> None:
    tree = lxml.html.fromstring(page)
    text = " ".join(tree.text_content().split())
    assert "B is better than A, beyond chance, on dates, dates: rougeL, conversation-2." in text
    assert "B is worse than A, beyond chance, on sums." in text
    assert "A was not asked the rows of words that the other one was asked." in text
    assert found.build is not None
    interval = f"[{found.build.low:.3f}, {found.build.high:.3f}]"
    assert f"with the 95 % interval {interval}, from those of the tasks (MOVER)." in text
    for row in found.rows:
        assert f"{row.difference.difference:+.3f} [{row.difference.low:+.2f}, " in text
    (table,) = tree.xpath(
        "//h3[text()='Conversations turn by turn']/following-sibling::div[1]//table"
    )
    cells = [
        [cell.text_content() for cell in row.xpath("./td")] for row in table.xpath(".//tr[td]")
    ]
    assert cells == [["A", "0.25", "0.50", "60", "0.50"], ["B", "0.75", "0.50", "60", "0.50"]]
    elements = Elements(page)
    assert elements.requests() == elements.handlers() == []
    assert elements.count("img") == 0
    assert elements.count("script") == 1
    assert "://" not in page
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))


def test_the_sql_on_the_page_gives_the_numbers_on_the_page(
    pair: tuple[Ledger, Path, Path], page: str
) -> None:
    disclosures = lxml.html.fromstring(page).xpath("//details[@class='sql']")
    assert {"sql-A-scores", "sql-B-scores"} <= {one.get("id") for one in disclosures}
    for one in disclosures:
        answer = pair[0].query(one.xpath("./pre")[0].text_content())
        assert len(one.xpath(".//tbody/tr")) == len(answer.rows)


def test_the_terminal_has_a_table_and_json(pair: tuple[Ledger, Path, Path], tmp_path: Path) -> None:
    ledger, a, b = pair
    out = tmp_path / "both.html"
    said = done("report", a, b, "-o", out, "--home", ledger.home)
    assert re.search(r"dates +40 +0\.750 +0\.950 +\+0\.200 \+ +0\.01", said.stdout)
    assert re.search(r"sums +40 +0\.875 +0\.500 +-0\.375 - ", said.stdout)
    assert re.search(r"top_k +1 +2", said.stdout)
    assert said.stdout.splitlines()[-1] == str(out)
    assert out.read_text().startswith("<!doctype html>")
    body = json.loads(ask("report", a, b, "-o", out, "--json", "--home", ledger.home).stdout)
    assert body["page"] == str(out)
    assert {(one["task"], one["metric"]): one["differs"] for one in body["scores"]} == {
        ("dates", "exact_match"): "+", ("dates", "rougeL"): "+", (HOSTILE, "exact_match"): "",
        ("sums", "exact_match"): "-", ("conversation-2", "conversation_right"): "+",
    }  # fmt: skip
    assert body["a"]["experts"] == ["dates", "sums", "gone"]
    assert body["options"] == [{"name": "top_k", "a": 1, "b": 2}]


def test_what_cannot_be_compared_gets_one_sentence(
    pair: tuple[Ledger, Path, Path], tmp_path: Path
) -> None:
    ledger, a, b = pair
    with pytest.raises(ReportError, match="are the same checkpoint, router:"):
        compare_checkpoints(ledger, a, a)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    body = json.loads((b / MANIFEST).read_text())
    (nameless / MANIFEST).write_text(json.dumps(body | {"router_id": ""}))
    with pytest.raises(ReportError, match="names no router"):
        compare_checkpoints(ledger, a, nameless)
    said = ask("report", a, b, "-o", tmp_path / "missing" / "x.html", "--home", ledger.home)
    assert said.returncode == 1
    assert "cannot be written" in said.stderr


def test_a_checkpoint_that_was_not_measured_is_compared_all_the_same(
    pair: tuple[Ledger, Path, Path], tmp_path: Path
) -> None:
    ledger, a, _ = pair
    strange = RouterSpec(ArtifactId("fused:" + "0" * 64), "norm", 1, 1.0)
    folder = write_checkpoint(tmp_path / "strange", strange, {"dates": ONE}, 10)
    found = compare_checkpoints(ledger, a, folder)
    assert (found.rows, found.build) == ((), None)
    text = " ".join(lxml.html.fromstring(comparison_page(found)).text_content().split())
    assert "There is no task that both were asked with the same rows." in text
    assert "not recorded here" in text
    assert "The routing of neither was measured." in text
    assert ("kind", "gate", "norm") in found.options


@pytest.mark.browser
@pytest.mark.parametrize(("width", "kind"), [(1400, "wide"), (390, "narrow")])
def test_the_page_fits_a_desk_and_a_phone(
    browser: webdriver.Chrome, page: str, tmp_path: Path, width: int, kind: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    # three metrics of scores and of differences, and the turns
    assert drawings_at(browser, path, width) == [kind] * 7
