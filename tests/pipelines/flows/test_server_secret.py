"""A home's server serves its owner only: no other account, no page of another site."""

import base64
import fcntl
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from pipelines.flows import local_server, server_secret
from pipelines.flows.server_secret import SecretError
from tests.pipelines.flows.test_local_server import (
    kill,
    servers,
    told,
    user,
    wait_until,
    without_prefect,
)

FOREIGN = "http://example.org"
SOCKETS = (
    "events/in",
    "events/out",
    "logs/out",
    "task_runs/subscriptions/scheduled",
    "work_pools/any/workers/connect",
)
NOBODY = 65534
BUSY_ASKED_AGAIN = 5  # PREFECT_CLIENT_MAX_RETRIES' default
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@dataclass
class Own:
    """The server of a home, and the secret that it asks for."""

    home: Path
    url: str
    secret: str

    def ask(
        self, method: str, path: str, body: Any = None, *, secret: str = "", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """What is answered: the status, the headers with small letters, and the body.

        503 is the server's "ask again", for a database that another request holds. Prefect's
        clients do, and so does this.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
        request.add_header("Content-Type", "application/json")
        if secret:
            token = base64.b64encode(secret.encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        for again in range(BUSY_ASKED_AGAIN, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=60) as got:  # noqa: S310
                    status, found, text = got.status, got.headers, got.read()
            except urllib.error.HTTPError as error:
                with error:
                    status, found, text = error.code, error.headers, error.read()
            if status != 503 or not again:
                break
            time.sleep(1)
        said = {name.lower(): value for name, value in found.items()}
        return status, said, json.loads(text) if said.get("content-type", "")[-4:] == "json" else ""

    def status(self, method: str, path: str, body: Any = None, **how: str) -> int:
        return self.ask(method, path, body, **how)[0]


@pytest.fixture(scope="module")
def own(new_database: Path) -> Generator[Own]:
    """In a place that everybody may enter, with the folder of an older version, open to all."""
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    (home / "prefect").mkdir()
    shutil.copy(new_database, home / "prefect")
    (home / "prefect").chmod(0o777)
    process = user(home)
    _, url = told(process)
    yield Own(home, url, (home / "prefect" / "secret").read_text().strip())
    kill(process)
    wait_until(lambda: not servers(home), seconds=10)
    shutil.rmtree(home)


def test_folder_and_secret_are_the_owner_s_alone(own: Own) -> None:
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (own.home / "prefect", own.home / "prefect" / "secret")
    ]
    assert modes == [0o700, 0o600]
    assert own.secret.startswith("meteora:")
    assert len(own.secret) > 40
    (pid,) = servers(own.home)
    password = own.secret.removeprefix("meteora:").encode()
    assert password not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("how", ["no secret", "a wrong one"])
def test_without_the_secret_nothing_is_done_or_told(own: Own, how: str) -> None:
    secret = "" if how == "no secret" else "meteora:guessed"
    deployment = f"/deployments/{uuid4()}"
    for method, path, body in (
        ("PATCH", deployment, {"entrypoint": "os.system"}),
        ("POST", f"{deployment}/create_flow_run", {}),
        ("POST", "/flow_runs/", {"flow_id": str(uuid4())}),
        ("POST", "/deployments/filter", {}),
        ("POST", "/block_documents/filter", {}),
        ("GET", "/admin/settings", None),
        ("GET", deployment, None),
        ("DELETE", "/health", None),  # what is open is open for reading only
    ):
        assert own.status(method, path, body, secret=secret) == 401, path
    assert own.status("GET", "/health") == 200


def test_with_the_secret_all_of_it_works(own: Own) -> None:
    def made(path: str, body: Any) -> str:
        status, _, answer = own.ask("POST", path, body, secret=own.secret)
        assert status == 201, answer
        return answer["id"]

    flow = made("/flows/", {"name": "letters"})
    deployment = f"/deployments/{made('/deployments/', {'name': 'one', 'flow_id': flow})}"
    assert own.status("PATCH", deployment, {"entrypoint": "a.b"}, secret=own.secret) == 204
    assert own.ask("GET", deployment, secret=own.secret)[2]["entrypoint"] == "a.b"
    made(f"{deployment}/create_flow_run", {})


def test_a_page_of_another_site_is_refused_even_with_the_secret(own: Own) -> None:
    its_own = own.url.removesuffix("/api")
    asks = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "a"}
    for origin in (FOREIGN, "null", "http://localhost:4200", its_own + "0"):
        for method, more in (("OPTIONS", asks), ("GET", {})):
            status, headers, _ = own.ask(
                method, "/admin/version", secret=own.secret, Origin=origin, **more
            )
            assert status == 403, origin
            assert "access-control-allow-origin" not in headers
    assert own.status("GET", "/admin/version", secret=own.secret, Origin=its_own) == 200


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "localhost:4200"])
def test_a_name_that_was_rebound_to_loopback_is_refused(own: Own, host: str) -> None:
    assert own.status("GET", "/admin/version", secret=own.secret, Host=host) == 403
    assert own.status("GET", "/health", Host=host) == 403


@pytest.mark.parametrize("path", SOCKETS)
def test_a_websocket_asks_for_the_secret_and_refuses_other_sites(own: Own, path: str) -> None:
    from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: PLC0415
    from websockets.sync.client import connect  # noqa: PLC0415
    from websockets.typing import Origin, Subprotocol  # noqa: PLC0415

    url, prefect = f"{own.url}/{path}".replace("http", "ws", 1), [Subprotocol("prefect")]
    address = urlsplit(url)
    refused = pytest.raises(InvalidStatus, match="403")
    with refused, connect(url, origin=Origin(FOREIGN), subprotocols=prefect):
        pass
    with refused, connect(url):  # Prefect's older protocol, which knows no secrets
        pass
    rebound = socket.create_connection((address.hostname, address.port))
    with (
        rebound,
        refused,
        connect(f"ws://example.org{address.path}", sock=rebound, subprotocols=prefect),
    ):
        pass
    for token in (None, "meteora:guessed"):
        with connect(url, subprotocols=prefect) as channel:
            channel.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed, match="1008"):
                channel.recv(timeout=30)
    with connect(url, subprotocols=prefect) as channel:
        channel.send(json.dumps({"type": "auth", "token": own.secret}))
        assert json.loads(channel.recv(timeout=30)) == {"type": "auth_success"}


OTHER = """
import encodings.idna, http.client, os, sys  # all: another user may not reach this interpreter

host, secret, user = sys.argv[1:]
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))
try:
    print(open(secret).read())
