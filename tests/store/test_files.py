"""Files that people and other programs read are whole, too."""

import errno
import os
import stat
from pathlib import Path

import pytest

from store import files
from store.errors import BusyError


def test_a_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    for text in ("é, old", "é, new"):
        files.replace_text(path, text, mode=0o600)
        assert path.read_text(encoding="utf-8") == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "é, new"
    assert [*tmp_path.iterdir()] == [path]


def test_what_killed_writers_of_a_text_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "page[1].html"
    stale, young, others = (
        tmp_path / f".{name}.{digit * 16}.partial"
        for name, digit in ((path.name, "a"), (path.name, "b"), ("page1.html", "c"))
    )
    for left in (stale, young, others):
        left.touch()
    for left in (stale, others):
        os.utime(left, (0, 0))
    files.replace_text(path, "whole")
    assert {*tmp_path.iterdir()} == {path, young, others}


def test_the_log_of_a_database_that_was_not_finished_goes_with_it(tmp_path: Path) -> None:
    with files.partial_file(tmp_path) as partial:
        for path in (partial, partial.with_name(f"{partial.name}.wal")):
            path.touch()
    assert not list((tmp_path / "tmp").iterdir())


def test_who_waits_for_shared_holders_is_told_no_process_of_before(tmp_path: Path) -> None:
    path = tmp_path / "runs.lock"
    with (
        files.locked(path, deadline_seconds=0),
        pytest.raises(BusyError, match=f"last seen: process id {os.getpid()}"),
        files.locked(path, deadline_seconds=0, shared=True),
    ):
        pass
    with (
        files.locked(path, deadline_seconds=0, shared=True),
        pytest.raises(BusyError, match=r"^runs.lock is held by another process; try again"),
        files.locked(path, deadline_seconds=0),
    ):
        pass
