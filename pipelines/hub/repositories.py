"""Adapters and bases on the Hub: turn names into commits, and download commits.

When a branch cannot be looked up (401, 403, 429, 500), the Hub's client silently returns the files
of an old download. So this room passes only commits to it. Every file is checked against the
repository's own listing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from meteora.artifacts import COMMIT, REPO_ID, AdapterRef, BaseSpec
from meteora.base.sources import INDEX, SHARD, TEXTS
from meteora.untrusted.findings import listed
from pipelines.hub.client import Hub, is_offline, without_password
from pipelines.hub.errors import (
    HubConnectionError,
    HubFilesError,
    HubOfflineError,
    HubProtocolError,
    HubReferenceError,
    HubRevisionError,
)
from pipelines.hub.listing import check_room, check_sizes, fetch_files, list_folder, where
from pipelines.hub.snapshot import ListedFile, has_size, keep_whole, staging

REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-/]{0,254}")
PULL_REQUEST = "refs/pr/"
SUBFOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")

BASE_FILES = re.compile("|".join([*map(re.escape, (*TEXTS, INDEX, "README.md")), SHARD.pattern]))
PROFILE_FILES = re.compile(
    r"config\.json|(tokenizer|special_tokens_map|added_tokens|vocab|tokenizer_config)\.json|"
    r"merges\.txt|tokenizer\.model"
)
"""Files that distinguish bases from each other."""

MAX_PROFILE_BYTES = 64 << 20
MAX_BASE_BYTES = 160 << 30
MAX_CHECKPOINT_BYTES = 160 << 30


def resolve(
    text: str,
    *,
    subfolder: str = "",
    hub: Hub,
    is_here: Callable[[AdapterRef], bool] | None = None,
) -> AdapterRef:
    """Pin `owner/name[@revision]` to its present commit.

    A revision is a branch, a tag, a commit, or a pull request of the Hub, as `refs/pr/1`.

    Args:
        is_here: Whether the files of a commit are on this disk. Then the Hub is not asked for it.

    Raises:
        HubReferenceError: The text or the subfolder has the wrong form.
        HubRevisionError: The repository has no such branch, tag or commit.
        HubError: The Hub does not answer; earlier downloads are no substitute.
    """
    repo_id, at, revision = text.partition("@")
    wanted = revision if at else "main"
    if not REPO_ID.fullmatch(repo_id) or ".." in wanted or not REVISION.fullmatch(wanted):
        raise HubReferenceError(
            f"{text!r} is not owner/name or owner/name@revision; a folder on this machine is"
            " written path:<folder>"
        )
    if subfolder and (not SUBFOLDER.fullmatch(subfolder) or ".." in subfolder):
        raise HubReferenceError(f"{text}: {subfolder!r} is not a folder inside a repository")
    if COMMIT.fullmatch(revision):
        pinned = AdapterRef(repo_id, revision, subfolder)
        if not (is_offline() or (is_here and is_here(pinned))):  # offline, the download checks it
            _check_commit(hub, AdapterRef(repo_id, revision))
        return pinned
    if is_offline():
        raise HubOfflineError(
            f"{text} names no commit, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE switches the"
            f" network off, so it cannot be looked up; write {repo_id}@<commit of 40 hex digits>"
        )
    try:
        refs = hub.ask("refs", repo_id, text, pull_requests=wanted.startswith(PULL_REQUEST))
    except HubConnectionError as error:
        if is_here is None:
            raise
        raise HubConnectionError(
            f"{error}; what an earlier run downloaded is used without the Hub if its commit of 40"
            " hex digits is named after the @"
        ) from error
    if wanted not in refs:
        some = listed(sorted(refs), 10) or "none"
        raise HubRevisionError(f"{repo_id} has no branch or tag {wanted!r}; it has: {some}")
    if not COMMIT.fullmatch(refs[wanted]):
        endpoint = without_password(hub.url())
        raise HubProtocolError(f"{text}: {endpoint} gave no commit for it: {refs[wanted][:60]!r}")
    return AdapterRef(repo_id, refs[wanted], subfolder)


def base_bytes(spec: BaseSpec, out: Path, *, hub: Hub) -> int:
    """The bytes that `download_base` would still download; raises its errors of a listing.

    A file in the folder `out` counts as complete if it has its size; it is not hashed.
    """
    ref = AdapterRef(spec.base_model, spec.base_revision)
    return sum(file.size for file in _base_files(hub, ref) if not has_size(file, out))


def download_base(spec: BaseSpec, out: Path, *, hub: Hub) -> None:
    """Download a base's config, tokenizer and safetensors, at its commit, into the folder `out`.

    Complete files of an earlier attempt stay, since a base can take hours; all others in the folder
    are removed. The errors are those of `adapter.download`.
    """
    ref = AdapterRef(spec.base_model, spec.base_revision)
    files = _base_files(hub, ref)
    out.mkdir(parents=True, exist_ok=True)
    if left := keep_whole(files, out):
        fetch_files(hub, ref, left, out)


def check_before_caching(ref: AdapterRef, checkpoint: Collection[str] = (), *, hub: Hub) -> None:
    """Check sizes before the Hub's own client, which has no limit, downloads to its cache.

    Args:
        checkpoint: The files of a fused checkpoint; without any, it is a base.

    Raises:
        HubSizeError: The files are larger than is allowed.
        HubDiskError: The disk has no room for those that are not in the cache yet.
        HubError: The Hub lists no such files, or does not answer.
    """
    if checkpoint:
        files = [file for file in list_folder(hub, ref, "") if file.path in checkpoint]
        check_sizes(ref, files, MAX_CHECKPOINT_BYTES)
    else:
        files = _base_files(hub, ref)
    # the commits of a repository share their blobs there
    cache = Path(HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=ref.repo_id, repo_type="model") / "blobs"
    left = [file for file in files if not (blobs / (file.sha256 or file.git_sha1)).is_file()]
    check_room(ref, sum(file.size for file in left), cache, "set HF_HUB_CACHE to another folder")


def download_profile(ref: AdapterRef, out: Path, *, hub: Hub) -> None:
    """Download config and tokenizer, which distinguish bases, into a new folder."""
    files = _matching(hub, ref, PROFILE_FILES)
    if not any(file.path == "config.json" for file in files):
        raise HubFilesError(f"{where(ref)} has no config.json")
    check_sizes(ref, files, MAX_PROFILE_BYTES)
    with staging(out) as staged:
        fetch_files(hub, ref, files, staged)
        staged.rename(out)


def _matching(hub: Hub, ref: AdapterRef, names: re.Pattern[str]) -> list[ListedFile]:
    """The files at the top of a commit whose names match."""
    entries = list_folder(hub, ref, "")
    return [entry for entry in entries if entry.size >= 0 and names.fullmatch(entry.path)]


def _base_files(hub: Hub, ref: AdapterRef) -> list[ListedFile]:
    files = _matching(hub, ref, BASE_FILES)
    names = {file.path for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise HubFilesError(
            f"{where(ref)} holds no model of transformers in safetensors (config.json,"
            f" model*.safetensors); it holds {listed(sorted(names), 8) or 'nothing'}"
        )
    check_sizes(ref, files, MAX_BASE_BYTES)
    return files


def discover(base: str, *, tags: Sequence[str] = (), limit: int = 20, hub: Hub) -> list[AdapterRef]:
    """The most downloaded adapters whose cards name `base`, each with its commit.

    A card can be wrong, so each adapter must still be checked.
    """
    if not REPO_ID.fullmatch(base):
        raise HubReferenceError(f"{base!r} is not owner/name; adapters are found by their base's")
    found = hub.ask("search", base, f"adapters of {base}", tags=list(tags), limit=limit)
    return [
        AdapterRef(entry["repo_id"], entry["revision"])
        for entry in found[:limit]
        if REPO_ID.fullmatch(entry["repo_id"]) and COMMIT.fullmatch(entry["revision"])
    ]


def _check_commit(hub: Hub, ref: AdapterRef) -> None:
    # without a network this fails at once; the Hub's client tries to list files for 23 s
    if ref.revision in hub.ask("refs", ref.repo_id).values():
        return
    try:
        list_folder(hub, ref, "")
    except HubFilesError as error:  # a mirror answers so
        raise HubRevisionError(f"{ref.repo_id} has no commit {ref.revision}") from error
