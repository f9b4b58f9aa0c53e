"""Find a checkpoint in a folder or on the Hub, and load the base that it refers to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.hub import cached_file, resolve_revision

from meteora.artifacts import REPO_ID, BaseSpec, file_sha256
from meteora.base import loading
from meteora.base.download import NO_TOKEN, download_base
from meteora.base.sources import (
    GGUF,
    KNOWN_PACKAGES,
    PATH,
    NotInstalledError,
    SourceError,
    find_gguf,
)
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    STATISTICS,
    CheckpointError,
    Manifest,
)
from meteora.untrusted.findings import brief

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_checkpoint(
    name: str | Path,
    revision: str | None = None,
    *,
    download: Mapping[str, Any] | None = None,
    whole: bool = True,
    statistics: bool = False,
    subfolder: str = "",
) -> Path:
    """Return the folder of a checkpoint; a Hub id is downloaded to the Hub's cache, at one commit.

    Args:
        subfolder: The folder of the checkpoint in the repository; empty: the whole repository.
        whole: Download the tensors too; else only the manifest.
        statistics: Also download the statistics of the gates, if any, to add an expert.

    Raises:
        CheckpointError: There is no such folder, and no checkpoint of that name on the Hub.
    """
    folder = Path(name)
    if folder.is_dir() or not is_hub_id(str(name)):
        return folder
    options: dict[str, Any] = {**(download or {}), "subfolder": subfolder}
    # once for all files: a branch can move between two downloads
    keys = ("token", "local_files_only", "cache_dir")
    options["revision"] = resolve_revision(
        str(name), revision, **{key: options[key] for key in keys if key in options}
    )
    try:
        manifest = cached_file(str(name), MANIFEST, **options)
        if whole:
            cached_file(str(name), EXPERTS, **options)
            # a router that needs no training comes without gates
            options["_raise_exceptions_for_missing_entries"] = False
            for optional in (GATES, *([STATISTICS] if statistics else [])):
                cached_file(str(name), optional, **options)
    except OSError as error:
        raise CheckpointError(
            f"{name}: there is no such folder here, and no fused checkpoint of that name came from"
            f" the Hub: {brief(error)}"
        ) from error
    return Path(str(manifest)).parent


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name`, as repositories of the Hub are called."""
    return REPO_ID.fullmatch(name) is not None


def base_download(
    name: str | Path, manifest: Manifest, download: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the options with which the base of a checkpoint is downloaded.

    A stranger's checkpoint may name any base. So the token for a checkpoint on the Hub, given or
    saved, is sent for its base only if both have the same owner. For a checkpoint in a folder, only
    a token in `download` is sent.
    """
    options = dict(download or {})
    if Path(name).is_dir():
        return {**NO_TOKEN, **options}
    owner = manifest.base.repo_id.partition("/")[0]
    if str(name).partition("/")[0] == owner:
        return {"token": None, **options}
    return options | NO_TOKEN


def load_base(
    manifest: Manifest,
    folder: str | Path | None,
    dtype: torch.dtype | str,
    *,
    download: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base that a checkpoint refers to, from `folder` if one is given.

    It is quantised as the checkpoint says, or by a `quantization_config` among the options.

    Raises:
        SourceError: there is no such folder, or the base cannot be downloaded or loaded.
    """
    source = base_files(manifest, folder, download)
    has_config = "quantization_config" in (options or {})
    quantise = "" if has_config else manifest.base.quantise
    if not source.is_file():
        return loading.load_folder(source, dtype, options=options, quantise=quantise)
    if has_config or quantise:
        raise SourceError(
            f"{manifest.base.repo_id} is dequantised from GGUF, which takes no"
            " quantization_config; give the base as safetensors with base_folder="
        )
    named = {} if dtype in {"auto", None} else {"dtype": dtype}
    return loading.load_gguf(source, options={**named, **(options or {})})


def base_on_disk(manifest: Manifest, folder: Path | None) -> Path:
    """Return the folder of a base as safetensors: `folder`, or the Hub's cache of its commit.

    Raises:
        SourceError: It is not on this machine in that format; nothing is downloaded.
    """
    source = base_files(manifest, folder, {"local_files_only": True})
    if source.is_dir():
        return source
    raise SourceError(
        f"{manifest.base.repo_id} is dequantised from GGUF, and only the home of its run has it as"
        " safetensors; give that home with --home, or run the recipe again"
    )


def base_files(
    manifest: Manifest,
    folder: str | Path | None,
    download: Mapping[str, Any] | None,
    *,
    weights: bool = True,
) -> Path:
    """Return a folder or a GGUF file; a base on the Hub is downloaded at its commit.

    Raises:
        SourceError: there is no such folder, or the base cannot be downloaded.
    """
    name = manifest.base.repo_id
    if folder is not None:
        if not Path(folder).is_dir():
            raise SourceError(f"{folder}: there is no such folder; give the one that holds {name}")
        return Path(folder)
    if name.startswith(GGUF):
        return find_packaged(manifest.base.spec)
    if name.startswith(PATH):
        raise SourceError(
            f"the base of this checkpoint was the local folder {name.removeprefix(PATH)!r};"
            " say where it lies now with base_folder=, or --base"
        )
    return download_base(name, manifest.base.revision, download, weights=weights)


def find_packaged(base: BaseSpec) -> Path:
    """Return a GGUF file in an installed package, if it has the hash that a checkpoint names.

    No message tells a user to install a package that only a checkpoint names: it may be malicious.

    Raises:
        SourceError: it is not installed, or has another hash.
    """
    name = base.base_model
    package = name.removeprefix(GGUF).partition("/")[0]
    try:
        file = find_gguf(name)
    except NotInstalledError as error:
        if package in KNOWN_PACKAGES:
            raise
        raise SourceError(
            f"{name}: the Python package {package}, which the checkpoint names, is not installed"
            " here; give the folder of the base with base_folder="
        ) from error
    if f"sha256:{file_sha256(file)}" != base.base_revision:
        raise SourceError(
            f"{file}: it is not the file that the checkpoint was made with, which has the hash"
            f" {base.base_revision}; install the version of {package} that has it"
        )
    return file
