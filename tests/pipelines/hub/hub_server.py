"""A small Hub on loopback, whose faults are asked for: what olah cannot be made to do."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@dataclass
class Repo:
    """One commit's files; a branch or a tag is a name for a commit."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    refs: dict[str, str] = field(default_factory=dict)
    listed: dict[str, bytes] = field(default_factory=dict)
    """What the listing hashes in place of the bytes that are sent."""
    listed_sizes: dict[str, int] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    private: bool = False

    def at(self, revision: str) -> Repo | None:
        """What the repository holds at a commit; None where it has no such one."""
        return self if revision == self.commit else None

    def list_refs(self) -> dict[str, list[dict[str, str]]]:
        refs = [{"name": n, "ref": n, "targetCommit": c} for n, c in self.refs.items()]
        asked = [{"name": "1", "ref": "refs/pr/1", "targetCommit": self.commit}]
        return {"branches": refs, "tags": [], "converts": [], "pullRequests": asked}

    def entry(self, path: str) -> dict[str, Any]:
        data = self.listed.get(path, self.files[path])
        size = self.listed_sizes.get(path, len(data))
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git_sha1(data)}
        if path.endswith(".safetensors"):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry

    def tree(self, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in self.files if path.startswith(prefix)]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside} - set(inside)
        return [
            *({"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)),
            *(self.entry(path) for path in inside if "/" not in path[len(prefix) :]),
        ]


class Main(Repo):
    """A repository whose files are asked for by its branch `main`, too."""

    def at(self, revision: str) -> Repo | None:
        return super().at(self.commit if revision == "main" else revision)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


@dataclass
class Fault:
    """What requests of a kind (`refs`, `tree`, `head`, `get`) get instead, the first `times`."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1_000
    spared: int = 0
    """So many of such requests are served before the first that gets it."""
    path: str = ""
    """Only requests for paths that end so."""
    hang: bool = False
    drop_after: int = -1
    """Close the connection after this many bytes of the body."""
    body: bytes | None = None
    """Sent in place of the file, under its own length."""
    applied: bool = False
    """What was asked for is done first; without a `status` the answer is then lost."""
    endless: bool = False
    """Bytes without end, under no announced length."""
    at_last: Callable[[], None] | None = None
    """Called before the answer, or in place of one; for requests that write."""
    fell_on: str = field(default="", init=False)
    """Kind and path of the request that got it last."""


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a hanging request would keep it from closing

    def __init__(self, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.tokens: dict[str, str] = {}
        """What each token may do: `read` or `write`; what is private asks for one."""
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str]] = []
        """Kind, path and `Authorization` of each."""
        self.num_bytes = 0
        """Of the files that were sent."""
        self.closing = threading.Event()
        self.seconds_per_body = 0.0
        self._counting = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_of(self, kind: str, path: str) -> Fault | None:
        """The fault that this request gets, which is one less to come; None where it gets none."""
        fault = self.faults.get(kind)
        if fault is None or fault.times <= 0 or not path.endswith(fault.path):
            return None
        with self._counting:
            if fault.spared > 0:
                fault.spared -= 1
                return None
            fault.times -= 1
            fault.fell_on = f"{kind} {path}"
        return fault

    def count(self, kind: str) -> int:
        return sum(1 for asked, _, _ in self.requests if asked == kind)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves a broken pipe, which is what was wanted."""


@contextmanager
def running_hub(handler: type[Handler] | None = None) -> Generator[HubServer]:
    with HubServer(handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client's delayed acknowledgment
    server: HubServer  # ty: ignore[incompatible-mutable-override]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name there)
        pass

    def do_HEAD(self) -> None:
        self._serve("head")

    def do_GET(self) -> None:
        self._serve("get")

    def _serve(self, kind: str) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "datasets":  # their files; else they are asked as models are
            del parts[0]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            kind = parts[4] if len(parts) > 4 else "revision" if len(parts) > 3 else "search"
        authorization = self.headers.get("Authorization", "")
        self.server.requests.append((kind, self.path, authorization))
        fault = self.server.fault_of(kind, self.path)
        if fault is not None:
            if fault.hang:
                self.server.closing.wait(60)
                self.close_connection = True
                return
            if fault.status:
                self._send(fault.body or b"", fault.status, fault.headers)
                return
        if kind in ("head", "get"):
            self._file(kind, parts, fault)
        else:
            self._api(kind, parts[2:])

    def _api(self, kind: str, parts: list[str]) -> None:
        if kind == "search":
            self._search()
            return
        repo = self._repo(parts)
        if repo is None:
            return
        if kind == "refs":
            self._json(repo.list_refs())
            return
        commit = repo.at(parts[3] if len(parts) > 3 else "main")
        if commit is None:
            self._error("RevisionNotFound")
            return
        repo = commit
        match kind:
            case "tree":
                folder = "/".join(part for part in parts[4:] if part)
                tree = repo.tree(folder)
                self._json(tree) if tree else self._error("EntryNotFound")
            case "revision":
                name = "/".join(parts[:2])
                about = {"id": name, "author": parts[0], "downloads": 7, "tags": ["lora"]}
                about |= {"sha": repo.commit, "private": repo.private}
                self._json({**about, "siblings": [], "cardData": repo.card})

    def _repo(self, parts: list[str]) -> Repo | None:
        """The repository of a request; None, and an answer sent, where it may not be seen."""
        repo = self.server.repos.get("/".join(parts[:2]))
        if repo is not None and not (repo.private and self.may() == ""):
            return repo
        if self.may():
            self._error("RepoNotFound")
        else:
            self._error("RepoNotFound", 401 if self.server.tokens else 404)
        return None

    def may(self) -> str:
        """What the sender's token allows; empty without a known one."""
        return self.server.tokens.get(self.headers.get("Authorization", "")[7:], "")

    def _search(self) -> None:
        wanted = set(parse_qs(urlsplit(self.path).query).get("filter", []))
        found = [
            {"id": name, "sha": repo.commit}
            for name, repo in self.server.repos.items()
            if wanted <= set(repo.card.get("tags", []))
        ]
        self._json(found)

    def _file(self, kind: str, parts: list[str], fault: Fault | None) -> None:
        repo = self._repo(parts)
        if repo is None:
            return
        repo = repo.at(parts[3])
        if repo is None:
            self._error("RevisionNotFound")
            return
        path = "/".join(parts[4:])
        if path not in repo.files:
            self._error("EntryNotFound")
            return
        data = fault.body if fault and fault.body is not None else repo.files[path]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{repo.entry(path)["oid"]}"'}
        if kind == "head":
            size = repo.entry(path)["size"]
            self._send(b"", 200, {**headers, "Content-Length": str(size)})
            return
        self._body(data, headers, fault)

    def _body(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        asked, size = self.headers.get("Range"), len(data)
        if asked:
            begin, _, last = asked.removeprefix("bytes=").partition("-")
            data = data[int(begin) : int(last or size) + 1]
            headers |= {"Content-Range": f"bytes {begin}-{int(begin) + len(data) - 1}/{size}"}
        self.send_response(206 if asked else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault and fault.endless:
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            while not self.server.closing.is_set():
                self.wfile.write(b"x" * 65_536)
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        time.sleep(self.server.seconds_per_body)
        if fault and fault.drop_after >= 0:
            data, self.close_connection = data[: fault.drop_after], True
        self.server.num_bytes += len(data)
        self.wfile.write(data)

    def _error(self, code: str, status: int = 404) -> None:
        self._send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
