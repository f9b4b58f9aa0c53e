"""Lines for people are shown as they were written."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import rich.console
from rich.table import Table
from rich.text import Text

from meteora.artifacts import Reason
from meteora.untrusted.findings import AdapterError
from pipelines.cli import app
from pipelines.flows import run_page
from pipelines.workspace import console


def test_brackets_in_what_is_said_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A reason's code stands in brackets, and so may anything in a name or a path."""
    passed_on: list[str] = []
    with console.CONSOLE.listening(passed_on.append):
        for text in ("no room [memory]", "[red]/tmp/[/]/x"):
            console.say(text)
            console.say(text, "note")
    lines = capsys.readouterr().err.splitlines()
    assert lines == passed_on
    assert lines == [
        "no room [memory]", "note: no room [memory]", "[red]/tmp/[/]/x", "note: [red]/tmp/[/]/x",
    ]  # fmt: skip


def test_what_is_said_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("\x1b]0;title\x07\x1b[2Jtwo\nlines", "error")
    assert capsys.readouterr().err == "error: ␛]0;title␇␛[2Jtwo\nlines\n"


def test_long_lines_break_at_spaces_in_a_terminal_and_paths_and_commands_are_whole() -> None:
    shown, passed_on = io.StringIO(), list[str]()
    shows = console.Console()
    shows._stderr = rich.console.Console(file=shown, width=24, force_terminal=True)
    path = "/a/path/of/more/than/a/line"
    text = f"{path}: no such folder; make it with `mkdir -p /a/path`\nor take  another one"
    with shows.listening(passed_on.append):
        shows.say(text, "error")
    assert passed_on == [f"error: {text}"]
    assert Text.from_ansi(shown.getvalue()).plain.splitlines() == [
        "error:", f"{path}:", "no such folder; make it", "with `mkdir -p /a/path`",
        "or take  another one",
    ]  # fmt: skip
    assert (
        console.at_spaces("  indented 日本語日本語日本語", 16) == "  indented\n日本語日本語日本語"
    )


def test_what_is_printed_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a line nor a cell of a table, such as a source of rows that a recipe names."""
    hostile = "\x1b]0;title\x07\u202e"
    out = console.plain_console()
    out.print(f"the run would stop: {hostile}", soft_wrap=True)
    table = Table("name")
    table.add_row(hostile)
    out.print(table)
    printed = capsys.readouterr().out
    assert printed.count("␛]0;title␇�") == 2
    assert printed.replace("\n", "").isprintable()


def test_a_bar_is_one_line_of_80_columns_and_its_rate_is_since_the_start() -> None:
    """Rows of a batch are done at one moment; that is no rate of 100,000 a second."""
    shown = io.StringIO()
    shows = console.Console()
    shows._stderr = rich.console.Console(file=shown, width=80, force_terminal=True)
    with shows.bar("measuring routing", 60, "rows") as advance:
        advance(0)
        time.sleep(1)
        for _ in range(16):
            advance(1)
        time.sleep(1.2)
    lines = Text.from_ansi(shown.getvalue()).plain.split("\n")
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith("measuring routing ━")
    assert len(last) <= 80
    shape = r".+ 16 of 60 rows, 0:00:0(\d), ([\d.]+) a second, 0:00:0(\d) left *"
    (found,) = re.findall(shape, last)
    went, rate, left = map(float, found)
    assert 5 < rate <= 16
    assert left < 2 * went  # it counts down from the last step on: 44 / 16 of the time until then


def test_a_bar_of_work_that_goes_on_begins_in_its_middle() -> None:
    steps: list[tuple[str, int, int]] = []
    shows = console.Console()
    with (
        shows.listening(lambda _text: None, lambda *step: steps.append(step)),
        shows.progress_bar("training the gates", 9, "steps") as show,
    ):
        for done in (6, 7, 9):
            show(done, 9)
    assert steps == [("training the gates", done, 9) for done in (6, 7, 9)]


def test_a_refusal_says_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise AdapterError("[here]", (Reason("pickle", "it would run code"),))

    monkeypatch.setattr(app, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: [here]: it would run code [pickle]\n"


def test_nobody_is_told_to_install_what_runs_code_from_the_hub(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("`pip install kernels`")
    assert not caplog.records


def test_warnings_are_shown_where_another_program_has_taken_over_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Prefect has handlers that print nothing, and Python's own is for programs without any."""
    assert caplog.handler in logging.getLogger().handlers
    logging.getLogger("store.ledger").warning("this machine's clock is %s behind", "an hour")
    assert capsys.readouterr().err == "note: this machine's clock is an hour behind\n"


def test_the_same_warning_is_shown_once_in_a_while(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ingest of a run meets the same damaged record."""
    for silent_seconds, number in ((600.0, 1), (0.0, 2)):
        monkeypatch.setattr(console, "SILENT_SECONDS", silent_seconds)
        for room in ("store.index", "pipelines.flows"):
            logging.getLogger(room).warning("%s cannot be read", f"a{silent_seconds:.0f}.json")
        assert capsys.readouterr().err.count("cannot be read") == number


def test_a_warning_from_a_thread_of_the_store_stops_no_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prefect has a log for threads of a run alone."""
    warn = logging.getLogger("store.sharing").warning
    with console.CONSOLE.listening(run_page.note), ThreadPoolExecutor(1) as pool:
        pool.submit(warn, "not shared: a damaged record").result()
    assert capsys.readouterr().err == "note: not shared: a damaged record\n"


@pytest.mark.parametrize("full", [False, True])
def test_work_goes_on_where_nothing_can_be_said(*, full: bool) -> None:
    program = "from pipelines.workspace.console import say\nsay('a')\nsay('b')\nprint('done')"
    reader, writer = os.pipe()
    os.close(reader)  # as of `2>&1 | tee log` whose tee has ended
    with open("/dev/full" if full else writer, "wb") as stderr:  # noqa: PTH123  (a descriptor)
        ended = subprocess.run(
            [sys.executable, "-c", program], stderr=stderr, stdout=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stdout) == (0, b"done\n")


def test_work_goes_on_where_the_terminal_is_closed() -> None:
    program = (
        "import time\nfrom pipelines.workspace.console import bar, say\n"
        "with bar('measuring', 8, 'rows') as advance:\n"
        "    for _ in range(8):\n        advance(1)\n        say('b')\n        time.sleep(0.1)\n"
        "say('a')\nprint('done')"
    )
    terminal, stderr = os.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=stderr, stdout=subprocess.PIPE) as ran:
        os.close(stderr)
        assert os.read(terminal, 1)  # the bar is there
        os.close(terminal)
        said, _ = ran.communicate(timeout=60)
    assert (ran.returncode, said) == (0, b"done\n")
