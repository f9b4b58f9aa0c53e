import fcntl
import os
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines.flows import local_server
from pipelines.workspace.faults import NoSpaceError

USER = """
import os, sys
from pathlib import Path
from pipelines.workspace.environment import prepare, use_prefect_of
from pipelines.flows.local_server import use_local_server

home = Path(sys.argv[1])
prepare()
use_prefect_of(home)
started = use_local_server(home)
print(started, os.environ["PREFECT_API_URL"], flush=True)
sys.stdin.read()
"""


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
            return True
    except OSError:
        return False


def without_prefect() -> dict[str, str]:
    removed = {name for name in os.environ if name.startswith("PREFECT")}
    return {name: value for name, value in os.environ.items() if name not in removed}


@pytest.fixture
def home(tmp_path: Path) -> Generator[Path]:
    """A home whose server is gone before the folder is."""
    yield tmp_path
    wait_until(lambda: not servers(tmp_path), seconds=10)


def user(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=without_prefect(),
    )  # fmt: skip


def servers(home: Path) -> list[int]:
    """The processes that serve a home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"pipelines.flows.local_server" in words and str(home / "prefect").encode() in words:
                found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert true()


def kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def told(process: subprocess.Popen[str]) -> tuple[bool, str]:
    assert process.stdout is not None
    started, url = process.stdout.readline().split()
    return started == "True", url


def test_all_users_of_a_home_share_its_server_and_the_last_ends_it(
    home: Path, new_database: Path
) -> None:
    """Two that come at once get one server, which outlives the one that started it."""
    (home / "prefect").mkdir(mode=0o700)
    shutil.copy(new_database, home / "prefect")
    both = [user(home), user(home)]
    (first, url), (second, its) = map(told, both)
    assert url == its
    assert url.startswith("http://127.0.0.1:")
    assert first != second
    starter, other = both if first else reversed(both)

    kill(starter)
    time.sleep(1.0)
    assert answers(url)

    (server_pid,) = servers(home)
    os.kill(server_pid, signal.SIGKILL)  # the other one starts it again, where it was
    wait_until(lambda: servers(home) not in ([server_pid], []) and answers(url), seconds=120)

    kill(other)
    wait_until(lambda: not answers(url), seconds=10)


def test_a_server_that_does_not_start_is_said_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server.sys, "executable", "/bin/false")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)  # other tests may have a server
    with pytest.raises(local_server.ServerError, match=r"server\.log says why"):
        local_server.use_local_server(tmp_path)
    assert "PREFECT_API_URL" not in os.environ


def test_the_log_says_why_a_server_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prefect.db").write_bytes(b"this was a database" * 500)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with (tmp_path / "users.lock").open("wb") as users:
        fcntl.flock(users, fcntl.LOCK_SH)  # else the server ends, as after its last user
        started = local_server._start(tmp_path)
        assert started is not None
        assert started.wait(timeout=local_server.START_SECONDS) != 0
    assert "file is not a database" in (tmp_path / "server.log").read_text()


def test_the_log_of_a_server_that_died_stays_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server.sys, "executable", "/bin/false")
    log = tmp_path / "server.log"
    log.write_text("why it died")
    for kept in (log, tmp_path / "server.old.log"):
        started = local_server._start(tmp_path)
        assert started is not None
        started.wait()
        assert kept.read_text() == "why it died"
        monkeypatch.setattr(local_server, "LOG_BYTES", 0)


def test_a_full_disk_does_not_end_the_watch_over_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, results = iter((False, False, True)), iter((OSError("no space"), None))
    leaving = SimpleNamespace(wait=lambda _seconds: next(rounds))

    def start(_folder: Path) -> None:
        if error := next(results):
            raise error

    monkeypatch.setattr(local_server, "_start", start)
    local_server._keep_alive(tmp_path, None, cast("threading.Event", leaving))
    assert [*rounds, *results] == []


def test_a_disk_without_room_is_said_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(NoSpaceError, match=r"needs 33\.6 MB, and the disk of .* has 0\.0 MB left"):
        local_server.use_local_server(tmp_path)
    assert not servers(tmp_path)


def test_a_path_that_sqlite_does_not_open_is_said_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path.joinpath(*["h" * 200] * 3)
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    with pytest.raises(local_server.ServerError, match=r"SQLite takes 512; choose a home with a"):
        local_server.use_local_server(home)
    assert not home.exists()
    home.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(home)
    monkeypatch.setenv("PREFECT_HOME", str(link))
    with pytest.raises(local_server.ServerError, match=r"SQLite takes 512"):
        local_server.use_local_server(link)
    for path in (home, link):
        with pytest.raises(sqlite3.OperationalError, match="unable to open"):
            sqlite3.connect(path / "prefect.db")


def test_a_server_that_fails_or_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    request = httpx.Request("POST", "http://127.0.0.1:4200/api/flow_runs")

    def error(status: int) -> Exception:
        return httpx.HTTPStatusError("", request=request, response=httpx.Response(status))

    with pytest.raises(local_server.ServerError, match=r"127\.0\.0\.1:4200 fails with 500"):
        local_server.raise_if_it_failed(error(500))
    with pytest.raises(local_server.ServerError, match="does not take the secret that was"):
        local_server.raise_if_it_failed(error(401))
    for ours in (error(422), KeyError("ours")):
        local_server.raise_if_it_failed(ours)


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name there)
        pass


def test_a_server_with_a_certificate_of_its_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect takes it by a setting (`PREFECT_API_SSL_CERT_FILE`), which only Prefect reads."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(encoding))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        url = f"https://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("PREFECT_API_URL", url)
        answers_now = local_server.answers()
        server.shutdown()
    assert answers_now


@pytest.mark.parametrize(
    ("named", "left_out"), [("intranet.example", "intranet.example,127.0.0.1"), ("*", "*")]
)
def test_a_server_on_this_machine_is_asked_without_the_users_proxy(
    named: str, left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("NO_PROXY", named)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(local_server.sys, "executable", "/bin/false")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(local_server.ServerError, match="did not start"):
        local_server.use_local_server(tmp_path)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == left_out
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        healthy = local_server._is_healthy(f"http://127.0.0.1:{server.server_port}", seconds=5)
        server.shutdown()
    assert healthy


def test_a_server_that_takes_a_minute_to_start_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute here is half a second, in which the server answers that it is not ready."""
    assert local_server.START_SECONDS > 60
    monkeypatch.setattr(local_server, "START_SECONDS", 0.02 * local_server.START_SECONDS)
    ready = time.monotonic() + 0.5

    class Slow(Answers):
        def do_GET(self) -> None:
            self.send_response(200 if time.monotonic() > ready else 503)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        local_server._wait_until_healthy(None, url, tmp_path / "server.log")
        server.shutdown()
    assert time.monotonic() > ready
