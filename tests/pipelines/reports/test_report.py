"""The report shows what the ledger says, all of it, and nothing of what names try to do."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lxml.html
import pytest

from meteora.artifacts import (
    NULL,
    SHARED,
    ArtifactId,
    RoutingBuild,
    RoutingScore,
    RoutingSpec,
    RoutingSwitch,
)
from pipelines.reports import charts, queries, report
from pipelines.reports.examples import Example, find_examples
from pipelines.reports.lineage import lineage_graph
from pipelines.reports.svg import LEGEND_ROW
from pipelines.scoring.outputs import write_outputs
from store.ledger import Ledger
from store.query import Answer
from tests.pipelines.reports import report_ledger
from tests.pipelines.reports.html_reader import Elements, drawings_at, resize
from tests.pipelines.reports.report_ledger import ARROW, BASE, COUNTS, GATE, HOSTILE, NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from selenium import webdriver


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    home = tmp_path_factory.mktemp("home")
    report_ledger.fill(home)
    return Ledger(home)


@pytest.fixture(scope="module")
def results(ledger: Ledger) -> dict[str, queries.QueryResult]:
    return queries.run_queries(ledger, GATE.id)


@pytest.fixture
def copied(ledger: Ledger, tmp_path: Path) -> Path:
    """The same home, for more records."""
    return shutil.copytree(ledger.home, tmp_path / "home")


@pytest.fixture(scope="module")
def page(results: dict[str, queries.QueryResult]) -> str:
    return report.report_page(results)


@pytest.fixture(scope="module")
def tree(page: str) -> Any:
    return lxml.html.fromstring(page)


def shown(table: Any) -> list[list[object]]:
    """The cells of a table as the ledger would give them: numbers whole, text as text."""
    rows = []
    for row in table.xpath("./tbody/tr"):
        cells: list[object] = []
        for cell in row.xpath("./td"):
            number = cell.xpath("./data/@value")
            cells.append(json.loads(number[0]) if number else cell.text_content())
        rows.append(cells)
    return rows


def test_every_query_has_rows(results: dict[str, queries.QueryResult]) -> None:
    assert all(one.rows for one in results.values())
    assert results["overall"].rows[0]["accuracy"] == pytest.approx(200 / 240)
    assert [row["name"] for row in results["experts"].rows] == list(NAMES)
    asked = [row["task"] for row in results["outputs"].rows]  # composites have two metrics
    assert sorted(asked) == sorted({*NAMES, "composite-3", "conversation-3"})
    assert results["switches"].answer.rows == [
        (0, 6, 8, 0.6, 1.0),
        (2, 3, 0, 0.9, 1.0),
        (None, 1, 0, 1.0, 1.0),
    ]


def test_a_router_that_sends_every_token_elsewhere_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_ledger, "COUNTS", {("dates", "sums"): 9, ("sums", "dates"): 9})
    report_ledger.fill(tmp_path)
    found = queries.run_queries(Ledger(tmp_path), GATE.id)
    assert [row["accuracy"] for row in (*found["overall"].rows, *found["accuracy"].rows)] == [0] * 3
    assert ">0.0 %</a>" in report.report_page(found)


@pytest.mark.parametrize("in_answer", [False, True])
def test_switches_of_one_kind_alone_are_one_line(copied: Path, in_answer: bool) -> None:
    """A share of no switches is nothing to draw."""
    spec = RoutingSpec(GATE.id, "d" * 64)
    seen = (RoutingSwitch("dates", in_answer, 0, 6), RoutingSwitch("sums", in_answer, None, 2))
    built = RoutingBuild(spec, 1.0, (), 9, 1.0, switches=seen)
    ledger = Ledger(copied)
    ledger.record_artifact(spec, weights_sha256="", built=built, run_id=report_ledger.RUN)
    found = queries.run_queries(ledger, GATE.id)
    shares = [(row["question_share"], row["answer_share"]) for row in found["switches"].rows]
    assert shares == ([(None, 0.75), (None, 1.0)] if in_answer else [(0.75, None), (1.0, None)])
    assert "Tokens until routing switches" in report.report_page(found)


def test_what_was_measured_twice_is_reported_once(
    copied: Path, results: dict[str, queries.QueryResult]
) -> None:
    """Of several askings the last one: neither sums nor a second line for each system."""
    report_ledger.measure_again(copied)
    twice = queries.run_queries(Ledger(copied), GATE.id)
    assert {n: len(one.rows) for n, one in twice.items()} == {
        n: len(one.rows) for n, one in results.items()
    }
    for name in ("matrix", "composites", "conversations", "parts", "details", "switches"):
        assert twice[name].rows == results[name].rows, name
    (dates,) = [
        row["value"]
        for row in twice["scores"].rows
        if (row["task"], row["system"]) == ("dates", "fused")
    ]
    assert dates == 0.8
    (oracle, _) = queries.compare_systems(twice["differences"].rows)
    assert (oracle.other, oracle.num_tasks, oracle.num_rows) == ("oracle", 3, 300)
    assert oracle.mean == pytest.approx((0.8 - 0.95 - 0.95 + 0.4 - 0.95) / 3)


def test_means_are_over_tasks_that_the_same_systems_were_asked(
    copied: Path, results: dict[str, queries.QueryResult]
) -> None:
    """A task that as many others were asked is no part of them."""
    report_ledger.ask_others(copied)
    more = queries.run_queries(Ledger(copied), GATE.id)
    assert more["means"].rows == results["means"].rows


def test_a_mean_is_of_the_metric_that_comparisons_test(
    copied: Path, results: dict[str, queries.QueryResult]
) -> None:
    report_ledger.rate_again(copied)
    more = queries.run_queries(Ledger(copied), GATE.id)
    assert len(more["scores"].rows) == len(results["scores"].rows) + 3
    assert more["means"].rows == results["means"].rows


def test_a_task_that_is_tested_alone_stays_corrected_for_the_others(
    copied: Path, results: dict[str, queries.QueryResult]
) -> None:
    report_ledger.compare_alone(copied)
    more = queries.run_queries(Ledger(copied), GATE.id)
    assert more["differences"].rows == results["differences"].rows


def test_an_expert_without_rows_has_its_share_over_all_modules(copied: Path) -> None:
    """The second expert has tokens in one of two layers; the third has none, but is a choice."""
    ledger = Ledger(copied)
    counts = (0, "dates", 100), (1, "dates", 50), (1, "sums", 50)
    ledger.record_routing(
        [
            RoutingScore(ARROW.id, f"model.layers.{layer}.q_proj", "dates", chosen, count)
            for layer, chosen, count in counts
        ],
        run_id=report_ledger.RUN,
    )
    ledger.ingest()
    (found,) = queries.ask_queries(ledger, ARROW.id)["entropy"].rows
    sent = -sum(share * math.log2(share) for share in (0.75, 0.25))
    most = {"most_bits": math.log2(3), "num_choices": 3}
    assert found == pytest.approx({"own_bits": 0, "sent_bits": sent, **most})


@pytest.mark.parametrize(
    ("choice", "words"), [(NULL, "3 experts and the base"), (SHARED, "3 experts and their mean")]
)
def test_a_choice_beside_the_experts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, words: str
) -> None:
    monkeypatch.setattr(report_ledger, "COUNTS", COUNTS | {("dates", choice): 5})
    report_ledger.fill(tmp_path)
    page = report.report_page(queries.run_queries(Ledger(tmp_path), GATE.id))
    assert f" among {words} is at most 2.00 bits" in page


def test_a_share_of_nothing_covers_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "draw_wide_and_narrow", lambda draw, _name: draw(charts.WIDE))
    figure: Any = charts.dumbbell_plot([("a", 0.0, 0.1)], "x", labels=("a", "b"), xlabel="share")
    (axes,) = figure.axes
    left, zero = (axes.transData.transform((x, 0))[0] for x in (axes.get_xlim()[0], 0))
    assert zero - left > charts.MARKS["oracle"].size
    assert min(axes.get_xticks()) == 0


def test_long_names_differ_in_charts_and_cover_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "draw_wide_and_narrow", lambda draw, _name: draw(charts.WIDE))
    names = [f"an_adapter_of_somebody_on_the_hub_{n:02d}" for n in range(28)]
    values = {(name, name): 1.0 for name in names}
    figure: Any = charts.heat_map(names, names, values, "x", labels=("of", "to"))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    shown = axes.get_xticklabels()
    assert len({label.get_text() for label in shown}) == len(names)
    assert {len(label.get_text()) for label in shown} == {charts.LONGEST}
    assert not axes.texts  # 28 columns: colour alone
    bottom = figure.texts[0].get_window_extent().y0
    assert max(label.get_window_extent().y1 for label in shown) < bottom


def test_charts_show_names_as_they_are() -> None:
    """Also those that look like what is tidied in a drawing."""
    names = ["lr-0.0001", "lr-0.0002", "font: 9px", charts.PAPER, ' id="x_1"', "<g/>"]
    drawn = charts.heat_map(names, names, {}, "x", labels=("of", "to"))
    shown = lxml.html.fromstring(f"<div>{drawn}</div>").xpath("//text/text()")
    assert {name: shown.count(name) for name in names} == dict.fromkeys(names, 4)


def test_a_mean_over_tasks_is_of_how_much_better_a_model_is() -> None:
    lower = {"task": "errors", "difference": 0.3, "p_holm": 0.01, "higher_is_better": False}
    higher = lower | {"task": "sums", "difference": 0.1, "higher_is_better": True}
    chance = higher | {"task": "dates", "p_holm": 0.4}
    rows = [row | {"other": "base", "num_samples": 10} for row in (lower, higher, chance)]
    (found,) = queries.compare_systems(rows)
    assert (found.better, found.worse) == (("sums",), ("errors",))
    assert found.mean == pytest.approx(-0.1 / 3)


def test_the_sql_on_the_page_gives_the_numbers_on_the_page(ledger: Ledger, tree: Any) -> None:
    """Whoever copies a question out of the page and asks it gets each row, to the last digit."""
    disclosures = tree.xpath("//details[@class='sql']")
    assert {d.get("id") for d in disclosures} == {f"sql-{n}" for n, _, _ in queries.load_queries()}
    for disclosure in disclosures:
        (sql,) = disclosure.xpath("./pre")
        (table,) = disclosure.xpath(".//table")
        answer = ledger.query(sql.text_content())
        assert table.xpath("./thead//th/text()") == list(answer.columns)
        expected = [
            [
                cell
                if isinstance(cell, int | float) and not isinstance(cell, bool)
                else "–"
                if cell is None
                else str(cell)
                for cell in row
            ]
            for row in answer.rows
        ]
        assert shown(table) == expected, disclosure.get("id")


def test_every_link_to_a_query_has_its_target(tree: Any) -> None:
    targets = tree.xpath("//a[@class='num']/@href")
    assert len(targets) > 10
    assert {target[1:] for target in targets} <= set(tree.xpath("//@id"))


@pytest.mark.parametrize("kind", ["wide", "narrow"])
def test_the_forest_s_points_and_intervals_lie_where_the_scores_say(
    results: dict[str, queries.QueryResult], tree: Any, kind: str
) -> None:
    rows = [row for row in results["scores"].rows if row["metric"] != "composite_attempted"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    (svg,) = tree.xpath(f"//figure[@id='scores']//svg[@class='{kind}']")
    found, values = [], []
    for row in rows:
        name = f"{tasks.index(row['task'])}-{systems.index(row['system'])}"
        (point,) = svg.xpath(f".//g[@class='point-{name}']//use/@x")
        (path,) = svg.xpath(f".//g[@class='interval-{name}']//path/@d")
        start, end = (float(x) for x in re.findall(r"[ML] ([\d.]+)", path))
        found += [float(point), start, end]
        values += [row["value"], row["low"], row["high"]]
    # the axis is known by its two outermost numbers; every mark has to lie on it
    first, last = values.index(min(values)), values.index(max(values))
    per_unit = (found[last] - found[first]) / (values[last] - values[first])
    for x, value in zip(found, values, strict=True):
        assert x == pytest.approx(found[first] + per_unit * (value - values[first]), abs=0.01)


def test_a_long_legend_ends_above_the_plot() -> None:
    names = ["fused", "oracle", "base", "one_expert", "uniform", "arrow", "norm", "random"]
    scores = [
        {"task": "sums", "system": name, "value": 0.5, "low": 0.4, "high": 0.6}
        for name in [*names, "dare_ties"]
    ]
    chart = charts.forest_plot(scores, "score", "forest", signed=False)
    svg = lxml.html.fromstring(f"<div>{chart}</div>").xpath("//svg[@class='narrow']")[0]
    texts = {text.text_content(): float(text.get("y")) for text in svg.xpath(".//text[@y]")}
    assert texts["sums"] - texts["dare_ties"] > LEGEND_ROW


def test_the_heat_map_s_cells_are_as_deep_as_their_shares(tree: Any) -> None:
    (svg,) = tree.xpath("//figure[@id='confusion']//svg[@class='wide']")
    for (truth, chosen), count in COUNTS.items():
        share = count / sum(n for (other, _), n in COUNTS.items() if other == truth)
        cell = f"cell-{NAMES.index(truth)}-{NAMES.index(chosen)}"
        (style,) = svg.xpath(f".//g[@class='{cell}']/path/@style")
        depth = float(re.findall(r"opacity: ([\d.]+)", style + "; opacity: 1")[0])
        assert depth == pytest.approx(0.03 + 0.97 * share, abs=1e-3)
        assert "var(--accent)" in style
    assert not svg.xpath(".//g[@class='cell-2-1']")  # none were sent there


def test_shares_that_nobody_can_see_have_no_cell(results: dict[str, queries.QueryResult]) -> None:
    one, two = NAMES[:2]
    rows = [(one, one, 0.0004), (one, two, 0.0004), (two, one, 0.0006), (two, two, 0.9)]
    answer = Answer(("truth", "chosen", "share"), rows)
    changed = results | {"confusion": replace(results["confusion"], answer=answer)}
    drawn = str(report.draw_charts(changed)["confusion"])
    cells = {*re.findall(r"cell-\d-\d", drawn)}
    assert cells == {"cell-0-0", "cell-1-0", "cell-1-1"}  # an expert's own is always framed


def test_names_from_strangers_stay_text(page: str) -> None:
    elements = Elements(page)
    assert elements.count("img") == 0
    assert elements.count("script") == 1
    assert elements.handlers() == []
    assert "<!--" not in page  # a name could end a comment
    shown_as_text = [text for tag, text in elements.texts if HOSTILE in text]
    assert len(shown_as_text) > 10
    assert "onerror=alert" not in re.sub(r"&lt;/script&gt;&lt;img src=x onerror=alert", "", page)


def test_the_page_asks_for_nothing_and_is_small(page: str) -> None:
    elements = Elements(page)
    assert elements.requests() == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    outside = {a["href"] for tag, a in elements.found if tag == "a" and "://" in str(a.get("href"))}
    assert outside == {
        f"https://huggingface.co/{name}/tree/{report_ledger.COMMIT}"
        for name in ("tiny/base", "someone/dora", *(f"someone/lora-{n}" for n in (1, 2, 3)))
    }
    assert len(page.encode()) < 2_000_000


def test_refused_adapters_are_shown_with_their_reasons(
    results: dict[str, queries.QueryResult], tree: Any
) -> None:
    first, *taken = results["adapters"].rows
    assert (first["name"], first["verdict"], first["downloads"]) == ("found", "refuse", 7)
    assert first["reasons"] == f"use_dora is set; r is {HOSTILE}"
    assert {row["name"] for row in taken} == set(NAMES)
    text = " ".join(tree.text_content().split())
    assert "4 adapters, of which 1 was refused and left out." in text
    assert f"use_dora is set; r is {HOSTILE}" in text


def test_experts_without_examples_are_named(
    results: dict[str, queries.QueryResult], tree: Any
) -> None:
    gate_from = {row["name"]: row["gate_from"] for row in results["experts"].rows}
    assert gate_from == {"dates": "examples", HOSTILE: "norm", "sums": "examples"}
    assert results["router"].rows[0]["composites"] == [3]
    text = " ".join(tree.text_content().split())
    sentence = f"No examples were given for {HOSTILE}: tokens are routed to them by their weights"
    assert f"{sentence} (norm)" in text
    assert "calibrated on" in text


def test_no_two_elements_of_the_page_share_an_id(tree: Any) -> None:
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))


def test_claims_stand_with_their_numbers_and_the_model_with_its_id(
    results: dict[str, queries.QueryResult], tree: Any
) -> None:
    text = " ".join(tree.text_content().split())
    scores = [row for row in results["scores"].rows if row["system"] == "fused"]
    mixed = ("composite_", "conversation_")
    single, every = (
        {row["num_samples"] for row in scores if not row["metric"].startswith(names)}
        for names in (mixed, ())
    )
    assert single < every  # rows of prompts with several questions are in no mean
    shown = " to ".join(map(str, sorted({min(single), max(single)})))
    assert f"on which every system was measured, with {shown} rows each" in text
    pairs = results["overall"].rows[0]["num_pairs"]
    assert f"of all {pairs:,} (module, token) pairs" in text
    for one in queries.compare_systems(results["differences"].rows):
        assert one.num_rows >= one.num_tasks
    assert f"{GATE.id[:19]}, made on 20" in text
    assert f"meteora chat {GATE.id[:19]}" in text
    assert re.search(r"changes of subject followed, in answers \(of 8\) ?100 %", text)


def test_an_example_says_what_was_expected_and_whether_it_is_right() -> None:
    example = Example("sums", "1 + 1?", "2\n", templated=True, max_new_tokens=8, value=1.0)
    assert example.caption == "sums; expected: 2; ✓ right"
    assert replace(example, value=0.0).caption == "sums; expected: 2; ✗ wrong"
    assert replace(example, value=0.5).caption == "sums; expected: 2; 50% right"
    assert replace(example, value=None, reference="").caption == "sums"


def test_an_example_is_judged_by_its_task_s_first_metric(tmp_path: Path) -> None:
    metrics = {"rougeL": 0.5, "exact_match": 0.0}
    write_outputs([{"prompt": "p", "reference": "r", **metrics}], tmp_path / "outputs.parquet")
    ledger = Ledger(tmp_path / "home")
    sha256 = ledger.blobs.put(tmp_path / "outputs.parquet")
    row = {"task": "t", "outputs_sha256": sha256, "max_new_tokens": 8, "templated": True}
    row |= {"is_conversation": False, "system_prompt": "Be brief."}
    outputs = queries.QueryResult("outputs", "", "", Answer(tuple(row), [tuple(row.values())]))
    (example,) = find_examples(ledger, outputs, 1)
    assert example.caption == "t; expected: r; 50% right"
    assert (example.system_prompt, example.is_whole) == ("Be brief.", True)


def test_lines_of_one_colour_differ_and_no_axis_goes_beyond_one() -> None:
    thin = {f"kind {n}": [(0, 0.9), (9, 0.99)] for n in range(4)}
    drawn = str(
        charts.line_chart(
            {"all": [(0, 0.95), (9, 1.0)], **thin}, "x", xlabel="x", ylabel="y", strong="all"
        )
    )
    assert len(set(re.findall(r"stroke-dasharray: ?([^;\"]+)", drawn))) >= 3
    labels = re.findall(r">(\d\.\d+)<", drawn)
    assert labels
    assert all(float(label) <= 1 for label in labels)


def test_size_and_speed_say_of_what_they_are(tree: Any) -> None:
    text = " ".join(tree.text_content().split())
    assert re.search(r"Its experts and gates take ?13\.6 MB on disk and ?13\.0 MB in memory", text)


def test_a_loss_beyond_chance_is_stated_in_words(tree: Any) -> None:
    text = " ".join(tree.text_content().split())
    assert f"loses to oracle, beyond chance, on 2 of 3 tasks: {HOSTILE}, sums" in text


def test_prompts_that_are_nobodys_are_told_of_with_both_numbers(tree: Any) -> None:
    text = " ".join(tree.text_content().split())
    assert "The AUROC is 0.987: in this share of all pairs" in text
    assert "a prompt without an expert (20) and an expert" in text
    assert "s own (30), the base is more probable on the former" in text
    assert "mean probability is 0.75 on the former and 0.05 on the latter" in text


def test_what_was_not_measured_is_left_out(tmp_path: Path, ledger: Ledger) -> None:
    """The least that can be reported: a base, one expert, one score."""
    home = tmp_path / "home"
    shutil.copytree(ledger.home, home)
    bare = Ledger(home)
    results = queries.run_queries(
        bare, report_ledger.ARROW.id
    )  # scores, but never watched, nor compared
    for name in ("confusion", "details", "switches", "abstention", "differences", "speed"):
        assert results[name].rows == []
    page = report.report_page(results)
    assert "Speed and memory were not measured" in page
    assert "How long its making took is not recorded" in page or results["stages"].rows
    assert "changes of subject followed" not in page
    assert "Does each token reach its expert?" not in page
    assert "Paired tests were not recorded" in page
    assert "AUROC" not in page


def test_a_system_that_was_not_measured_is_not_explained(
    results: dict[str, queries.QueryResult],
) -> None:
    def kept(name: str, *systems: str) -> queries.QueryResult:
        answer = results[name].answer
        rows = [row for row in answer.rows if not set(systems).isdisjoint(row)]
        return replace(results[name], answer=replace(answer, rows=rows))

    alone = {name: kept(name, "fused") for name in ("scores", "conversations")}
    alone["differences"] = kept("differences")
    page = report.report_page(results | alone)
    assert "No other system was measured" in page
    assert "own adapter alone, chosen by hand" in report.report_page(results)
    for absent in ("own adapter alone, chosen by hand", "Oracle:", "Single:", "Swap:"):
        assert absent not in page


def test_a_router_without_scores_gets_one_sentence(tmp_path: Path, ledger: Ledger) -> None:
    nobody = ArtifactId("router:" + "0" * 64)
    with pytest.raises(queries.ReportError, match="holds no scores of router:000"):
        queries.run_queries(ledger, nobody)
    with pytest.raises(queries.ReportError, match="is not a routed model"):
        queries.run_queries(ledger, ArtifactId("router:x' OR true --"))
    with pytest.raises(queries.ReportError, match="holds no scores"):
        queries.run_queries(Ledger(tmp_path / "empty"), GATE.id)


def test_a_model_whose_base_has_lost_its_record_gets_one_sentence(copied: Path) -> None:
    records = copied.glob("records/??/*.json")
    (lost,) = (path for path in records if json.loads(path.read_text())["subject"] == BASE.id)
    lost.unlink()
    Ledger(copied).rebuild()
    with pytest.raises(queries.ReportError, match="lacks records of what router:"):
        queries.run_queries(Ledger(copied), GATE.id)


@pytest.mark.parametrize("kind", ["wide", "narrow"])
def test_the_lineage_s_arrows_lead_from_all_that_it_was_made_of(tree: Any, kind: str) -> None:
    """Base and adapters to the stack, and from there to router, checkpoint and scores."""
    (svg,) = tree.xpath(f"//figure[@id='lineage']//svg[@class='{kind}']")
    text = " ".join(svg.text_content().split())
    for shown in ("base", "1 dates", "3 sums", "stack", "router", GATE.id[7:19], "checkpoint"):
        assert shown in text
    boxes = []
    for number in range(8):
        (path,) = svg.xpath(f".//g[@class='node-{number}']/path/@d")
        corners = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
        boxes.append((*min(corners), *max(corners)))
    ends = []
    for number in range(7):
        line, *_ = svg.xpath(f".//g[@class='edge-{number}']/path/@d")
        points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)]
        ends.append((touched(boxes, points[0]), touched(boxes, points[-1])))
    assert ends == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 5), (5, 6), (6, 7)]


def touched(boxes: list[tuple[float, float, float, float]], point: tuple[float, float]) -> int:
    """The box whose edge a point is on, within the arrow's tip."""
    x, y = point
    (found,) = [
        number
        for number, (left, top, right, bottom) in enumerate(boxes)
        if left - 4 <= x <= right + 4 and top - 4 <= y <= bottom + 4
    ]
    return found


