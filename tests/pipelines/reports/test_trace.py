"""A trace on a page and in a terminal: the numbers are the trace's, and text stays text."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console

from meteora.artifacts import BaseSpec
from meteora.model.trace import Trace
from pipelines.reports import trace as trace_view
from pipelines.reports.html import PageError, check_writable, write_page
from tests.pipelines.cli.command_line import meteora
from tests.pipelines.reports.html_reader import Elements, least_contrast, open_page

if TYPE_CHECKING:
    from selenium import webdriver

COLOURS = (
    "const of = getComputedStyle(document.querySelector('.text .t'));"
    " return [of.color, of.backgroundColor, of.printColorAdjust]"
)
HOSTILE = "</script><img src=x onerror=alert(1)>"
PIECES = ("ask", " me", "\n", HOSTILE, "answer", "\x1b[2J")


@pytest.fixture
def trace() -> Trace:
    """Six tokens, three modules of two layers, top-2 of four experts, weights in quarters."""
    torch.manual_seed(0)
    first = torch.randint(2, 4, (3, 6, 1)) / 4
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(18)]).view(3, 6, 2)
    return Trace(
        ids=tuple(range(10, 16)),
        pieces=PIECES,
        num_prompt=4,
        experts=("dates", HOSTILE, "sums", "words"),
        modules=("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj"),
        chosen=chosen,
        weights=torch.cat([first, 1 - first], dim=2),
    )


def test_the_page_carries_every_choice_and_weight(trace: Trace) -> None:
    (data,) = Elements(trace_view.trace_page(trace, "a title")).json()
    chosen = np.frombuffer(base64.b64decode(data["chosen"]), np.int16).reshape(3, 6, 2)
    weights = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(3, 6, 2) / 255
    assert (chosen == trace.chosen.numpy()).all()
    assert np.abs(weights - trace.weights.numpy()).max() <= 0.5 / 255
    assert tuple(data["pieces"]) == PIECES
    assert data["layers"] == [0, 0, 1]


def test_each_token_stands_in_the_colour_of_its_winner_without_any_script(trace: Trace) -> None:
    shown = [
        (str(attributes["class"]).split()[1], attributes["data-n"], attributes["style"])
        for tag, attributes in Elements(trace_view.trace_page(trace, "")).found
        if tag == "span" and "data-n" in attributes
    ]
    share, winner = trace.shares().max(dim=1)
    assert shown == [
        (f"e{e}", str(e + 1), f"--w:{s:.2f}")
        for e, s in zip(winner.tolist(), share.tolist(), strict=True)
    ]


def test_a_page_with_more_than_eight_experts_says_how_they_differ(trace: Trace) -> None:
    sentence = "From the ninth expert on, the colours come again with another line"
    assert sentence not in trace_view.trace_page(trace, "")
    assert sentence in trace_view.trace_page(
        replace(trace, experts=(*trace.experts, *(f"e{n}" for n in range(5)))), ""
    )


def test_a_long_prompt_is_on_the_page_once_and_its_beginning_above(trace: Trace) -> None:
    html = trace_view.trace_page(trace, "word " * 500)
    assert html.count("word " * 40 + "…") == html.count("word " * 40) == 2  # title and heading


@pytest.mark.browser
def test_on_paper_a_page_has_dark_text_and_the_colours_of_experts(
    browser: webdriver.Chrome, trace: Trace, tmp_path: Path
) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    open_page(browser, tmp_path, trace_view.trace_page(trace, "a title"))
    screen = browser.execute_script(COLOURS)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", **dark})
    ink, background, adjusted = browser.execute_script(COLOURS)
    assert ink == "rgb(28, 27, 25)" != screen[0]
    assert background != "rgba(0, 0, 0, 0)"
    assert adjusted == "exact"  # else a browser leaves backgrounds out
    assert not browser.find_element("css selector", ".bar").is_displayed()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast_on_the_deepest_colours_too(
    browser: webdriver.Chrome, trace: Trace, tmp_path: Path, scheme: str
) -> None:
    from pipelines.serving.page import chat_page  # noqa: PLC0415  (a server, which no report needs)

    chosen = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", chosen)
    names = tuple(f"expert_{n}" for n in range(8))
    traced = trace_view.trace_page(replace(trace, experts=names), "a title")
    for html in (traced, chat_page("tiny", names, expert="", max_new_tokens=8)):
        open_page(browser, tmp_path, html)
        for expert in range(8):
            browser.execute_script(
                "for (const span of document.querySelectorAll('.text .t')) {"
                " span.className = 't first e' + arguments[0];"
                " span.style.setProperty('--w', 1); }",
                expert,
            )
            least, where = least_contrast(browser)
            assert least >= 4.5, where


@pytest.mark.browser
def test_on_paper_the_legend_of_a_conversation_is_whole(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    from pipelines.serving.page import chat_page  # noqa: PLC0415  (a server, which no report needs)

    names = [f"expert_{n}_with_a_long_name" for n in range(20)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    open_page(browser, tmp_path, chat_page("tiny", names, expert="", max_new_tokens=8))
    wide, shown = browser.execute_script(
        "const legend = document.querySelector('.legend');"
        "return [legend.scrollWidth, legend.clientWidth]"
    )
    assert wide <= shown


@pytest.mark.browser
def test_a_layer_without_a_routed_module_shows_no_expert(
    browser: webdriver.Chrome, trace: Trace, tmp_path: Path
) -> None:
    modules = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.2.q_proj")
    trace = replace(trace, modules=modules)
    open_page(browser, tmp_path, trace_view.trace_page(trace, ""))

    def at(layer: int) -> tuple[str, list[str]]:
        return tuple(
            browser.execute_script(
                "const slider = document.querySelector('input[type=range]');"
                "slider.value = arguments[0]; slider.dispatchEvent(new Event('input'));"
                "return [document.querySelector('output').textContent,"
                " [...document.querySelectorAll('.text .t')].map((one) => one.dataset.n)]",
                layer,
            )
        )

    assert at(1) == ("layer 1, not routed", ["–"] * 6)
    assert at(2) == ("layer 2", [str(1 + n) for n in trace.shares(2).argmax(dim=1).tolist()])


@pytest.mark.browser
def test_what_a_token_is_told_is_whole_at_the_end_of_a_window_too(
    browser: webdriver.Chrome, trace: Trace, tmp_path: Path
) -> None:
    open_page(browser, tmp_path, trace_view.trace_page(trace, "a title"))
    tip, height = browser.execute_script(
        "const last = [...document.querySelectorAll('.text .t')].at(-1);"
        "document.body.style.paddingTop = '200vh';"
        "last.scrollIntoView({ block: 'end' });"
        "last.dispatchEvent(new PointerEvent('pointerenter'));"
        "return [document.querySelector('.tip').getBoundingClientRect().toJSON(), innerHeight]"
    )
    assert 0 <= tip["top"] < tip["bottom"] <= height


@pytest.mark.browser
def test_a_screen_reader_reads_a_text_without_the_numbers_in_it(
    browser: webdriver.Chrome, trace: Trace, tmp_path: Path
) -> None:
    open_page(browser, tmp_path, trace_view.trace_page(trace, "a title"))
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    read = [one["name"]["value"] for one in nodes if one["role"]["value"] == "StaticText"]
    assert {"ask", " me"} <= {*read}
    numbers = [text for text in read if text.isdigit()]
    assert len(numbers) == 2 * len(trace.experts)  # of the legend


def test_names_and_prompts_are_text_and_nothing_is_fetched(trace: Trace) -> None:
    html = trace_view.trace_page(trace, HOSTILE)
    page = Elements(html)
    assert page.count("img") == 0
    assert page.count("script") == 2  # the data and the program
    assert page.handlers() == page.requests() == []
    assert "://" not in html
    assert [text for tag, text in page.texts if HOSTILE in text and tag != "script"]


def test_a_terminal_shows_numbers_where_experts_change_and_no_control_character(
    trace: Trace,
) -> None:
    asked, answered, legend = (text.plain for text in trace_view.terminal_texts(trace, None))
    winners = trace.shares().argmax(dim=1).tolist()
    expected, before = "", -1
    for piece, winner in zip(PIECES[:4], winners[:4], strict=True):
        expected += ("" if winner == before else f"[{winner + 1}]") + piece
        before = winner
    assert asked == expected
    assert answered.endswith("␛[2J")
    for winner in set(winners):
        assert f"[{winner + 1}] {trace.experts[winner]}" in legend
    assert set(legend.split("\n")[0]) >= set(f"{max(map(winners.count, winners)) / 6:.0%}")


def test_forty_experts_look_different() -> None:
    assert len(set(trace_view.expert_styles(40))) == 40
    assert trace_view.tint(0, 0.0) > trace_view.tint(0, 1.0)  # deeper is darker


@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_in_any_terminal_the_legend_has_the_colours_of_tokens(trace: Trace, system: Any) -> None:
    """Of forty experts, each with three tokens of one depth; eight colours come five times."""
    names = tuple(f"expert_{n}" for n in range(40))
    order = torch.arange(120) // 3
    weights = torch.full((3, 120, 1), 0.75)
    chosen = order.expand(3, -1)[..., None]
    many = replace(
        trace,
        ids=tuple(range(120)),
        pieces=("x",) * 120,
        num_prompt=60,
        experts=names,
        chosen=torch.cat([chosen, (chosen + 1) % 40], 2),
        weights=torch.cat([weights, 1 - weights], 2),
    )
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=system, width=400)
    *parts, legend = trace_view.terminal_texts(many, console.color_system)
    for text in (*parts, legend):
        console.print(text, soft_wrap=True)
    painted = re.findall(r"\x1b\[([\d;]+)m( expert_\d+ |x+)\x1b", file.getvalue())
    tokens = [style for style, text in painted if text[0] == "x"]
    by_name = {text.strip(): style for style, text in painted if text[0] == " "}
    assert list(dict.fromkeys(tokens)) == [by_name[name] for name in names]
    assert len(set(by_name.values())) == 40  # the second eight are underlined, and so on


def test_more_experts_than_a_byte_counts_keep_their_numbers(trace: Trace) -> None:
    many = replace(trace, experts=tuple(f"e{i}" for i in range(300)), chosen=trace.chosen + 296)
    (data,) = Elements(trace_view.trace_page(many, "")).json()
    assert np.frombuffer(base64.b64decode(data["chosen"]), np.int16).max() == 299


def test_a_page_takes_the_place_of_no_device_and_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/full"), Path("/dev/stdout"), Path("/dev/new.html")):
        with pytest.raises(PageError, match=r"is a device or a pipe, .* would replace it"):
            check_writable(path)
    check_writable(tmp_path / "page.html")


def test_a_page_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(PageError, match="cannot be written"):
        check_writable(tmp_path / "missing" / "page.html")
    with pytest.raises(PageError, match="cannot be written"):
        check_writable(path / "page.html")
    with pytest.raises(PageError, match="is a folder; give the name of a file"):
        check_writable(tmp_path)
    write_page(path, "<p>é")
    assert path.read_text(encoding="utf-8") == "<p>é"
    assert list(tmp_path.iterdir()) == [path]


def test_generate_with_a_trace_shows_it_and_writes_the_page(world, tmp_path) -> None:
    entry = world.manifest.base
    kept = tmp_path / "bases" / BaseSpec(entry.repo_id, entry.revision).id.partition(":")[2]
    kept.parent.mkdir()
    kept.symlink_to(world.base)
    said = meteora(
        "generate", world.checkpoint, "hello", "--expert", "attention", "--max-new-tokens", 3,
        "--trace", tmp_path / "t.html", home=tmp_path,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("[2]hello")
    assert "[2] attention  100% of 8 tokens" in said.stdout
    (data,) = Elements((tmp_path / "t.html").read_text()).json()
    assert "".join(data["pieces"]).startswith("hello")
