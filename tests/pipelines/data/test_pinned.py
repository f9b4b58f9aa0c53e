import time
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants

from pipelines.data import pinned
from pipelines.data.pinned import cached_entries

ENTRIES: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}]


def read_twice(times: list[int]) -> list[str]:
    def make() -> list[dict[str, Any]]:
        times.append(1)
        return ENTRIES

    for _ in range(2):
        found = cached_entries(["rows", "commit"], make, lambda entry: str(entry["prompt"]))
    return found


def test_what_was_read_of_a_commit_is_the_owner_s_alone_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    times: list[int] = []
    assert read_twice(times) == ["a", "b"]
    assert len(times) == 1
    (file,) = (tmp_path / "meteora").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_reading_that_does_not_end_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, interrupted: bool
) -> None:
    """Arrow aborts a process that ends while another thread still reads, also at Ctrl-C."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(pinned, "READ_SECONDS", 20 if interrupted else 0.05)
    begun, ended = Event(), Event()

    def read() -> NoReturn:
        begun.set()
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    def interrupt(_self: object, _seconds: float) -> None:
        begun.wait()
        raise KeyboardInterrupt

    if interrupted:
        monkeypatch.setattr(pinned.Future, "result", interrupt)
    error, said = (KeyboardInterrupt, None) if interrupted else (TimeoutError, r"within 0\.05 s")
    with pytest.raises(error, match=said):
        cached_entries(["rows"], read, dict)
    assert ended.is_set()


def test_what_cannot_be_kept_is_read_again_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "replace", full)
    times: list[int] = []
    assert read_twice(times) == ["a", "b"]
    assert len(times) == 2
    assert list((tmp_path / "meteora").iterdir()) == []
