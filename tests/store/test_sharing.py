"""Homes that share a storage: a real server that speaks S3 on loopback, obstore as it ships."""

import hashlib
import http.client
import http.server
import logging
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import from_url

from meteora.artifacts import file_sha256
from store import remote as remote_storage
from store.errors import ConflictError, StoreError, UnreachableError
from store.events import Failure, RunStarted
from store.files import locked
from store.garbage import Removable
from store.ledger import Ledger
from store.records import Record
from store.remote import Remote
from store.sharing import SETTING, connect
from tests.store.conftest import Shelf, write_segment

pytestmark = pytest.mark.usefixtures("disk_is_not_waited_for")

BUCKET = "meteora"


def call(port: int, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path)
        assert connection.getresponse().status < 300
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server() -> Generator[int, None, None]:
    """The port of an S3 server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    yield port
    running.stop()


@pytest.fixture
def url(server: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, in a process that knows where it lies."""
    call(server, "POST", "/moto-api/reset")
    call(server, "PUT", f"/{BUCKET}")
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/team/ledger"


@pytest.fixture
def homes(url: str, make_shelf: Callable[[str], Shelf]) -> tuple[Shelf, Shelf]:
    """Two homes that share an empty storage."""
    for name in ("one", "two"):
        connect(make_shelf(name).home, url)
    return make_shelf("one"), make_shelf("two")


def test_what_one_home_records_the_other_one_knows(homes: tuple[Shelf, Shelf]) -> None:
    one, two = homes
    one.make(one.base)
    one.make(one.adapter(1), "weights of an adapter")
    two.ledger.ingest()
    sha256 = two.ledger.weights_of(two.adapter(1).id) or ""
    assert sha256 in two.ledger.blobs
    assert not list(two.ledger.blobs), "a blob comes when somebody asks for it"
    assert two.ledger.blobs.path_of(sha256).read_bytes() == b"weights of an adapter"
    two.make(two.fused(two.adapter(1)))
    two.measure(two.base, "sorting", 0.5)
    one.ledger.ingest()
    two.ledger.ingest()
    assert one.views() == two.views()
    for shelf in homes:
        assert not shelf.ledger.verify().findings


def test_a_home_that_has_a_past_brings_it_along(
    filled: Shelf, url: str, make_shelf: Callable[[str], Shelf]
) -> None:
    before = filled.views()
    connect(filled.home, url)
    assert Ledger(filled.home).ingest().reason == ""
    connect(make_shelf("two").home, url)
    two = make_shelf("two")
    assert two.ledger.ingest().num_records == len(filled.ledger.records.loose())
    assert two.views() == before
    assert not two.ledger.verify().findings


def test_what_is_no_record_on_the_storage_reaches_no_home(
    homes: tuple[Shelf, Shelf], url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = homes
    one.make(one.base)
    one.ledger.ingest()
    names = one.ledger.records.loose()
    storage = from_url(url, client_options={"allow_http": True})
    unhashable = Record("failure", "x", {}, "r1", "2026-12-03T05:00:00Z", ({},))  # ty: ignore[invalid-argument-type]
    for data in (b"[1]", unhashable.to_bytes()):
        sha256 = hashlib.sha256(data).hexdigest()
        obstore.put(storage, f"records/{sha256[:2]}/{sha256[2:]}.json", data)
    for segment in (
        write_segment(tmp_path, dict.fromkeys(names, "{}")),
        write_segment(tmp_path, {hashlib.sha256(b"[1]").hexdigest(): "[1]"}),
        tmp_path / f"{hashlib.sha256(b'no parquet').hexdigest()}.parquet",
    ):
        data = segment.read_bytes() if segment.exists() else b"no parquet"
        obstore.put(storage, f"records/packed/{segment.name}", data)
    one.ledger.blobs.put_bytes(b"of no record")
    for shelf in homes:
        assert shelf.ledger.ingest(restore=True).reason == ""
        assert shelf.ledger.records.parts() == names
        assert not shelf.ledger.verify().findings
        shelf.ledger.gc()
    assert caplog.text.count("holds no records; remove it there") == 2 * 5
    assert one.ledger.pack() == len(names)


def test_a_blob_that_the_storage_has_lost_comes_back_with_the_next_run(
    homes: tuple[Shelf, Shelf], url: str
) -> None:
    one, two = homes
    one.make(one.base)
    one.make(one.adapter(1), "packed")
    one.ledger.pack()
    one.make(one.adapter(2), "loose")
    unnamed = one.ledger.blobs.put_bytes(b"of no record")
    remote = Remote(url)
    lost = remote.names("blobs")
    remote.remove(lost)
    with Ledger(one.home).running("nightly"):
        pass
    assert remote.names("blobs") == lost
    assert not any(unnamed[2:] in name for name in lost)
    (segment,) = one.ledger.records.segments.root.glob("*.parquet")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:20])  # one that cannot be read stops only what it holds
    remote.remove(lost)
    assert Ledger(one.home).ingest(restore=True).reason == ""
    assert 0 < len(remote.names("blobs")) < len(lost)
    segment.write_bytes(whole)
    assert Ledger(one.home).ingest(restore=True).reason == ""
    assert remote.names("blobs") == lost
    two.ledger.ingest()
    for number, text in ((1, b"packed"), (2, b"loose")):
        sha256 = two.ledger.weights_of(two.adapter(number).id) or ""
        assert two.ledger.blobs.path_of(sha256).read_bytes() == text


