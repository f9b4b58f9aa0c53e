"""A blob is a file under the hash of its bytes, whoever put it there and however."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from meteora.artifacts import file_sha256
from store.blobs import Blobs
from store.errors import DamagedError, MissingBlobError, StoreError
from store.files import sweep

DATA = b"gates" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "gates.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("move", [False, True], ids=["copied", "moved"])
def test_a_file_goes_in_under_its_hash(blobs: Blobs, source: Path, move: bool) -> None:
    assert blobs.put(source, move=move) == SHA256
    assert SHA256 in blobs
    assert list(blobs) == [SHA256]
    assert blobs.path_of(SHA256).read_bytes() == DATA
    assert stat.S_IMODE(blobs.path_of(SHA256).stat().st_mode) == 0o444
    assert source.exists() is not move
    assert not list((blobs.root / "tmp").iterdir())


def test_a_file_that_cannot_be_read_is_no_fault_of_the_store(
    blobs: Blobs, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said that the home cannot be written to."""

    def struck(error: OSError) -> Callable[..., None]:
        def copied(*_paths: Path) -> None:
            raise error

        return copied

    of_source = PermissionError(errno.EACCES, "Permission denied", str(source))
    monkeypatch.setattr("store.blobs.copy", struck(of_source))
    with pytest.raises(PermissionError):
        blobs.put(source)
    ours = str(blobs.root / "tmp" / "x")
    for error in (OSError(errno.ENOSPC, "No space left"), PermissionError(errno.EACCES, "x", ours)):
        monkeypatch.setattr("store.blobs.copy", struck(error))
        with pytest.raises(StoreError, match="blobs cannot be written to"):
            blobs.put(source)


def test_an_old_file_is_not_swept_while_it_is_moved(
    blobs: Blobs, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the age of its source, and is no leftover."""
    os.utime(source, (0, 0))

    def hashed(path: Path) -> str:
        sweep(blobs.root)
        return file_sha256(path)

    monkeypatch.setattr("store.blobs.file_sha256", hashed)
    assert blobs.put(source, move=True) == SHA256
    assert blobs.path_of(SHA256).read_bytes() == DATA


def test_a_moved_file_is_not_copied(blobs: Blobs, source: Path) -> None:
    inode = source.stat().st_ino
    blobs.put(source, move=True)
    assert blobs.path_of(SHA256).stat().st_ino == inode


def test_the_owner_of_a_copied_file_may_go_on_writing_to_it(blobs: Blobs, source: Path) -> None:
    blobs.put(source)
    source.write_bytes(b"something else")
    assert not list(blobs.verify())


def test_moving_goes_on_where_a_killed_move_stopped(blobs: Blobs, source: Path) -> None:
    """The blob has its name and the source is not gone yet: one file with two names."""
    blobs.put(source, move=True)
    source.hardlink_to(blobs.path_of(SHA256))
    assert blobs.put(source, move=True) == SHA256
    assert not source.exists()
    assert blobs.path_of(SHA256).read_bytes() == DATA
    assert not list((blobs.root / "tmp").iterdir())


def test_a_link_of_the_hub_cache_is_followed(blobs: Blobs, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    assert blobs.put(link) == SHA256
    blobs.put(link, move=True)
    assert source.read_bytes() == DATA
    assert not blobs.path_of(SHA256).is_symlink()


def test_a_small_blob_is_verified_whenever_it_is_read(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a large one by `verify`: hashing gigabytes is nothing to do in passing."""
    damage(blobs.path_of(blobs.put_bytes(DATA)))
    with pytest.raises(DamagedError, match="have changed since they were written"):
        blobs.path_of(SHA256)
    with pytest.raises(DamagedError):
        blobs.give(SHA256, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("store.blobs.CHEAP_BYTES", len(DATA) - 1)
    assert blobs.path_of(SHA256).is_file()
    assert list(blobs.verify()) == [SHA256]


def test_putting_again_heals_a_damaged_blob(blobs: Blobs, source: Path) -> None:
    damage(blobs.path_of(blobs.put(source)))
    assert list(blobs.verify()) == [SHA256]
    blobs.put(source)
    assert not list(blobs.verify())


def test_putting_again_makes_an_old_blob_young(blobs: Blobs, source: Path) -> None:
    """So that `gc` spares it until its record is written."""
    path = blobs.path_of(blobs.put(source))
    os.utime(path, (0, 0))
    blobs.put(source)
    assert path.stat().st_mtime > 0


def test_a_blob_goes_out_for_nothing(blobs: Blobs, tmp_path: Path) -> None:
    sha256 = blobs.put_bytes(DATA)
    blobs.give(sha256, tmp_path / "out")
    assert (tmp_path / "out").samefile(blobs.path_of(sha256))
    with pytest.raises(StoreError, match="exists"):
        blobs.give(sha256, tmp_path / "out")


@pytest.mark.parametrize("name", ["0" * 64, "", "../../etc/passwd", "0" * 63 + "G"])
def test_what_is_not_there_is_a_sentence(blobs: Blobs, name: str) -> None:
    with pytest.raises(MissingBlobError, match="blob"):
        blobs.path_of(name)


def test_a_missing_file_is_a_sentence(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a file"):
        blobs.put(tmp_path / "nowhere")


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
