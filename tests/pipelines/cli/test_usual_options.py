"""What people expect of any command line: a version, silence, JSON, the input as an argument."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from meteora.artifacts import MeteoraError
from meteora.model.trace import Pieces
from pipelines.admission import checkpoints
from tests.conftest import World
from tests.pipelines.cli.command_line import ask, done, meteora


def test_the_version_is_one_line() -> None:
    said = done("--version")
    name, version = said.stdout.split()
    assert name == "meteora-pipelines"
    assert version[0].isdigit()


def test_help_is_what_was_written_in_whole_lines() -> None:
    """Brackets are no markup, and a line of a docstring does not end where its source does."""
    said = ask("check", "-h").stdout
    assert "owner/name[@revision]" in said
    said = ask("schedule", "-h").stdout
    assert "are replaced by one" in " ".join(said.split())
    about = said.partition("Arguments")[0].splitlines()
    (line,) = (line for line in about if line.strip().startswith("Each run resolves"))
    assert len(line.rstrip()) > 70


@pytest.mark.parametrize("place", [0, 2])
def test_quiet_leaves_data_and_errors(world: World, tmp_path: Path, place: int) -> None:
    words = ["drop", str(world.checkpoint), "nobody", "--home", str(tmp_path)]
    words.insert(place, "--quiet")
    said = ask(*words)
    assert said.returncode == 1
    assert said.stderr.startswith("error:")
    words = ["store", "gc", "--home", str(tmp_path)]
    (tmp_path / "records").mkdir()
    assert "nothing to remove" in ask(*words).stderr
    words.insert(place, "--quiet")
    assert ask(*words).stderr == ""
    assert "nothing to remove" in ask(*words[:place], *words[place + 1 :]).stderr


def test_quiet_reaches_the_processes_that_work(tmp_path: Path) -> None:
    code = "from pipelines.workspace.console import say; say('note'); say('fault', 'error')"

    def work(_ledger: object) -> None:
        child = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        raise MeteoraError(f"the process said {child.stderr.strip()}")

    (tmp_path / "records").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.ledger.Ledger.verify", work)
        said = ask("verify", "--quiet", "--home", tmp_path)
    assert said.stderr == "error: the process said error: fault\n"


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    words = ("run", tmp_path / "none.yaml", "--home", tmp_path)
    assert "Traceback" not in ask(*words).stderr
    said = ask(*words, "--verbose")
    assert said.returncode == 1
    assert "Traceback" in said.stderr
    assert said.stderr.splitlines()[-1].startswith("error:")


def test_a_query_and_a_prompt_come_from_the_input(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 1 AS one\n"))
    (tmp_path / "records").mkdir()
    said = meteora("sql", "-", "--json", home=tmp_path)
    assert json.loads(said.stdout) == [{"one": 1}]

    answer = ("--base", world.base, "--max-new-tokens", 2, "--json")
    marked = io.StringIO("\ufeffabc")
    monkeypatch.setattr(sys, "stdin", marked)
    with patch.object(Pieces, "add", lambda _, token: f"<{token}>"):  # as special ones are shown
        said = done("generate", world.checkpoint, "-", *answer, "--home", tmp_path)
    found = json.loads(said.stdout)
    assert len(found["tokens"]["answer"]) == 2
    assert len(found["tokens"]["prompt"]) == len("abc")  # a byte order mark is no part of it
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    plain = meteora("generate", world.checkpoint, "-", *answer[:-1], home=tmp_path)
    assert found["answer"] == plain.stdout.rstrip("\n")


def test_bytes_that_are_no_text_are_a_sentence_or_shown(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (("sql", "SELECT '\udcff'"), ("generate", world.checkpoint, "\udcff")):
        said = ask(*words, "--home", tmp_path)
        assert said.returncode == 1
        assert "the text is not utf-8" in said.stderr
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert "the input is not utf-8" in ask("sql", "-", "--home", tmp_path).stderr
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / "a\udcff")
    command = [sys.executable, "-m", "pipelines.cli", "check", str(folder)]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most people's locales
    process = subprocess.run(command, check=False, capture_output=True, env=strict)
    assert process.returncode == 0, process.stderr
    assert rb"a\udcff" in process.stdout


def test_findings_and_garbage_are_json_too(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    said = done("verify", "--json", "--home", tmp_path)
    found = json.loads(said.stdout)
    assert found == {"num_records": 0, "num_blobs": 0, "num_scores": 0, "findings": []}
    assert json.loads(meteora("store", "gc", "--json", home=tmp_path).stdout) == []


def test_a_mistyped_command_or_expert_is_told_what_is_like_it(world: World, tmp_path: Path) -> None:
    assert "Did you mean 'benchmark'?" in ask("benchmrk").stderr
    said = meteora(
        "generate", world.checkpoint, "x", "--expert", "q_and_w", "--base", world.base,
        home=tmp_path,
    )  # fmt: skip
    assert "there is no expert 'q_and_w' (did you mean 'q_and_v'?)" in said.stderr


def test_the_old_name_of_schedule_works_and_says_so(tmp_path: Path) -> None:
    said = ask("serve", tmp_path / "none.yaml", "--home", tmp_path)
    assert "`meteora serve` is called `meteora schedule` now" in said.stderr
    assert "no such recipe file" in said.stderr
    assert "is called" not in ask("schedule", tmp_path / "none.yaml", "--home", tmp_path).stderr
    assert "serve " not in ask("--help").stdout.replace("chat-server", "")


@pytest.mark.parametrize(
    "words",
    [
        "verify --scores", "verify --answers", "report x --traces", "generate x y --max-new-tokens",
        "chat x --max-new-tokens", "chat-server x --port", "schedule x --limit",
    ],
)  # fmt: skip
def test_a_number_that_nobody_means_is_one_short_sentence(words: str) -> None:
    for number in ("9" * 5_000, "9" * 4_000, 2**63):  # the first is more than Python reads
        said = ask(*words.split(), number)
        assert said.returncode == 2
        assert f"Invalid value for '{words.rpartition(' ')[2]}'" in said.stderr
        assert len(said.stderr) < 1_000


def test_a_message_does_not_repeat_a_number_of_five_thousand_digits(tmp_path: Path) -> None:
    expert = "{name: x, adapter: a/b, examples: 'jsonl:x'}"
    (tmp_path / "recipe.yaml").write_text(f"base: {'9' * 5_000}x\nexperts: [{expert}]\n")
    for words in (["run", tmp_path / "recipe.yaml", "--dry-run"], ["recipe", "show", "9" * 5_000]):
        said = meteora(*words, home=tmp_path) if words[0] == "run" else ask(*words)
        assert said.returncode == 1
        assert len(said.stderr.splitlines()) == 1
        assert len(said.stderr) < 500


def test_recipes_are_shown_and_explained() -> None:
    assert "quickstart" in ask("recipe", "show").stdout.split()
    assert "name: reverse_words" in ask("recipe", "show", "quickstart").stdout
    said = ask("recipe", "show", "quikstart")
    assert said.returncode == 1
    assert "did you mean 'quickstart'?" in said.stderr
    text = ask("recipe", "reference").stdout
    assert "router.top_k: whole number; default 1; >= 1, <= 4,096\n    Number of" in text
    assert max(map(len, text.splitlines())) <= 80
    keys = json.loads(ask("recipe", "reference", "--json").stdout)
    assert len(keys) == text.count("\n\n") + 1
    head, line, *rows = ask("recipe", "reference", "--format", "markdown").stdout.splitlines()
    assert (head, line) == ("| path | type | needed | default | range | text |", "|" + " - |" * 6)
    assert [row.split(" ")[1] for row in rows] == [key["path"] for key in keys]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {8}  # a bar in a cell is none


@pytest.mark.parametrize(("colour", "there"), [("", True), ("1", False)])
def test_no_color_is_heeded(colour: str, *, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.workspace.console import Console  # noqa: PLC0415

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    if colour:
        monkeypatch.setenv("NO_COLOR", colour)
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    Console().say("text", "error")
    assert ("\x1b[31m" in out.getvalue()) is there


def test_a_model_runs_on_the_device_and_in_the_dtype_that_are_named(
    world: World, tmp_path: Path
) -> None:
    asked = ("generate", world.checkpoint, "x", "--base", world.base, "--max-new-tokens", 2)
    done(*asked, "--device", "cpu", "--dtype", "bfloat16", "--home", tmp_path)
    found = checkpoints.find(str(world.checkpoint), tmp_path, world.base, dtype="bfloat16")
    model, _ = found.load()
    assert model.dtype == torch.bfloat16
    refused = meteora(*asked, "--device", "cuda:99", home=tmp_path)
    assert refused.returncode == 1
    assert "torch finds no device 'cuda:99' on this machine, only cpu" in refused.stderr
    wrong = meteora(*asked, "--dtype", "int8", home=tmp_path)
    assert wrong.returncode == 2
