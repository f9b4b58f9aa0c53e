"""The half of the small Hub that takes uploads: commits, branches, tags, and git's large files."""

import base64
import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.pipelines.hub.hub_server import Fault, Handler, HubServer, Repo, git_sha1, running_hub

Answer = tuple[int, Any]
"""A status and a body of JSON."""

NAME = "org/model"
"""What tests publish."""
FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class GitRepo(Repo):
    """A repository with a history: each commit is all of its files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Objects of git's large file storage, by SHA-256."""
    parents: dict[str, str] = field(default_factory=dict)
    altered: dict[str, bytes] = field(default_factory=dict)
    """What lands in a commit in place of what was sent, by path."""

    def __post_init__(self) -> None:
        if not self.branches:
            self.commit_files("main", self.files)

    def at(self, revision: str) -> Repo | None:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            return None
        return Repo(self.commits[commit], commit, private=self.private, card=self.card)

    def list_refs(self) -> dict[str, list[dict[str, str]]]:
        def entries(of: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": n, "targetCommit": c} for n, c in of.items()]

        return {"branches": entries(self.branches), "tags": entries(self.tags), "converts": []}

    def commit_files(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit that holds `files` to a branch."""
        parent = self.branches.get(branch, "")
        content = "".join(path + git_sha1(files[path]) for path in sorted(files))
        text = f"{parent}{len(self.commits)}{content}".encode()
        commit = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.commits[commit], self.parents[commit] = dict(files), parent
        self.branches[branch] = commit
        return commit

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class UploadHandler(Handler):
    def do_POST(self) -> None:  # noqa: N802  (its name there)
        self._write("post")

    def do_PUT(self) -> None:  # noqa: N802  (its name there)
        self._write("put")

    def do_DELETE(self) -> None:  # noqa: N802  (its name there)
        self._write("delete")

    def _write(self, kind: str) -> None:
        body = self._read()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            kind = parts[4]
        elif parts[0] == "api":
            kind = parts[1]
        elif parts[-1] == "batch":
            kind = "batch"
        self.server.requests.append((kind, self.path, self.headers.get("Authorization", "")))
        fault = self.server.fault_of(kind, self.path)
        if fault is not None and not fault.applied:
            self._fail(fault)
            return
        if kind == "validate-yaml":
            status, answer = 200, {"errors": [], "warnings": []}
        else:
            status, answer = self._answer(kind, parts, body)
        if fault is not None:
            self._fail(fault)
        else:
            self._send(json.dumps(answer).encode(), status, {"Content-Type": "application/json"})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:  # the client was killed: a real Hub keeps no part of a file
                raise ConnectionError(f"{len(body)} of {length} bytes came")
            return body
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, fault: Fault) -> None:
        """Answer with the fault's status, or cut the connection without an answer."""
        if fault.at_last is not None:
            fault.at_last()
        if fault.hang:
            self.server.closing.wait(60)
        if fault.status:
            self._send(fault.body or b"", fault.status, fault.headers)
        else:
            self.close_connection = True

    def _answer(self, kind: str, parts: list[str], body: bytes) -> Answer:
        if kind == "put":  # a signed address: whoever holds it may write
            return self._put(parts, body)
        if self.may() != "write":
            return (403 if self.may() else 401), {"error": "this token may not write"}
        if kind == "repos":
            return self._create(json.loads(body))
        where = parts[:2] if kind == "batch" else parts[2:4]
        repo = self.server.repos.get("/".join(where).removesuffix(".git"))
        if not isinstance(repo, GitRepo):
            return 404, {"error": "there is no such repository"}
        url = f"{self.server.endpoint}/{'/'.join(where)}"
        return WRITES[kind](repo, "/".join(parts[5:]), body, url)

    def _create(self, asked: dict[str, Any]) -> Answer:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo"}
        private = asked.get("visibility") == "private"
        self.server.repos[name] = GitRepo(dict(FIRST), private=private)
        return 200, {"url": f"{self.server.endpoint}/{name}"}

    def _put(self, parts: list[str], body: bytes) -> Answer:
        repo = self.server.repos["/".join(parts[1:3]).removesuffix(".git")]
        assert isinstance(repo, GitRepo)
        repo.large[parts[3]] = body
        return 200, {}


def repo_of(server: HubServer) -> GitRepo:
    """The repository `NAME`."""
    repo = server.repos[NAME]
    assert isinstance(repo, GitRepo)
    return repo


def _preupload(repo: GitRepo, branch: str, body: bytes, _url: str) -> Answer:
    files = repo.commits[repo.branches[branch]]
    return 200, {"files": [_mode(file["path"], files) for file in json.loads(body)["files"]]}


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the hash of what lies there now."""
    is_large = path.endswith(".safetensors")
    there = files.get(path)
    oid = None
    if there is not None:
        oid = hashlib.sha256(there).hexdigest() if is_large else git_sha1(there)
    mode = "lfs" if is_large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _paths_info(repo: GitRepo, revision: str, body: bytes, _url: str) -> Answer:
    commit = repo.at(revision)
    paths = parse_qs(body.decode())["paths"]
    return 200, [commit.entry(path) for path in paths if commit and path in commit.files]


def _batch(repo: GitRepo, _rest: str, body: bytes, url: str) -> Answer:
    """Where each large object is to be put; nowhere, if it is here already."""
    objects = json.loads(body)["objects"]
    for entry in objects:
        if entry["oid"] not in repo.large:
            href = url.replace(urlsplit(url).path, f"/storage{urlsplit(url).path}/{entry['oid']}")
            entry["actions"] = {"upload": {"href": href}}
    return 200, {"objects": objects}


def _commit(repo: GitRepo, branch: str, body: bytes, url: str) -> Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    header = lines[0]["value"]
    if branch not in repo.branches:
        return 404, {"error": "there is no such branch"}
    if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
        return 412, {"error": "A commit has happened since. Please refresh and try again."}
    files = dict(repo.commits[repo.branches[branch]])
    for line in lines[1:]:
        value = line["value"]
        match line["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile" if value["oid"] in repo.large:
                files[value["path"]] = repo.large[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
            case _:
                return 400, {"error": f"not possible: {line['key']}"}
    commit = repo.commit_files(branch, files | repo.altered)
    return 200, {"commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "success": True}


def _branch(repo: GitRepo, name: str, body: bytes, _url: str) -> Answer:
    if not body:  # a DELETE
        return (200, {}) if repo.branches.pop(name, None) else (404, {"error": "no such branch"})
    if name in repo.branches:
        return 409, {"error": "the branch exists"}
    start = json.loads(body).get("startingPoint", "main")
    repo.branches[name] = repo.branches.get(start, start)
    return 200, {}


def _tag(repo: GitRepo, revision: str, body: bytes, _url: str) -> Answer:
    name = json.loads(body)["tag"]
    if name in repo.tags:
        return 409, {"error": "the tag exists"}
    commit = repo.at(revision)
    if commit is None:
        return 404, {"error": "there is no such revision"}
    repo.tags[name] = commit.commit
    return 200, {}


WRITES: dict[str, Callable[[GitRepo, str, bytes, str], Answer]] = {
    "preupload": _preupload,
    "paths-info": _paths_info,
    "batch": _batch,
    "commit": _commit,
    "branch": _branch,
    "tag": _tag,
}
"""By the kind of request: what the repository, the rest of the path and the body come to."""


@contextmanager
def running_upload_hub() -> Generator[HubServer]:
    """A small Hub on loopback that takes uploads from the token `writer`."""
    with running_hub(UploadHandler) as server:
        server.tokens = {"writer": "write", "reader": "read"}
        yield server
