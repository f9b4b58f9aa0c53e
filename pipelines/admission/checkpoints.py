"""The checkpoint that a person names, from this disk or from the Hub, and the place of its base.

The saved token is sent to an owner only if the person allows it. The name of a repository and the
base that a checkpoint names are no reason to send it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils.hub import resolve_revision

import meteora
from meteora.artifacts import COMMIT, AdapterRef
from meteora.base.sources import INDEX
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, STATISTICS, read_manifest
from meteora.checkpoint.resolve import base_files, find_checkpoint, is_hub_id
from pipelines.hub.client import hub_for, is_offline
from pipelines.hub.errors import HubConnectionError, UnusableRepositoryError
from pipelines.hub.repositories import check_before_caching
from pipelines.hub.snapshot import cached
from pipelines.workspace.checkpoints import base_at_hand, checkpoint_folder
from pipelines.workspace.machine import choose_device, is_too_large, memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.checkpoint.manifest import BaseEntry
    from pipelines.hub.client import Hub

CHECKPOINT_FILES = (MANIFEST, EXPERTS, GATES, STATISTICS)
"""What may be downloaded of a checkpoint."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint on this disk."""

    folder: Path
    base_folder: Path | None = None
    """None if its base comes from the Hub or a package."""
    download: dict[str, str | bool] = field(default_factory=dict)
    """Options for the download of its base, as `meteora.load` takes them."""
    device: str = "auto"
    """The device of the model, as `choose_device` takes it. With `auto`, a model too large for one
    device is spread over all of them."""
    dtype: str = "auto"
    """The dtype of the base; `auto`: as in its files."""

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The fused model and its tokenizer; raises what `meteora.load` raises."""
        spread = self.device == "auto" and is_too_large(self._num_bytes(), memory_bytes())
        return meteora.load(
            self.folder,
            base_folder=self.base_folder,
            device=None if spread else choose_device(self.device),
            device_map="auto" if spread else None,
            dtype=self.dtype,
            download=self.download,
        )

    def _num_bytes(self) -> int:
        """The bytes of experts and base, which is downloaded first if it is not here."""
        base = base_files(read_manifest(self.folder), self.base_folder, self.download)
        files = [self.folder / EXPERTS, *([base] if base.is_file() else base.glob("*.safetensors"))]
        return sum(path.stat().st_size for path in files if path.is_file())


def find_folder(
    name: str,
    home: Path,
    token_for: Collection[str] = (),
    *,
    statistics: bool = False,
    whole: bool = True,
) -> Path:
    """Find the folder of a checkpoint; download a checkpoint of the Hub.

    Args:
        name: A folder, `owner/name[@revision]` on the Hub, or an id of the ledger.
        token_for: Owners, or `owner/name`, to whom the saved token is sent.
        statistics: Also download the statistics that its gates were fitted to.
        whole: Download the tensors too; else only the manifest.

    Raises:
        UnknownError: The ledger has the id, but no checkpoint with it.
        HubError: The Hub cannot be reached, has no such one, is plain http over a network, or has
            one that is larger than is taken.
        CheckpointError: The Hub has no such checkpoint, or not at this revision.
    """
    folder = checkpoint_folder(name, home)
    repo_id, _, revision = name.partition("@")
    if folder.is_dir() or not is_hub_id(repo_id):
        return folder
    is_here = cached(repo_id, MANIFEST, revision or None) is not None
    try:
        hub = _hub_that_answers(repo_id, token_for, is_here=is_here)
    except (HubConnectionError, UnusableRepositoryError) as error:  # or a mistyped path
        sentence = f"{name}: there is no such folder here; and as a repository, {error}"
        raise type(error)(sentence) from error
    options = _download_options(hub)
    at = resolve_revision(repo_id, revision or None, token=options["token"])
    commit = getattr(at, "resolved", at) or ""
    files = CHECKPOINT_FILES if whole else (MANIFEST,)
    needed = [file for file in files if file in {MANIFEST, EXPERTS}]  # the others may be absent
    all_here = all(cached(repo_id, file, commit) for file in needed)
    if COMMIT.fullmatch(commit) and not (all_here or is_offline()):
        check_before_caching(AdapterRef(repo_id, commit), files, hub=hub)
    return find_checkpoint(repo_id, at, download=options, whole=whole, statistics=statistics)


def find(
    name: str,
    home: Path,
    base: Path | None = None,
    token_for: Collection[str] = (),
    *,
    statistics: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> FoundCheckpoint:
    """Find a checkpoint and its base; raises what `find_folder` raises.

    Args:
        base: The folder of the base, if the person gives one.
        device: As `choose_device` takes it.

    Raises:
        DeviceError: There is no such device here.
        CheckpointError: The checkpoint is not sound.
        DamagedBaseError: The base in this home is damaged.
    """
    choose_device(device)  # one that is not here is refused before anything is downloaded
    folder = find_folder(name, home, token_for, statistics=statistics)
    return replace(find_base(folder, home, base, token_for), device=device, dtype=dtype)


def find_base(
    folder: Path,
    home: Path,
    base: Path | None,
    token_for: Collection[str] = (),
    *,
    is_loaded: bool = True,
) -> FoundCheckpoint:
    """Find the base of a checkpoint in a folder; arguments and errors are those of `find`.

    Unless the base will be loaded, the Hub is not asked for it.
    """
    named = read_manifest(folder).base
    at_hand = base or base_at_hand(folder, home)
    if at_hand is not None or not (is_loaded and is_hub_id(named.repo_id)):
        return FoundCheckpoint(folder, at_hand)
    hub = _hub_that_answers(named.repo_id, token_for, is_here=_base_is_cached(named))
    if not (_base_is_cached(named) or is_offline()):
        check_before_caching(AdapterRef(named.repo_id, named.revision), hub=hub)
    return FoundCheckpoint(folder, download=_download_options(hub))


def _base_is_cached(named: BaseEntry) -> bool:
    """Whether the Hub's cache has the config of a base, and its weights or their index."""
    config, *weights = (
        cached(named.repo_id, file, named.revision)
        for file in ("config.json", "model.safetensors", INDEX)
    )
    return config is not None and any(weights)


def _hub_that_answers(repo_id: str, token_for: Collection[str], *, is_here: bool) -> Hub:
    """The Hub to download from, with the token to send.

    Refuses an unsafe endpoint, and a Hub that does not answer if it is needed.
    """
    hub = hub_for(repo_id, token_for)
    hub.url()  # refuses an endpoint that anyone on the network could answer for
    if not (is_here or is_offline()):
        hub.ask("refs", repo_id)  # without a network, the Hub's client retries for 23 s
    return hub


def _download_options(hub: Hub) -> dict[str, str | bool]:
    return {"token": hub.token or False}
