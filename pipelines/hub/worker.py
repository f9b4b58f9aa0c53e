"""The process that makes one request to the Hub, so that the request can be killed.

`huggingface_hub` waits 386 s for a server that accepts and never answers, longer for one that sends
single bytes, and as long as a `Retry-After` says; no argument limits all of these.

Imports nothing of ours but `processes`, since a process starts for every request.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2  # what huggingface_hub speaks HTTP with
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    RepoFolder,
    hf_hub_download,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.processes.child import connect_to_parent, limit_memory

SLACK = 64 * 1024
"""Bytes by which a file may exceed its listed size before the kernel stops it."""

MOST_MEMORY = 2 << 30
"""The memory limit in bytes: the client unpacks and parses a whole answer, of any size."""

MOST = 1 << 62
"""The largest size or count to accept; the ledger's integers have 64 bits."""


class UnexpectedAnswerError(ValueError):
    """A value in an answer has another type than in the Hub's API."""


KINDS = (
    (GatedRepoError, "gated"),
    (DisabledRepoError, "disabled"),
    (RevisionNotFoundError, "revision"),
    (RemoteEntryNotFoundError, "entry"),
    (OfflineModeIsEnabled, "offline"),
    (FileMetadataError, "protocol"),
    (MemoryError, "protocol"),
    (UnexpectedAnswerError, "protocol"),
    (HFValidationError, "reference"),
)
"""The kind of each exception of the client; subclasses come before their bases."""


def refs(api: HfApi, repo_id: str, *, pull_requests: bool = False) -> dict[str, str]:
    """The commit of each branch, tag, and, if asked for, pull request, as `refs/pr/<number>`.

    A branch comes before a tag of its name, as in the Hub.
    """
    found = api.list_repo_refs(repo_id, include_pull_requests=pull_requests)
    named = [(ref.name, ref.target_commit) for ref in [*found.tags, *found.branches]]
    named += [(ref.ref, ref.target_commit) for ref in found.pull_requests or ()]
    return {_text(name): _text(commit) for name, commit in named}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UnexpectedAnswerError(f"{str(value)[:60]!r} where a text belongs")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST:
        raise UnexpectedAnswerError(f"{str(value)[:60]!r} where a number from 0 belongs")
    return value


def _texts(value: object) -> list[str]:
    return [_text(one) for one in (value if isinstance(value, list) else [value])]


def listing(
    api: HfApi, repo_id: str, *, revision: str, folder: str, most: int
) -> list[dict[str, Any]]:
    """The entries of one folder at a commit, at most `most` of them, with the Hub's own hashes."""
    tree = api.list_repo_tree(repo_id, folder or None, revision=revision)
    return [_entry(item) for item in itertools.islice(tree, most)]


def _entry(item: RepoFile | RepoFolder) -> dict[str, Any]:
    if isinstance(item, RepoFolder):
        return {"path": _text(item.path), "size": -1, "git_sha1": "", "sha256": ""}
    return {
        "path": _text(item.path),
        "size": _number(item.size),
        "git_sha1": _text(item.blob_id),
        "sha256": _text(item.lfs.sha256) if item.lfs else "",
    }


def about(api: HfApi, repo_id: str, *, revision: str) -> dict[str, Any]:
    """The author, licence, bases, downloads and tags of a repository."""
    info = api.model_info(repo_id, revision=revision)
    card = info.card_data.to_dict() if info.card_data else {}
    return {
        "author": _text(info.author or ""),
        "licences": _texts(card.get("license") or []),
        "base_models": _texts(card.get("base_model") or []),
        "downloads": _number(info.downloads or 0),
        "tags": _texts(info.tags or []),
    }


def fetch(api: HfApi, repo_id: str, *, revision: str, files: dict[str, int], into: str) -> None:
    """Download files, of listed sizes, into a folder that has none of them."""
    for path, size in files.items():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if hard != resource.RLIM_INFINITY and hard < size + SLACK:
            raise OSError(errno.EDQUOT, f"`ulimit -f` allows no file of {size:,} bytes")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + SLACK, hard))
        hf_hub_download(
            repo_id, path, revision=revision, local_dir=into, endpoint=api.endpoint, token=api.token
        )


def search(api: HfApi, repo_id: str, *, tags: list[str], limit: int) -> list[dict[str, Any]]:
    """The most downloaded adapters of a base, each with the commit of its main branch."""
    asked = [f"base_model:adapter:{repo_id}", *tags]
    found = api.list_models(filter=asked, sort="downloads", limit=limit, expand=["sha"])
    return [{"repo_id": _text(model.id), "revision": _text(model.sha or "")} for model in found]


