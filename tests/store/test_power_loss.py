"""Power is lost: only what was synced is there afterwards, and all that was promised is.

A layer over Python's calls notes which bytes and which names are on the disk. `lose` then takes the
rest away, as a file system may. DuckDB's files count as lost: they are made again from the records.
"""

import os
from pathlib import Path

import pytest

from pipelines.workspace.context import put_in_place
from store.ledger import Ledger
from tests.store.conftest import BASE, adapter, fused, router
from tests.store.test_many import survives
from tests.store.worker import record


class Disk:
    """Knows what is on the disk, below one folder.

    Args:
        lying: Whether it only says that it has synced.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, *, lying: bool = False) -> None:
        self.root = root
        self._bytes: dict[int, tuple[int, int]] = {}
        """Size and time of change of each synced file, by inode."""
        self._names: set[tuple[int, str, int]] = set()
        """Folder, name and inode of each entry of a synced folder."""
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            sync(descriptor)
            if not lying:
                self._see(Path(f"/proc/self/fd/{descriptor}").readlink())

        patch.setattr(os, "fsync", fsync)

    def _see(self, path: Path) -> None:
        status = path.stat()
        if not path.is_dir():
            self._bytes[status.st_ino] = status.st_size, status.st_mtime_ns
            return
        self._names = {entry for entry in self._names if entry[0] != status.st_ino}
        self._names |= {(status.st_ino, one.name, one.lstat().st_ino) for one in path.iterdir()}

    def lose(self) -> None:
        """Take away all names and bytes that are not on the disk."""
        for folder, folders, files in os.walk(self.root, topdown=False):
            inode = Path(folder).stat().st_ino
            for name in files:
                path = Path(folder, name)
                status = path.stat()
                if (inode, name, status.st_ino) not in self._names or "duckdb" in name:
                    path.unlink()
                elif self._bytes.get(status.st_ino) != (status.st_size, status.st_mtime_ns):
                    os.truncate(path, 0)
            for name in folders:
                path = Path(folder, name)
                if (inode, name, path.stat().st_ino) not in self._names and any(path.iterdir()):
                    for lost in sorted(path.rglob("*"), reverse=True):
                        lost.rmdir() if lost.is_dir() else lost.unlink()


def run_in_small(ledger: Ledger) -> set[str]:
    """Returns what is promised."""
    stack = fused(adapter(1))
    promised = {record(ledger, spec) for spec in (BASE, adapter(1), stack, router(stack))}
    ledger.pack()
    promised.add(record(ledger, adapter(2)))
    ledger.ingest()
    return {str(one) for one in promised}


@pytest.mark.parametrize("moment", ["loose", "packed"])
def test_what_was_promised_is_there_when_power_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "home").mkdir()
    disk = Disk(tmp_path / "home", monkeypatch)
    ledger = Ledger(tmp_path / "home")
    if moment == "packed":
        promised = run_in_small(ledger)
    else:
        promised = {str(record(ledger, spec)) for spec in (BASE, adapter(1))}
        file = tmp_path / "large"
        file.write_bytes(b"x" * 100_000)
        blob = ledger.blobs.put(file, move=True)
        stack = fused(adapter(1))
        promised.add(ledger.record_artifact(stack, weights_sha256=blob, blobs=[blob], run_id="r"))
    disk.lose()
    survives(tmp_path / "home", promised)


def test_a_disk_that_does_not_sync_breaks_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would notice a missing sync."""
    (tmp_path / "home").mkdir()
    disk = Disk(tmp_path / "home", monkeypatch, lying=True)
    promised = run_in_small(Ledger(tmp_path / "home"))
    disk.lose()
    with pytest.raises(AssertionError):
        survives(tmp_path / "home", promised)


def _write_checkpoint(root: Path) -> Path:
    made = root / "runs" / "new"
    (made / "inner").mkdir(parents=True)
    for name in ("meteora.json", "inner/results.yaml"):
        (made / name).write_text("whole")
    (root / "checkpoints").mkdir()
    put_in_place(made, root / "checkpoints" / "c")
    return root / "checkpoints" / "c"


def test_a_folder_that_has_its_name_has_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    folder = _write_checkpoint(tmp_path)
    disk._see(tmp_path)
    disk.lose()
    texts = [(folder / name).read_text() for name in ("meteora.json", "inner/results.yaml")]
    assert texts == ["whole", "whole"]