def test_of_many_adapters_the_first_are_drawn_and_the_others_counted(
    results: dict[str, queries.QueryResult],
) -> None:
    answer = results["experts"].answer
    rows = [(n + 1, f"expert_{n}", *answer.rows[0][2:]) for n in range(40)]
    many = replace(results["experts"], answer=replace(answer, rows=rows))
    drawn = str(lineage_graph({**results, "experts": many}))
    assert ">13  expert_12<" in drawn
    assert "expert_13" not in drawn
    assert ">and 27 more<" in drawn
    assert ">40 experts<" in drawn


def test_experts_that_hardly_any_token_reaches_are_counted_and_not_drawn(
    results: dict[str, queries.QueryResult],
) -> None:
    experts, sent = results["experts"].answer, results["confusion"].answer
    rows = [(n + 1, f"expert_{n}", *experts.rows[0][2:]) for n in range(40)]
    counts = [("expert_0", "expert_0", 900, 0.9), ("expert_0", "expert_7", 60, 0.06)]
    counts += [("expert_0", f"expert_{n}", 5, 0.005) for n in range(10, 18)]
    many = {
        **results,
        "experts": replace(results["experts"], answer=replace(experts, rows=rows)),
        "confusion": replace(results["confusion"], answer=replace(sent, rows=counts)),
    }
    assert report.bystanders(many) == {f"expert_{n}" for n in range(40)} - {"expert_0", "expert_7"}
    tree = lxml.html.fromstring(report.report_page(many))
    (svg,) = tree.xpath("//figure[@id='confusion']//svg[@class='wide']")
    assert len(svg.xpath(".//g[starts-with(@class, 'cell-')]")) == 2
    assert "Left out here and below: 38 experts" in tree.text_content()
    (table,) = tree.xpath("//details[summary='all 40 experts']//table")
    assert len(table.xpath("./tbody/tr")) == 40