except PermissionError:
    print("secret: denied")
for method, path in (("PATCH", ""), ("POST", "/create_flow_run")):
    connection = http.client.HTTPConnection(host)
    path = "/api/deployments/00000000-0000-0000-0000-000000000000" + path
    connection.request(method, path, b'{"entrypoint": "os.system"}')
    print(f"{method}:", connection.getresponse().status)
"""


@needs_root
@pytest.mark.parametrize("folder", [0o700, 0o755], ids=["as it is", "opened again"])
def test_another_user_reads_no_secret_and_gets_nothing_done(own: Own, folder: int) -> None:
    secret = own.home / "prefect" / "secret"
    secret.parent.chmod(folder)
    try:
        said = subprocess.run(
            [sys.executable, "-c", OTHER, own.url.split("/")[2], str(secret), str(NOBODY)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    finally:
        secret.parent.chmod(0o700)
    assert said.stdout.splitlines() == ["secret: denied", "PATCH: 401", "POST: 401"]


def test_a_secret_that_others_may_know_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert server_secret.read_or_make(file) == server_secret.read_or_make(file)
    file.chmod(0o640)
    with pytest.raises(SecretError, match=r"has mode 0640, and needs 0600; .* delete the file"):
        server_secret.read_or_make(file)
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(SecretError, match="holds no secret"):
        server_secret.read_or_make(file)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecretError, match="cannot be read"):
        server_secret.read_or_make(file)


def test_a_full_disk_leaves_no_part_of_a_secret(tmp_path: Path) -> None:
    """An empty file would stop every later run of this home."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            server_secret.read_or_make(tmp_path / "secret")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    assert server_secret.read_or_make(tmp_path / "secret").startswith("meteora:")


@needs_root
def test_what_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    server_secret.read_or_make(tmp_path / "secret")
    os.chown(tmp_path / "secret", NOBODY, -1)
    with pytest.raises(SecretError, match=f"belongs to user {NOBODY}"):
        server_secret.read_or_make(tmp_path / "secret")
    (tmp_path / "prefect").mkdir()
    os.chown(tmp_path / "prefect", NOBODY, -1)
    with pytest.raises(SecretError, match="use a home of your own"):
        server_secret.make_private(tmp_path / "prefect")


@contextmanager
def answering(status: int) -> Generator[tuple[str, list[str | None]]]:
    """A server that says one thing, and what it was sent as `Authorization`."""
    sent: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.send_response(200 if self.path.endswith("/health") else status)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # ty: ignore[incompatible-method-override]
            """Not into the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Answer) as here:
        threading.Thread(target=here.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{here.server_address[1]}/api", sent
        here.shutdown()


@pytest.mark.parametrize(
    ("status", "said"), [(200, "asks for no secret, as an older"), (401, "does not take")]
)
def test_a_server_that_asks_for_no_secret_or_another_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    """Such as one of an older version, which lives as long as its last user."""
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "prefect"
    folder.mkdir()
    with answering(status) as (url, _), (folder / "server.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "address").write_text(url)
        with pytest.raises(local_server.ServerError, match=said):
            local_server.use_local_server(tmp_path)
    assert not {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING"} & os.environ.keys()


def test_a_server_of_the_user_s_is_sent_no_secret(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from pipelines.cli import run as cli_runs

from pipelines.workspace.environment import prepare

prepare()
assert cli_runs._find_server(Path(sys.argv[1])) is None
from prefect.client.orchestration import get_client

with get_client(sync_client=True) as client:
    client.request("GET", "/health")
assert "PREFECT_API_AUTH_STRING" not in os.environ
"""
    with answering(200) as (url, sent):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            check=True, env=without_prefect() | {"PREFECT_API_URL": url},
        )  # fmt: skip
    assert sent
    assert not any(sent)
    assert not (tmp_path / "prefect").exists()
