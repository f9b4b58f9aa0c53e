"""Many processes on one home, some of which die: no promise is broken, and nobody sees a lock."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING

import pytest

from store.errors import StoreError
from store.events import Failure
from store.garbage import Removable
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from tests.store.conftest import Shelf

    Worker = Callable[..., subprocess.Popen[str]]


def test_two_that_come_first_make_one_home(worker: Worker, tmp_path: Path) -> None:
    home = tmp_path / "new"
    both = [worker("write", home, number, 1) for number in (1, 2)]
    promised = {line.split()[0] for writer in both for line in finish(writer)}
    assert len(promised) == 2
    survives(home, promised)


@pytest.mark.slow
def test_ten_minutes_of_writers_readers_and_kills(shelf: Shelf, worker: Worker) -> None:
    """Six writers, one of which is killed every second, and two readers."""
    shelf.ledger.ingest()
    chance, minutes, first = random.Random(0), float(os.environ.get("SOAK_MINUTES", "10")), 0
    readers = [worker("read", shelf.home, 60 * minutes + 60) for _ in range(2)]
    writers: list[subprocess.Popen[str]] = []
    ended: list[subprocess.Popen[str]] = []
    promised: set[str] = set()
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        while len(writers) < 6:
            first += 1000
            writers.append(worker("write", shelf.home, first, 1000))
        time.sleep(chance.uniform(0.5, 1.5))
        victim = writers.pop(chance.randrange(len(writers)))
        assert victim.stdout
        promised.add(victim.stdout.readline().split()[0])  # a busy machine takes long to start it
        victim.kill()
        ended.append(victim)
    for process in (*writers, *readers):
        process.kill()
    waits = []
    for lines in map(output, (*ended, *writers)):
        for words in (line.split(maxsplit=2) for line in lines[:-1]):  # the last may be cut
            promised.add(words[0])
            waits.append(float(words[1]))
            assert len(words) == 2, words
    survives(shelf.home, promised)
    for reader in readers:
        counts = [int(line.split()[0]) for line in output(reader)[:-1]]
        assert counts == sorted(counts)
    assert len(promised) > len(ended) > minutes
    most = max(5, 10 * median(waits))  # of a busy machine everything takes long
    assert sorted(waits)[int(0.99 * len(waits))] < most


@pytest.mark.parametrize(
    ("num_writers", "num_records", "num_readers"),
    [
        pytest.param(3, 4, 1, id="a few"),
        pytest.param(8, 250, 2, id="many", marks=pytest.mark.slow),
    ],
)
def test_every_writer_writes_while_every_reader_reads(
    shelf: Shelf,
    worker: Worker,
    num_writers: int,
    num_records: int,
    num_readers: int,
) -> None:
    shelf.ledger.ingest()
    writers = [
        worker("write", shelf.home, 1 + number * num_records, num_records)
        for number in range(num_writers)
    ]
    readers = [worker("read", shelf.home, num_writers * num_records) for _ in range(num_readers)]
    written = [line.split(maxsplit=2) for writer in writers for line in finish(writer)]
    for reader in readers:
        reader.send_signal(signal.SIGTERM)
    counts = [[line.split() for line in output(reader)] for reader in readers]
    expected = {shelf.adapter(1 + number).id for number in range(num_writers * num_records)}
    assert {artifact_id for artifact_id, *_ in written} == expected
    assert [reason for *_, reason in (line for line in written if len(line) > 2)] == []
    shelf.ledger.ingest()
    assert {row[0] for row in shelf.ledger.query("SELECT id FROM artifacts").rows} == expected
    assert not shelf.ledger.verify().findings
    for seen in counts:
        numbers = [int(count) for count, *took in seen if took]  # the last line may be cut
        assert numbers
        assert numbers == sorted(numbers), "a reader never goes back in time"


def output(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=900)[0].splitlines()


def finish(process: subprocess.Popen[str]) -> list[str]:
    lines = output(process)
    assert process.returncode == 0
    return lines


@pytest.mark.parametrize(
    "num_kills", [pytest.param(5, id="a few"), pytest.param(200, id="many", marks=pytest.mark.slow)]
)
def test_a_killed_writer_keeps_its_promises(shelf: Shelf, worker: Worker, num_kills: int) -> None:
    """`kill -9`, at a moment nobody chose: what was said to be recorded is recorded."""
    chance = random.Random(0)
    promised: set[str] = set()
    for number in range(num_kills):
        victim = worker("write", shelf.home, 1 + 1000 * number, 1000)
        assert victim.stdout
        promised.add(victim.stdout.readline().split()[0])
        time.sleep(chance.uniform(0, 0.4))
        victim.kill()
        lines = output(victim)  # the last line may be cut
        promised |= {line.split()[0] for line in lines if line.count(".")}
    survives(shelf.home, promised)


def survives(home: Path, promised: set[str]) -> None:
    """Whoever comes next finds all that was promised, and can go on."""
    ledger = Ledger(home)
    with ledger.running("nightly"):
        pass
    assert ledger.ingest().reason == ""
    recorded = {row[0] for row in ledger.query("SELECT id FROM artifacts").rows}
    assert promised <= recorded
    assert not ledger.verify().findings


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of twelve megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


@needs_root
def test_a_full_disk_is_a_sentence_and_loses_nothing(
    small_disk: Path, make_shelf: Callable[[str], Shelf]
) -> None:
    shelf = make_shelf(str(small_disk / "home"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 << 20))
    num_recorded = 0
    with suppress(StoreError):
        while True:
            failure = Failure("fit", f"task {num_recorded}", "E", "m" * 20_000)
            shelf.ledger.record_failure(failure, run_id="r1")
            num_recorded += 1
            if num_recorded == 6:
                assert shelf.ledger.ingest().reason == ""
    with pytest.raises(StoreError, match="No space left on device"):
        shelf.ledger.record_failure(failure, run_id="r1")
    full = shelf.ledger.ingest()
    assert full.reason
    assert full.num_waiting == num_recorded - 6
    ballast.unlink()
    assert not [finding for finding in shelf.ledger.verify().findings if finding.what == "record"]
    assert shelf.ledger.ingest().num_records == num_recorded - 6
    assert shelf.ledger.query("SELECT count(*) FROM failures").rows == [(num_recorded,)]
    shelf.ledger.index.reader.close()  # or the disk is busy


@needs_root
def test_a_model_is_freed_on_a_full_disk(
    small_disk: Path, make_shelf: Callable[[str], Shelf]
) -> None:
    ledger = make_shelf(str(small_disk / "home")).ledger
    sha256 = ledger.blobs.put_bytes(b"gates")
    folder = ledger.home / "checkpoints" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1 << 12))
    paths = {str(folder): folder, sha256: ledger.blobs.place_of(sha256)}
    ledger.free(lambda: [Removable(name, path, 0) for name, path in paths.items()])
    assert not any(path.exists() for path in paths.values())
    (small_disk / "ballast").unlink()
    assert not ledger.verify().findings


@needs_root
def test_a_read_only_disk_is_read(filled: Shelf) -> None:
    home = str(filled.home)
    filled.make(filled.adapter(3))
    subprocess.run(["mount", "--bind", home, home], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", home], check=True)
        ledger = Ledger(filled.home)
        assert ledger.weights_of(filled.adapter(3).id)
        assert ledger.query("SELECT count(*) FROM scores").rows == [(9,)]
        assert not ledger.verify().findings
        assert "Read-only file system" in ledger.ingest().reason
        with pytest.raises(StoreError, match="Read-only file system"):
            ledger.record_failure(Failure("fit", "x", "E", "m"), run_id="r1")
        with pytest.raises(StoreError, match="Read-only file system"):
            ledger.blobs.put_bytes(b"x")
        ledger.index.reader.close()  # or the disk is busy
    finally:
        subprocess.run(["umount", home], check=True)
    assert filled.ledger.ingest().num_records == 1
