"""What the machine refuses is one sentence; a fault of ours keeps its traceback."""

import errno
import os
import pwd
import socket
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from pipelines.cli import app
from pipelines.flows.local_server import use_local_server
from pipelines.workspace.faults import ADVICE, describe
from store.ledger import Ledger
from tests.pipelines.cli.command_line import Said, ask, done, meteora

READERS = [
    ["sql"],
    ["notebook"],
    ["verify"],
    ["chat", "abc"],
    ["chat-server", "abc"],
    ["publish", "abc", "me/mine"],
    ["store", "serve"],
    ["attest", "router:abc"],
    ["store", "rebuild"],
    ["store", "pack"],
    ["store", "gc"],
    ["store", "openlineage"],
    ["report", "router:abc"],
    ["generate", "abc", "hello"],
    ["export", "abc", "--expert", "x"],
    ["drop", "abc", "x"],
]
"""Commands that need a store and do not make one."""


def refused(said: Said, sentence: str) -> None:
    assert said.returncode == 1, said.stderr
    assert sentence in said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert said.stdout == ""


@pytest.mark.parametrize("number", ADVICE, ids=[errno.errorcode[number] for number in ADVICE])
def test_each_fault_of_the_system_says_what_to_do(number: int) -> None:
    error = OSError(number, os.strerror(number), "/some/file")
    assert describe(error) == f"/some/file: {ADVICE[number]}"
    assert describe(OSError(number, os.strerror(number))) == ADVICE[number]


def test_a_copy_names_the_side_that_is_full() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/base/x", None, "/full/x")
    assert str(describe(error)).startswith("/full/x: the disk is full")


def test_a_fault_is_found_behind_the_error_of_a_library() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/home/x")
    behind = RuntimeError("could not save")
    behind.__cause__ = ValueError("inner")
    behind.__cause__.__context__ = full
    assert describe(behind) == f"/home/x: {ADVICE[errno.ENOSPC]}"
    rust = SafetensorError("Error: I/O error: No space left on device (os error 28)")
    assert describe(rust) == (f"Error: I/O error: No space left on device: {ADVICE[errno.ENOSPC]}")
    assert "cannot be looked up" in str(describe(socket.gaierror(-3, "Temporary failure")))
    assert describe(MemoryError()) == ADVICE[errno.ENOMEM]
    assert describe(torch.OutOfMemoryError("CUDA out of memory")) == ADVICE[errno.ENOMEM]
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)  # more than a process has addresses for
    assert describe(raised.value) == ADVICE[errno.ENOMEM]
    with pytest.raises(OSError, match="written") as cut, Path("/dev/full").open("wb") as full_disk:
        np.zeros(1 << 16).tofile(full_disk)
    assert "the disk is full" in str(describe(cut.value))
    unloaded = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    assert describe(unloaded) == ADVICE[errno.ENOMEM]


def test_a_fault_of_ours_is_no_fault_of_the_machine() -> None:
    assert describe(KeyError("x")) is None
    assert describe(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    hidden = ValueError("x")
    hidden.__context__ = OSError(errno.ENOSPC, "full")
    hidden.__suppress_context__ = True
    assert describe(hidden) is None


def test_the_command_line_says_it_and_leaves_other_errors_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: Exception) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "app", fail)

    raising(OSError(errno.EROFS, "Read-only file system", "/x/prefect/start.lock"))
    refused(ask("run"), "error: /x/prefect/start.lock: the disk is read-only; give a folder")
    raising(KeyError("ours"))
    with pytest.raises(KeyError):
        ask("run")


def test_no_place_for_temporary_files_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, or in a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tempfile._os, "open", Mock(side_effect=full))  # ty: ignore[missing-attribute]
    with pytest.raises(FileNotFoundError) as nowhere:
        tempfile.gettempdir()
    assert "set TMPDIR to a folder that you can write to" in str(describe(nowhere.value))


def test_a_user_without_a_home_folder_is_told_to_set_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number that no user has."""
    for name in ("HOME", "METEORA_HOME", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    sentence = "error: the home folder of a user cannot be found; set HOME to a folder"
    refused(ask("sql"), sentence)
    with pytest.raises(RuntimeError) as without:
        use_local_server(tmp_path / "home")
    assert str(describe(without.value)) in ask("sql").stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("words", READERS, ids=lambda words: "-".join(words[:2]))
def test_a_mistyped_home_makes_no_store(words: list[str], tmp_path: Path) -> None:
    home = tmp_path / "typo"
    refused(meteora(*words, home=home), f"store in {home}" if words[1:2] == ["abc"] else "no store")
    assert not home.exists()


def test_a_folder_of_other_things_is_no_home_and_an_empty_one_is(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()  # as a project has them, and a home, too
    refused(meteora("sql", home=tmp_path), "there is no store in it")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    Ledger(tmp_path / "home").ingest()
    done("sql", "SELECT 1", "--home", tmp_path / "home")


@pytest.mark.parametrize(
    "words", [["sql"], ["run", "quickstart", "--dry-run"], ["check", "org/x"]], ids=lambda w: w[0]
)
def test_a_home_below_a_file_is_one_sentence(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = meteora(*words, home=tmp_path / "file" / "home")
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) <= 1
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("count", [-5, 0])
def test_an_answer_has_at_least_one_token(count: int, tmp_path: Path) -> None:
    said = meteora("generate", "x", "hello", "--max-new-tokens", count, home=tmp_path)
    assert said.returncode == 2
    assert "--max-new-tokens" in said.stderr
