from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipelines.data.pinned import DataSetError, ask, cached_entries
from pipelines.data.rows import ExamplesError
from pipelines.processes.isolated import MOST_MEMORY

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


def hold(most: int) -> None:
    bytearray(most)


def refuse() -> None:
    raise ExamplesError("no rows")


def test_what_reads_a_data_set_has_limits_and_its_refusals_come_through() -> None:
    with pytest.raises(DataSetError, match="needs more memory than it may take") as held:
        ask(hold, 2 * MOST_MEMORY)
    assert not held.value.is_fault_of_hub
    with pytest.raises(DataSetError, match=r"not done within 0\.1 s") as late:
        ask(hold, 0, seconds=0.1)
    assert late.value.is_fault_of_hub
    with pytest.raises(ExamplesError, match="no rows"):
        ask(refuse)


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
