"""An adapter's files from a repository: its config first, and its weights only if that is sound.

A cache holds, for each commit,

    <commit>/          config, weights and card, whole or absent     <commit>.json        as listed
    <commit>.claims/   the config of a refused adapter               <commit>.claims.json

so neither is downloaded twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.adapters import reader
from meteora.adapters.files import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, pickled_weights
from meteora.untrusted.findings import AdapterError, listed
from pipelines.hub.card import MAX_CARD_BYTES
from pipelines.hub.errors import HubDamageError, HubFilesError, HubSizeError
from pipelines.hub.listing import check_sizes, fetch_files, list_folder, where
from pipelines.hub.snapshot import fault_of, locked, put_in_place, read_manifest, staging

if TYPE_CHECKING:
    from meteora.adapters.config import OnExtras
    from meteora.artifacts import AdapterRef
    from pipelines.hub.client import Hub
    from pipelines.hub.snapshot import ListedFile

MAX_ADAPTER_BYTES = 4 << 30
MAX_NAME = 160
"""Characters of a subfolder in the name of its folder; file systems allow 255 bytes in all."""
BESIDE = (".claims", ".json", ".lock", ".partial")
"""Suffixes of the files and folders beside a folder of the cache."""


def download(
    ref: AdapterRef,
    cache_dir: Path,
    *,
    hub: Hub,
    modules_to_save: OnExtras = "refuse",
) -> Path:
    """The folder with an adapter's config, weights and card; downloaded unless it exists.

    Earlier downloads are hashed again, without a request to the Hub.

    Args:
        modules_to_save: As `adapters.read` takes it.

    Raises:
        AdapterError: Its config alone is refused; its weights are not downloaded.
        HubFilesError: The folder has no adapter; the message lists its files.
        HubSizeError: It is larger than `MAX_ADAPTER_BYTES`, or than the Hub lists it.
        HubHashError: The bytes are not those that the repository lists.
        HubDamageError: The bytes of an earlier download have changed on this disk.
        HubError: The Hub does not deliver; `retry` says whether waiting can help.
    """
    folder = _snapshot(ref, cache_dir)
    with locked(folder, hub.for_bytes(MAX_ADAPTER_BYTES).timeout_seconds):
        here = downloaded(ref, cache_dir, modules_to_save=modules_to_save)
        if here is not None:
            return here
        weights, small = _adapter_files(hub, ref)
        with staging(folder) as staged:
            fetch_files(hub, ref, small, staged)
            try:
                _check_config(ref, staged, modules_to_save)
            except AdapterError:
                put_in_place(staged, _claims(folder), small)
                raise
            fetch_files(hub, ref, [weights], staged)
            put_in_place(staged, folder, [*small, weights])
    return folder / ref.subfolder


def downloaded(
    ref: AdapterRef, cache_dir: Path, *, modules_to_save: OnExtras = "refuse"
) -> Path | None:
    """The folder of an earlier `download`, whose files are hashed again; None if there is none.

    Raises:
        AdapterError: Its config alone is refused.
        HubDamageError: The bytes are no longer those that the repository listed.
    """
    folder = _snapshot(ref, cache_dir)
    for known in (folder, _claims(folder)):
        if (files := read_manifest(known)) is None:
            continue
        for file in files:
            if fault := fault_of(file, known):
                raise HubDamageError(
                    f"{where(ref)}: {file.path} {fault}; it was downloaded whole and has changed on"
                    f" this disk: delete {known} and run again"
                )
        if known == folder:
            return folder / ref.subfolder
        _check_config(ref, known, modules_to_save)  # another policy may accept it now
    return None


def is_downloaded(ref: AdapterRef, cache_dir: Path) -> bool:
    """Whether `download` has left an adapter, or its refused config; nothing is hashed."""
    folder = _snapshot(ref, cache_dir)
    return any(read_manifest(known) is not None for known in (folder, _claims(folder)))


def adapter_bytes(ref: AdapterRef, *, hub: Hub) -> int:
    """The bytes to download, by the Hub's listing; raises `download`'s errors of a listing."""
    weights, small = _adapter_files(hub, ref)
    return weights.size + sum(file.size for file in small)


def _snapshot(ref: AdapterRef, cache_dir: Path) -> Path:
    """The folder of an adapter's files; no two adapters have the same."""
    inside = ref.subfolder.replace("/", "--")
    if "--" in ref.subfolder or inside.endswith(BESIDE) or len(inside) > MAX_NAME:
        inside = hashlib.sha256(ref.subfolder.encode()).hexdigest()
    name = f"{ref.revision}--{inside}" if inside else ref.revision
    return cache_dir / ref.repo_id.replace("/", "--") / name


def _claims(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.claims")


def _check_config(ref: AdapterRef, folder: Path, modules_to_save: OnExtras) -> None:
    config = f"{_place(ref)}, {CONFIG}"
    reader.check_config(folder / ref.subfolder, config, modules_to_save=modules_to_save)


def _place(ref: AdapterRef) -> str:
    return ", ".join(filter(None, (where(ref), ref.subfolder)))


def _adapter_files(hub: Hub, ref: AdapterRef) -> tuple[ListedFile, list[ListedFile]]:
    """The weights, and the small files beside them: the config, then the card if any."""
    prefix = f"{ref.subfolder}/" if ref.subfolder else ""
    entries = list_folder(hub, ref, ref.subfolder)
    files = {file.path: file for file in entries if file.size >= 0}
    weights = [prefix + name for name in WEIGHTS if prefix + name in files][:1]
    if prefix + CONFIG not in files or not weights:
        raise HubFilesError(_no_adapter(ref, entries))
    config, card = files[prefix + CONFIG], files.get(f"{prefix}README.md")
    if config.size > MAX_CONFIG_BYTES:
        raise HubSizeError(f"{ref.repo_id}: {CONFIG} has {config.size} bytes; it is no config")
    small = [config, card] if card is not None and card.size <= MAX_CARD_BYTES else [config]
    check_sizes(ref, [*small, files[weights[0]]], MAX_ADAPTER_BYTES)
    return files[weights[0]], small


def _no_adapter(ref: AdapterRef, entries: Sequence[ListedFile]) -> str:
    needed = f"{_place(ref)}: {CONFIG} and {WEIGHTS[0]} do not both lie there"
    if pickled_weights(file.path.rpartition("/")[2] for file in entries):
        return (
            f"{needed}. Its weights are a pickle, which can run code when it is opened and is never"
            " downloaded; ask its owner for safetensors"
        )
    if folders := sorted(file.path for file in entries if file.size < 0):
        return f"{needed}; say which of its folders is meant with subfolder: {listed(folders, 8)}"
    return f"{needed}; it holds {listed(sorted(file.path for file in entries), 8) or 'nothing'}"
