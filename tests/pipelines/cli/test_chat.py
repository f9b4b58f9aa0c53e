"""`meteora chat`: turns and commands, in a terminal and in a pipe; servers start."""

import os
import pty
import re
import readline
import signal
import subprocess
import sys
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from unittest.mock import Mock, patch

import httpx
import pytest
from rich.console import Console

from meteora.artifacts import MeteoraError
from meteora.checkpoint.manifest import UnknownExpertError
from meteora.model.chat import Answer, Chat
from meteora.model.trace import Token
from pipelines.cli import chat as command
from tests.pipelines.cli.command_line import Said, meteora

SAID = ["q_and_v gets every token", "a new conversation begins", "the router chooses"]


@pytest.fixture
def talk(world, chat_base, tmp_path):
    """A function that gives the lines of an input to `meteora chat`."""

    def talk(*lines: str, **options: str) -> Said:
        options = {"max-new-tokens": "8", **options}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with patch.object(sys, "stdin", StringIO("\n".join(lines) + "\n")):
            return meteora(
                "chat", world.checkpoint, "--base", chat_base, *words, home=tmp_path / "home"
            )

    return talk


@pytest.fixture
def conversation(world, chat_base):
    """A function to a conversation in a terminal of 80 columns, and what it shows."""
    import meteora as model_package  # noqa: PLC0415  (slow to import)

    model, tokenizer = model_package.load(world.checkpoint, base_folder=chat_base)

    def begin(*, no_color=False):
        file = StringIO()
        console = Console(
            file=file,
            force_terminal=True,
            color_system="truecolor",
            width=80,
            markup=False,
            no_color=no_color,
        )
        with patch.object(command, "plain_console", lambda: console):
            found = command.Conversation(Chat(model, tokenizer), 8)
        return found, file.getvalue

    return begin


def test_each_line_of_a_pipe_is_a_turn_and_each_answer_a_line(talk) -> None:
    said = talk("hello", "", "and now?")
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == 2
    assert "\x1b" not in said.stdout


def test_a_reset_asks_as_at_the_beginning_and_quit_ends_the_program(talk) -> None:
    said = talk("hello", "/reset", "hello", "hello", "/quit", "hello")
    one, again, other = said.stdout.splitlines()
    assert one == again
    assert one != other


def test_an_expert_is_forced_and_let_go(talk) -> None:
    said = talk("hello", "/expert q_and_v", "/reset", "hello", "/expert", "/reset", "hello")
    assert [line for line in said.stderr.splitlines() if line in SAID] == [*SAID, SAID[1]]
    routed, forced, again = said.stdout.splitlines()
    assert routed == again
    assert routed != forced
    assert talk("hello", expert="q_and_v").stdout.splitlines() == [forced]


def test_a_question_that_begins_with_a_slash_gets_one_more(conversation) -> None:
    here, _ = conversation()
    here.take("//etc/passwd means what?")
    assert here.messages[0]["content"] == "/etc/passwd means what?"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/expert nobody", "there is no expert 'nobody'; this model has all_seven"),
        ("/etc", "/help, /quit; a question that begins with / gets one more, as in //tmp"),
        ("/trace", "/trace needs the name of a file, such as /trace talk.html"),
        ("/trace .", "error: . is a folder; give the name of a file, which may be in it"),
        ("/trace x.html", "there is no whole answer to trace"),
    ],
)
def test_what_is_refused_is_one_sentence_and_ends_a_pipe(talk, line: str, sentence: str) -> None:
    said = talk(line, "hello")
    assert said.returncode == 1
    assert said.stdout == ""
    assert sentence in " ".join(said.stderr.split())


def test_of_a_thousand_experts_a_chat_names_a_few_when_it_begins(capsys) -> None:
    chat = Mock(experts=[f"expert-{number}" for number in range(1000)])
    with patch.object(sys, "stdin", Mock(isatty=lambda: True)), patch("builtins.input") as line:
        line.side_effect = EOFError
        command.Conversation(chat, 8).run()
    assert "experts: expert-0, " in (said := " ".join(capsys.readouterr().err.split()))
    assert "expert-7 (and 992 more); commands: /expert NAME" in said


def test_a_conversation_is_written_as_a_page(talk, tmp_path: Path) -> None:
    page = tmp_path / "talk.html"
    assert talk("hello", "and now?", f"/trace {page}").returncode == 0
    assert "q_and_v" in page.read_text()


def test_a_terminal_shows_tokens_in_the_colour_of_their_expert_and_a_legend(conversation) -> None:
    coloured, shown = conversation()
    coloured.take("/expert q_and_v")
    coloured.take("hello")
    assert "\x1b[30;48;2;" in shown()  # black on the expert's colour
    assert "q_and_v" in shown()
    assert "100% of 8 tokens" in shown()


def test_without_colour_numbers_stand_where_another_expert_begins(conversation) -> None:
    plain, shown = conversation(no_color=True)
    plain.take("hello")
    assert "48;2;" not in shown()
    assert "[1]" in shown()


def test_an_answer_cannot_control_the_terminal(conversation) -> None:
    here, shown = conversation(no_color=True)

    def answer(_messages, *, on_token, **_asked):
        for text in ("\x1b", "]0;title\x07", "\r", "\x9b2J"):
            on_token(Token(text, 0, 1.0))
        return Answer("", (), truncated=False, num_new=4, num_prompt=1, num_cached=0)

    with patch.object(here.chat, "answer", answer):
        here.take("hello")
    assert "␛]0;title␇␍\ufffd2J" in shown()


