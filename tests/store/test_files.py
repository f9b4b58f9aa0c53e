"""Files that people and other programs read are whole, too."""

import errno
import stat
from pathlib import Path

import pytest

from store import files


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