def is_private(api: HfApi, repo_id: str) -> bool:
    """Whether only people whom the owner allows can see a repository."""
    return bool(api.model_info(repo_id).private)


def create_repository(api: HfApi, repo_id: str, *, private: bool) -> None:
    """Make a repository, unless there is one."""
    api.create_repo(repo_id, private=private, exist_ok=True)


def commit(
    api: HfApi,
    repo_id: str,
    *,
    branch: str,
    parent: str,
    message: str,
    delete: list[str],
    add: dict[str, str] | None = None,
    copy: Sequence[str] = (),
    copy_from: str = "",
) -> None:
    """Commit once to a branch that is still at `parent`.

    Files to add are named by their paths in the repository; copies come from commit `copy_from`.
    """
    operations = [
        *(CommitOperationAdd(path, file) for path, file in (add or {}).items()),
        *(CommitOperationCopy(path, path, src_revision=copy_from) for path in copy),
        *(CommitOperationDelete(path, is_folder=False) for path in delete),
    ]
    api.create_commit(
        repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
    )


UNKNOWN_SENDER = "Invalid credentials in Authorization header"
"""The Hub's text for a token that it does not know, for any request."""
SECONDS = re.compile(r"(?:.*\bt=)?(\d{1,6})\s*")
"""The seconds in `RateLimit: "api";r=0;t=55`, and in `Retry-After: 55`."""
TRANSPORT = (httpx2.TransportError, ConnectionError, TimeoutError, socket.gaierror)

OPERATIONS: dict[str, Callable[..., Any]] = {
    "refs": refs, "listing": listing, "about": about, "fetch": fetch, "search": search,
    "is_private": is_private, "create_repository": create_repository, "commit": commit,
    "create_branch": HfApi.create_branch, "delete_branch": HfApi.delete_branch,
    "create_tag": HfApi.create_tag,
}  # fmt: skip


def describe(error: BaseException) -> dict[str, Any]:
    """The kind, HTTP status and text of an error, and the seconds that the Hub asks to wait.

    `hub_error` makes a sentence of them.

    The client hides several kinds behind one exception, so its causes are searched, too.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    responses = (getattr(link, "response", None) for link in chain)
    response = next((one for one in responses if one is not None), None)
    status, headers = (response.status_code, response.headers) if response is not None else (0, {})
    kind = next((name for link in chain for cls, name in KINDS if isinstance(link, cls)), "")
    if not kind and status == 401 and UNKNOWN_SENDER in str(error):
        kind = "token"
    if not kind and any(isinstance(link, RepositoryNotFoundError) for link in chain):
        kind = "auth" if status == 401 else "repository"
    if not kind and any(getattr(link, "errno", None) == errno.EFBIG for link in chain):
        kind = "oversize"
    if not kind and "Consistency check failed" in str(error):
        kind = "length"
    if not kind and not status and any(isinstance(link, TRANSPORT) for link in chain):
        kind = "connection"
    if not kind and not status and any(getattr(link, "errno", None) for link in chain):
        kind = "disk"
    if not kind and not status and any(isinstance(link, json.JSONDecodeError) for link in chain):
        kind = "protocol"  # such as the page of a proxy
    root = chain[-1] if kind == "connection" else error
    if isinstance(root, MemoryError):
        root = MemoryError("the answer needs more memory than it may take")
    wait = _seconds_to_wait(headers) if status == 429 else 0
    text = f"{type(root).__name__}: {root}"
    return {"kind": kind, "status": status, "text": text, "wait": wait}


def _seconds_to_wait(headers: Mapping[str, str]) -> int:
    """The seconds that a refusal asks to wait; 0 if it states none."""
    for name in ("RateLimit", "Retry-After"):
        if found := SECONDS.fullmatch(headers.get(name, "")):
            return int(found[1])
    return 0


def main() -> None:
    client = connect_to_parent()
    limit_memory(MOST_MEMORY)
    _, request = client.receive()
    api = HfApi(endpoint=request.pop("endpoint"), token=request.pop("token"))
    operation = OPERATIONS[request.pop("operation")]
    try:
        kind, value = "answer", operation(api, **request)
    except Exception as error:  # it goes to the parent, which raises its own
        kind, value = "error", describe(error)
    client.send(kind, value)


if __name__ == "__main__":
    main()