def test_an_interrupted_answer_stays_in_the_history_as_far_as_it_went(conversation) -> None:
    here, _ = conversation()
    whole = here.chat.answer([{"role": "user", "content": "hello"}], max_new_tokens=8).tokens
    original, count = Console.print, 0

    def interrupt(self, *shown, **asked):
        nonlocal count
        original(self, *shown, **asked)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with patch.object(Console, "print", interrupt):
        here.take("hello")
    assert here.messages[0]["content"] == "hello"
    assert "".join(token.text for token in whole).startswith(here.messages[1]["content"])
    here.take("and now?")
    assert len(here.messages) == 4


def test_a_question_that_is_interrupted_before_its_answer_begins_is_left_out(
    conversation, capsys
) -> None:
    here, _ = conversation()
    with patch.object(here.chat, "answer", side_effect=KeyboardInterrupt):
        here.take("hello")
    assert here.messages == []
    assert "left out of the conversation" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_cannot_be_written_ends_no_conversation(conversation, capsys) -> None:
    here = conversation()[0]
    here.take("hello")
    lines = ["/trace ~nobody-of-this-name/x.html", f"/trace {'x' * 300}.html", "/quit"]
    with (
        patch.object(sys, "stdin", Mock(isatty=lambda: True)),
        patch.object(command, "_lines", lambda _prompted: iter(lines)),
    ):
        here.run()
    assert capsys.readouterr().err.count("error: ") == 2
    assert len(here.messages) == 2


def test_ctrl_c_at_the_prompt_drops_the_line_and_not_the_conversation(capsys) -> None:
    with (
        patch.object(sys, "stdin", Mock(isatty=lambda: True)),
        patch("builtins.input", Mock(side_effect=[KeyboardInterrupt, " hello ", EOFError])),
    ):
        assert list(command._lines(prompted=True)) == ["hello"]
    assert "Ctrl-D" in capsys.readouterr().err


def test_ctrl_d_ends_the_line_of_the_prompt(capsys) -> None:
    with (
        patch.object(sys, "stdin", Mock(isatty=lambda: True)),
        patch("builtins.input", Mock(side_effect=EOFError)),
    ):
        assert list(command._lines(prompted=True)) == []
        assert list(command._lines(prompted=False)) == []
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in en_US.UTF-8, in C.UTF-8
def test_a_pipe_that_is_no_utf_8_is_refused(monkeypatch, errors: str) -> None:
    file = TextIOWrapper(BytesIO(b"hello\n\ncaf\xe9\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", file)
    with pytest.raises(MeteoraError, match=r"^the input is not utf-8$"):
        list(command._lines(prompted=False))


def test_a_model_is_called_by_the_name_of_its_folder_or_repository(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command._last_part(".") == command._last_part(f"{tmp_path}/") == tmp_path.name
    assert command._last_part("owner/fused") == command._last_part("owner/fused@a/b") == "fused"


def test_an_unknown_expert_is_refused_at_the_start(conversation) -> None:
    with pytest.raises(UnknownExpertError, match="there is no expert"):
        command.Conversation(conversation()[0].chat, 8, "nobody")


@pytest.mark.parametrize(
    ("first", "sentence", "path", "answer"),
    [
        (["chat-server"], r"serving fused at (\S+)/v1, and each expert", "/v1/models", '"fused"'),
        (["chat", "--web"], r"chat with fused at (\S+)/ until Ctrl-C", "/", "Chat with fused"),
    ],
    ids=["API", "page"],
)
def test_a_real_server_says_where_it_is_and_ends_with_ctrl_c(
    world, chat_base, tmp_path: Path, first: list[str], sentence: str, path: str, answer: str
) -> None:
    words = [*first, world.checkpoint, "--base", chat_base, "--home", tmp_path / "home"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, words), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "http" in line)
        found = re.search(sentence, said)
        assert found, said
        assert found[1].startswith("http://127.0.0.1:")
        assert answer in httpx.get(found[1] + path).text
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in err
    finally:
        process.kill()


def test_a_conversation_runs_on_the_device_and_in_the_dtype_that_are_named(talk) -> None:
    assert talk("hello", device="cpu", dtype="bfloat16").returncode == 0
    said = talk("hello", device="cuda:99")
    assert said.returncode == 1
    assert "torch finds no device 'cuda:99'" in said.stderr


def test_an_address_without_a_page_is_refused(talk) -> None:
    said = talk("hello", port="8001")
    assert said.returncode == 1
    assert "--host, --port and --allow-host are for the page; give --web, too" in said.stderr


def test_a_real_terminal_has_a_prompt_an_answer_and_goes_on_after_a_mistake(
    world, chat_base, tmp_path: Path
) -> None:
    main, terminal = pty.openpty()
    words = ["chat", world.checkpoint, "--base", chat_base, "--home", tmp_path / "home"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, words), "--max-new-tokens", "4"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"},
    )
    os.close(terminal)
    os.write(main, b"/expert nobody\n\x1b[200~hello\nyou\x1b[201~\n/quit\n")
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # Linux says so at the end of a terminal
        pass
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"there is no expert 'nobody'" in err
    assert b"> " in shown
    assert b" of 4 tokens" in shown
    if "GNU" in str(readline.__doc__):  # else a paste of two lines is two questions
        assert b"\x1b[?2004h" in shown
        assert shown.count(b" of 4 tokens") == 1