def test_modules_that_share_a_gate_share_a_line() -> None:
    rows = [
        {"layer": layer, "module_kind": kind, "accuracy": share}
        for layer, share in ((0, 0.5), (1, 0.9))
        for kind, share in (
            ("q_proj", share),
            ("k_proj", share),
            ("o_proj", share / 2),
            (None, 0.7),
        )
    ]
    lines = report._by_kind(rows)
    assert list(lines) == ["q, k", "o", report.ALL_MODULES]
    assert lines["o"] == [(0, 0.25), (1, 0.45)]
    shared = [row | {"accuracy": 0.7} for row in rows]
    assert list(report._by_kind(shared)) == [report.ALL_MODULES]


def test_the_table_of_composites_has_attempts_prompt_lengths_and_cut_answers(
    results: dict[str, queries.QueryResult], page: str
) -> None:
    fused = results["composites"].rows[0]
    assert fused == {
        "task": "composite-3",
        "system": "fused",
        "answered_right": 0.55,
        "attempted": 0.65,
        "num_prompts": 100,
        "mean_prompt_tokens": 210.4,
        "max_prompt_tokens": 333,
        "num_truncated": 3,
    }
    assert [row["system"] for row in results["composites"].rows] == [
        "fused",
        "base",
        "arrow",
        "ties",
    ]
    assert "composite attempted" not in page  # it has no figure: it is no better for being larger