@pytest.mark.parametrize("num_records", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_two_homes_write_at_once(
    homes: tuple[Shelf, Shelf],
    worker: Callable[..., subprocess.Popen[str]],
    num_records: int,
) -> None:
    """Two processes each, half of what they record is the same; nothing is lost or torn."""
    writers = [
        worker("write", shelf.home, 1 + start, num_records)
        for number, shelf in enumerate(homes)
        for start in (0, (1 + number) * num_records)
    ]
    for writer in writers:
        lines = writer.communicate(timeout=600)[0].splitlines()
        assert writer.returncode == 0
        assert len(lines) == num_records
    expected = {homes[0].adapter(1 + number).id for number in range(3 * num_records)}
    for shelf in homes:
        assert shelf.ledger.ingest().reason == ""
        assert {row[0] for row in shelf.ledger.query("SELECT id FROM artifacts").rows} == expected
        assert not shelf.ledger.verify().findings
    assert homes[0].views() == homes[1].views()


def test_the_earlier_record_stands_in_both_homes(homes: tuple[Shelf, Shelf]) -> None:
    one, two = homes
    one.make(one.base, "these weights")
    two.make(two.base, "other weights")
    for shelf in (one, two, one):
        shelf.ledger.ingest()
    assert one.ledger.weights_of(one.base.id) == two.ledger.weights_of(one.base.id)
    assert one.views() == two.views()
    with pytest.raises(ConflictError):
        two.make(two.base, "other weights")


def test_a_storage_that_is_away_fails_nobody(
    homes: tuple[Shelf, Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        alone = type(one)(one.home)
        alone.make(one.base)
        outcome = alone.ledger.ingest()
        assert "cannot be used now" in outcome.reason
        assert outcome.num_waiting == 0
        assert alone.ledger.query("SELECT count(*) FROM artifacts").rows == [(1,)]
        with pytest.raises(UnreachableError):
            alone.ledger.pack()
    assert one.ledger.ingest().reason == ""
    two.ledger.ingest()
    assert two.ledger.weights_of(two.base.id)


def test_packed_records_are_shared_packed(homes: tuple[Shelf, Shelf]) -> None:
    one, two = homes
    for number in range(4):
        one.make(one.adapter(number))
    two.ledger.ingest()
    two.make(two.adapter(9))
    assert one.ledger.pack() == 5
    left = Remote(two_url(two)).names("records")
    assert {name.rpartition("/")[0] for name in left} == {"records/packed"}
    two.ledger.ingest()
    assert not two.ledger.records.loose(), "they came back in a segment"
    assert two.ledger.records.segments.names() == one.ledger.records.segments.names()
    one.ledger.ingest()
    assert one.views() == two.views()
    for shelf in homes:
        assert not shelf.ledger.verify().findings
    assert Remote(two_url(two)).names("records") == left


def two_url(shelf: Shelf) -> str:
    assert shelf.ledger.sharing
    return shelf.ledger.sharing.remote.url


def test_what_changed_on_the_storage_is_found_and_never_taken(
    homes: tuple[Shelf, Shelf], url: str
) -> None:
    one, two = homes
    one.make(one.base, "the weights")
    sha256 = one.ledger.weights_of(one.base.id) or ""
    (record,) = one.ledger.records.loose()
    for name in (f"blobs/{sha256[:2]}/{sha256[2:]}", f"records/{record[:2]}/{record[2:]}.json"):
        obstore.put(from_url(url, client_options={"allow_http": True}), name, b"something else")
    two.ledger.ingest()
    assert two.ledger.weights_of(two.base.id) is None
    with pytest.raises(StoreError, match="is not in"):
        two.ledger.blobs.path_of(sha256)
    found = {finding.name.partition("/")[0]: finding for finding in one.ledger.verify().findings}
    assert found.keys() == {"blobs", "records"}
    assert found["blobs"].touches == (one.base.id,)


class SlowLink(socketserver.ThreadingTCPServer):
    """A relay to a server on loopback, for `rate` bytes a second each way."""

    daemon_threads = True

    def __init__(self, port: int, rate: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.port, self.rate = port, rate


class Relay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, SlowLink)
        self.rate = self.server.rate
        with socket.create_connection(("127.0.0.1", self.server.port)) as there:
            back = threading.Thread(target=self.pass_on, args=(there, self.request))
            back.start()
            self.pass_on(self.request, there)
            back.join()

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(len(data) / self.rate)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_a_large_blob_takes_its_time_on_a_slow_link(
    url: str,
    server: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_storage, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(remote_storage, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom(10 << 20))
    with SlowLink(server, rate=8 << 20) as link:
        threading.Thread(target=link.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{link.server_address[1]}")
        remote = Remote(url)
        began = time.monotonic()
        remote.put("blobs/ab/cd", tmp_path / "large")
        assert time.monotonic() - began > remote_storage.STALL_SECONDS
        began = time.monotonic()
        assert remote.get("blobs/ab/cd", tmp_path / "came") == file_sha256(tmp_path / "large")
        assert time.monotonic() - began > remote_storage.STALL_SECONDS
        link.shutdown()


def test_no_file_has_more_parts_than_s3_takes(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, put = Remote(url), Mock()
    monkeypatch.setattr(remote._obstore, "put", put)
    for num_bytes in (9 << 20, 300 << 30):
        with (tmp_path / "large").open("wb") as file:
            file.truncate(num_bytes)
        remote.put("blobs/ab/cd", tmp_path / "large")
    first, second = (call.kwargs["chunk_size"] for call in put.call_args_list)
    assert first == remote_storage.PART_BYTES
    assert 300 << 30 <= 10_000 * second < 301 << 30


def test_nobody_waits_for_the_upload_of_another_s_blob(
    homes: tuple[Shelf, Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = homes
    uploads = []

    def upload(sha256: str) -> None:
        with locked(one.home / "records.lock", deadline_seconds=0):
            uploads.append(sha256)

    monkeypatch.setattr(one.ledger.sharing, "push", upload)
    one.make(one.base)
    assert set(uploads) == one.ledger.records.loose()


def test_a_name_is_given_once(url: str, tmp_path: Path) -> None:
    remote = Remote(url)
    for text in ("first", "second"):
        (tmp_path / text).write_text(text)
        remote.put("blobs/ab/cd", tmp_path / text)
    remote.get("blobs/ab/cd", tmp_path / "came")
    assert (tmp_path / "came").read_text() == "first"


def test_a_run_of_another_home_is_not_taken_for_killed(homes: tuple[Shelf, Shelf]) -> None:
    one, two = homes
    one.ledger.record_run(RunStarted("r1", "nightly", "9" * 64))
    two.ledger.ingest()
    with two.ledger.running("nightly") as killed:
        assert not killed
    with one.ledger.running("nightly") as killed:
        assert [run.run_id for run in killed] == ["r1"]


def test_a_blob_that_is_missing_keeps_no_other_record_from_being_shared(
    homes: tuple[Shelf, Shelf], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = homes
    one.ledger.sharing = None
    one.make(one.adapter(1), "weights that get lost")
    one.ledger.blobs.path_of(one.ledger.weights_of(one.adapter(1).id) or "").unlink()
    one.make(one.adapter(2), "weights that stay")
    again = Ledger(one.home)
    assert not again.ingest().reason
    assert "not shared: " in caplog.text
    two.ledger.ingest()
    assert two.ledger.weights_of(two.adapter(2).id)
    assert not two.ledger.weights_of(two.adapter(1).id)


def test_what_was_freed_before_a_home_shares_keeps_no_record_back(
    filled: Shelf, url: str, make_shelf: Callable[[str], Shelf]
) -> None:
    ledger, sha256 = filled.ledger, filled.ledger.weights_of(filled.adapter(1).id) or ""
    before, freed = filled.views(), Removable(sha256, ledger.blobs.place_of(sha256), 0)
    ledger.free(lambda: [freed])
    ledger.pack()
    connect(filled.home, url)
    assert Ledger(filled.home).ingest().reason == ""
    connect(make_shelf("two").home, url)
    two = make_shelf("two")
    two.ledger.ingest()
    assert two.views() == before
    (finding,) = two.ledger.verify().findings
    assert finding.name == sha256


def test_a_blob_that_a_shared_storage_may_lack_is_not_freed_while_it_is_away(
    homes: tuple[Shelf, Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    one.make(one.base)
    sha256 = one.ledger.weights_of(one.base.id) or ""
    freed = Removable(sha256, one.ledger.blobs.place_of(sha256), 0)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "names", Mock(side_effect=UnreachableError("away")))
        with pytest.raises(UnreachableError, match="away"):
            one.ledger.free(lambda: [freed])
    assert freed.path.is_file()
    one.ledger.free(lambda: [freed])
    assert not freed.path.exists()
    assert one.ledger.blobs.path_of(sha256).is_file()  # it comes from the storage
    assert not two.ledger.ingest().reason


def test_a_home_keeps_its_name_and_a_copy_on_another_machine_gets_one(
    shelf: Shelf, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = connect(shelf.home, url).name
    assert connect(shelf.home, url).name == name
    for node in ("elsewhere", "elsewhere-2", "elsewhere"):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        assert connect(shelf.home, url).name.rpartition("-")[0] == node


def test_the_first_run_of_a_new_home_knows_that_its_clock_is_behind(
    homes: tuple[Shelf, Shelf], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = homes
    body = Failure("fit", "x", "E", "m").to_dict()
    one.ledger.records.write(Record("failure", "x", body, "r1", "2999-12-01T03:00:00.000000Z"))
    one.ledger.ingest()
    with two.ledger.running("nightly"):
        assert any("this machine's clock is" in text for text in caplog.messages)


def test_what_cannot_be_shared_is_a_sentence(shelf: Shelf, url: str) -> None:
    with pytest.raises(StoreError, match="cannot be used as shared storage"):
        connect(shelf.home, "shed://somewhere")
    with pytest.raises(
        StoreError, match=r"no-url cannot be used .*; give an address such as s3://b"
    ):
        connect(shelf.home, "no-url")
    with pytest.raises(StoreError, match=r"memory:///x is the memory of this process, which no"):
        connect(shelf.home, "memory:///x")
    with pytest.raises(UnreachableError, match=r"cannot be used now .* nothing is shared there"):
        connect(shelf.home, "s3://no-such-bucket/x")
    with pytest.raises(StoreError, match=r"x ignores `If-None-Match`.* conditional puts"):
        connect(shelf.home, f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/x")
    assert not (shelf.home / SETTING).exists()
    shelf.home.mkdir(exist_ok=True)
    (shelf.home / SETTING).write_text(f'remote = "{url}"\nbucket = 3\n')
    with pytest.raises(StoreError, match="it needs the texts name and remote"):
        Ledger(shelf.home)


def test_a_lost_home_comes_back_from_the_storage(filled: Shelf, url: str) -> None:
    connect(filled.home, url)
    Ledger(filled.home).pack()
    before = filled.views()
    shutil.rmtree(filled.home)
    connect(filled.home, url)
    again = type(filled)(filled.home)
    again.ledger.ingest()
    assert again.views() == before


@pytest.fixture
def refusing() -> Generator[str]:
    """The address of a storage that refuses all requests, each in an answer of its own."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (
                '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>RequestTimeTooSkewed</Code>'
                f"<Message>Your clock is wrong.</Message><RequestId>{time.time_ns()}</RequestId>"
                "</Error>"
            ).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:  # ty: ignore[incompatible-method-override]
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_refusal_says_what_the_storage_said_and_the_same_each_time(
    homes: tuple[Shelf, Shelf], refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing)
    alone = type(homes[0])(homes[0].home)
    first, second = alone.ledger.ingest().reason, alone.ledger.ingest().reason
    assert "403 Forbidden: RequestTimeTooSkewed: Your clock is wrong." in first
    assert refusing in first
    assert first == second


def test_a_storage_that_has_just_failed_is_not_asked_for_each_record(
    homes: tuple[Shelf, Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = homes[0].ledger.sharing
    assert sharing is not None
    put = Mock()
    monkeypatch.setattr(sharing.remote, "put", put)
    monkeypatch.setattr(sharing.remote, "names", Mock(side_effect=UnreachableError("away")))
    assert homes[0].ledger.ingest().reason == "away"
    homes[0].make(homes[0].base)
    assert not put.called
    monkeypatch.undo()
    assert homes[0].ledger.ingest().reason == ""
    homes[0].make(homes[0].adapter(1))  # it answers: nothing waits any longer
    homes[1].ledger.ingest()
    assert homes[1].ledger.weights_of(homes[1].base.id)
    assert homes[1].ledger.weights_of(homes[1].adapter(1).id)
