"""Lines for people are shown as they were written."""

from __future__ import annotations

import pytest

from meteora.artifacts import Reason
from meteora.untrusted.findings import AdapterError
from pipelines.cli import app
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