def test_conversations_are_shown_turn_by_turn_with_what_they_cost(tree: Any) -> None:
    (heading,) = tree.xpath("//h3[text()='Conversations turn by turn']")
    (table,) = heading.xpath("./following-sibling::div[1]/table")
    cells = [
        [cell.text_content() for cell in row.xpath("./td")] for row in table.xpath("./tbody/tr")
    ]
    assert cells == [
        ["fused", "1.00", "0.25", "0.50", "90", "0.90"],
        ["swap", "1.00", "0.75", "0.50", "180", "1.80"],
    ]
    assert "conversation-3, 100 conversations" in table.text_content()
    (chart,) = tree.xpath("//figure[@id='conversations']//svg[@class='wide']")
    assert "turn of conversation-3" in chart.text_content()


def test_a_large_figure_has_no_waste_and_the_page_s_own_fonts(page: str) -> None:
    assert "DejaVu Sans'" not in page
    assert "rotate(-0" not in page
    assert not re.search(r"<path d=[^>]*\d\.\d{4}", page)


def test_a_screen_reader_gets_a_caption_and_a_table_in_place_of_each_chart(tree: Any) -> None:
    drawings = tree.xpath("//svg")
    assert drawings == tree.xpath("//main//svg")
    assert drawings
    for drawing in drawings:
        assert drawing.get("aria-hidden") == "true"
        (figure,) = drawing.xpath("ancestor::figure[figcaption]")
        assert figure.xpath(".//table")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "kind"), [(1400, "wide"), (390, "narrow")])
def test_the_page_fits_a_desk_and_a_phone(
    browser: webdriver.Chrome, page: str, tmp_path: Path, width: int, kind: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    shown = drawings_at(browser, path, width)
    assert set(shown) == {kind}
    assert len(shown) == page.count(f'<svg class="{kind}"')


@pytest.mark.browser
def test_on_paper_no_table_is_cut_and_nothing_is_there_to_click(
    browser: webdriver.Chrome, page: str, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    resize(browser, 718, 1046)  # A4
    browser.get(path.as_uri())
    overflows, widest, clickable = browser.execute_script(
        "const seen = (all) => [...document.querySelectorAll(all)].filter((a) => a.clientWidth);"
        "return [seen('.scroll').map((one) => getComputedStyle(one).overflowX),"
        " Math.max(...seen('.plain').map((one) => one.getBoundingClientRect().right)),"
        " seen('figure details').length]"
    )
    assert set(overflows) == {"visible"}
    assert widest <= 718
    assert clickable == 0
