"""The notebook that asks the ledger: all of it runs, on a full home and on an empty one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib import resources, util
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from pipelines.cli import store
from pipelines.reports.html import PageError, write_notebook
from store.ledger import Ledger
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.reports import report_ledger
from tests.store.test_readers import free_port

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from selenium import webdriver

QUESTIONS = 11
PICTURES = 5
RUN = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("notebook", sys.argv[1])
notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebook)
drawn, subplots = [], notebook.plt.subplots
notebook.plt.subplots = lambda **options: drawn.append(1) or subplots(**options)
answers, query = [], notebook.ledger.query
notebook.ledger.query = lambda sql: answers.append(query(sql)) or answers[-1]
outputs, found = notebook.app.run()
texts = [one.text for one in outputs if one is not None]
model = found["model"].value if "model" in found else None
tables = [[answer.columns, answer.rows] for answer in answers]
print(json.dumps([model, len(drawn), texts, tables], default=str))
"""
"""The notebook as marimo runs it, what its cells show, and the answers to its queries."""
NUM_PICTURES = """
const drawn = root => [...root.querySelectorAll("*")].reduce(
    (sum, one) => sum + (one.tagName === "IMG" && one.naturalWidth > 300)
        + (one.shadowRoot ? drawn(one.shadowRoot) : 0), 0);
return drawn(document);
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / 'a "home"'
    home.mkdir()
    report_ledger.fill(home)
    return home


@pytest.fixture
def notebook(home: Path, tmp_path: Path) -> Path:
    out = tmp_path / "a notebook.py"
    said = done("notebook", "-o", out, "--home", home)
    assert said.stdout.strip() == str(out)
    assert f"open it with `marimo edit --skip-update-check '{out}'`" in said.stderr
    return out


def shown(notebook: Path) -> tuple[str | None, int, list[str], list[dict[str, list]]]:
    """The model that it is about, the number of its pictures, what its cells show, and the
    answers to its queries, by column."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook)],
        env=os.environ | {"MPLBACKEND": "agg"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, num_pictures, texts, tables = json.loads(done.stdout)
    columns = [
        {name: [row[i] for row in rows] for i, name in enumerate(names)} for names, rows in tables
    ]
    return model, num_pictures, texts, columns


def test_every_question_has_an_answer_on_a_home_with_results(notebook: Path, home: Path) -> None:
    """And one alone, though all of it was measured on two sets of rows, and some of it again."""
    report_ledger.measure_again(home)
    report_ledger.compare_alone(home, report_ledger.ADAPTERS[2], "oracle", "d" * 64)
    report_ledger.time_again(home)
    report_ledger.rate_again(home)
    model, num_pictures, texts, answers = shown(notebook)
    assert num_pictures == PICTURES
    assert model == report_ledger.GATE.id
    questions = [text for text in texts if "<h2" in text]
    assert len(questions) == QUESTIONS
    (empty,) = (text for text in questions if "Nothing is recorded" in text)
    assert "What went wrong lately?" in empty  # nothing did
    (turns,) = (one for one in answers if "turn" in one)
    assert turns["turn"] == [1, 2, 3] * 2
    (losses,) = (one for one in answers if "p_holm" in one)
    assert sorted(losses["task"]) == sorted(report_ledger.NAMES)
    assert losses["p_holm"][losses["task"].index("sums")] == 0.004
    (speeds,) = (one for one in answers if "times_base" in one)
    assert (speeds["phase"], speeds["times_base"][0]) == (["decode", "prefill"], 2.2)
    (models,) = (one for one in answers if "made_at" in one)
    assert models["tasks"] == [4, 4]


def test_without_a_model_it_says_how_to_make_one(tmp_path: Path) -> None:
    home = tmp_path / "empty"
    Ledger(home).ingest()
    write_notebook(tmp_path / "notebook.py", home)
    model, num_pictures, texts, _ = shown(tmp_path / "notebook.py")
    assert (model, num_pictures) == (None, 0)
    assert any("No model was measured yet" in text for text in texts)


def test_a_model_without_gates_is_a_model(tmp_path: Path) -> None:
    """Gates come first; a home may have none, as where each prompt chooses its expert."""
    text = (resources.files("pipelines.reports") / "templates" / "notebook.py").read_text()
    (sql,) = re.findall(r'found = ask\("""(.*?)"""\)', text, re.DOTALL)
    home = tmp_path / "home"
    report_ledger.fill(home)
    (gate, first), *others = Ledger(home).query(sql).rows
    assert (gate, ", gate, 3 experts, " in first) == (report_ledger.GATE.id, True)
    assert [one for one, _ in others] == [report_ledger.ARROW.id]


def test_it_has_the_form_that_marimo_saves(notebook: Path) -> None:
    command = [sys.executable, "-m", "marimo", "check", "--strict", str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_is_there_stays(notebook: Path, home: Path, tmp_path: Path) -> None:
    notebook.write_text("mine")
    with pytest.raises(PageError, match="there already, perhaps with your changes"):
        write_notebook(notebook, home)
    assert notebook.read_text() == "mine"
    said = ask("notebook", "-o", tmp_path / "other.py", "--home", tmp_path / "nowhere")
    assert said.returncode == 1
    assert not (tmp_path / "other.py").exists()


def test_where_marimo_is_missing_a_sentence_says_so(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        store, "find_spec", lambda name: None if name == "marimo" else util.find_spec(name)
    )
    said = done("notebook", "-o", tmp_path / "notebook.py", "--home", home)
    assert "run `pip install 'meteora-pipelines[notebook]'`" in said.stderr


@pytest.fixture
def served(notebook: Path) -> Generator[str]:
    """The address at which marimo shows it."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "marimo",
        "run",
        str(notebook),
        "--headless",
        "--port",
        str(port),
    ]
    environment = os.environ | {"MARIMO_SKIP_UPDATE_CHECK": "1"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                urlopen(url, timeout=5).close()
                break
            except URLError:
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.browser
def test_a_browser_draws_it_and_asks_nobody_else(served: str, browser: webdriver.Chrome) -> None:
    browser.get(served)
    until = time.monotonic() + 120
    while len(browser.find_elements("css selector", "h2")) < QUESTIONS and time.monotonic() < until:
        time.sleep(0.5)
    assert len(browser.find_elements("css selector", "h2")) == QUESTIONS
    assert browser.execute_script(NUM_PICTURES) == PICTURES
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []
