"""Find a checkpoint in a folder or on the Hub, and load the base that it refers to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.hub import cached_file, resolve_revision

from meteora.base import loading
from meteora.base.sources import GGUF, PATH, SourceError, find_gguf
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    STATISTICS,
    CheckpointError,
    read_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.checkpoint.manifest import Manifest


def load_tokenizer(
    checkpoint_folder: str | Path,
    *,
    base_folder: str | Path | None = None,
    revision: str | None = None,
    download: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a fused model, which is that of its base; no tensors are read.

    Args:
        settings: options of the tokenizer, such as `padding_side`; the others are those of `load`
    """
    folder = find_checkpoint(checkpoint_folder, revision, download=download, whole=False)
    source, at = _find_base(read_manifest(folder), base_folder)
    if isinstance(source, Path) and source.is_file():
        return loading.load_tokenizer(source.parent, gguf_file=source.name, options=settings)
    return loading.load_tokenizer(source, at, options={**(download or {}), **(settings or {})})


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
        subfolder: Of the repository, where the checkpoint is not all of it.
        whole: Download the tensors too; else only the manifest.
        statistics: Also those that its gates were fitted to, if it has them, to add an expert.
    """
    folder = Path(name)
    if folder.is_dir() or not _is_hub_id(str(name)):
        return folder
    asked: dict[str, Any] = {**(download or {}), "subfolder": subfolder}
    # once for all files: a branch can move between two downloads
    places = {key: asked[key] for key in ("token", "local_files_only", "cache_dir") if key in asked}
    asked["revision"] = resolve_revision(str(name), revision, **places)
    try:
        found = cached_file(str(name), MANIFEST, **asked)
        if whole:
            cached_file(str(name), EXPERTS, **asked)
            # a router that needs no training comes without gates
            asked["_raise_exceptions_for_missing_entries"] = False
            for further in (GATES, *([STATISTICS] if statistics else [])):
                cached_file(str(name), further, **asked)
    except OSError as error:
        raise CheckpointError(
            f"{name}: there is no such folder here, and no fused checkpoint of that name came from"
            f" the Hub: {error}"
        ) from error
    return Path(str(found)).parent


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def load_base(
    manifest: Manifest,
    folder: str | Path | None,
    dtype: torch.dtype | str,
    *,
    download: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base that a checkpoint refers to, from `folder` if one is given."""
    source, revision = _find_base(manifest, folder)
    if isinstance(source, Path) and source.is_file():
        if options:
            raise SourceError(
                f"{manifest.base.repo_id} is dequantised from GGUF, which takes no"
                f" {', '.join(options)}; give the base as safetensors with base_folder="
            )
        return loading.load_gguf(source)
    return loading.load_folder(source, revision, dtype, download=download, options=options)


def find_base_files(manifest: Manifest, folder: Path | None) -> Path:
    """Return the folder of a base as safetensors: `folder`, or the Hub's cache of its commit.

    Raises:
        SourceError: It is not on this machine in that format; nothing is downloaded.
    """
    source, revision = _find_base(manifest, folder)
    name = manifest.base.repo_id
    if isinstance(source, Path):
        if source.is_dir():
            return source
        raise SourceError(
            f"{name} is dequantised from GGUF, and only the home of its run has it as safetensors;"
            " give that home with --home, or run the recipe again"
        )
    try:
        found = cached_file(name, "config.json", revision=revision, local_files_only=True)
    except OSError as error:
        raise SourceError(
            f"{name} at {manifest.base.revision[:12]} is not in the Hub's cache; download it with"
            f" `hf download {name} --revision {manifest.base.revision}`, or give its folder with"
            " --base"
        ) from error
    return Path(str(found)).parent


def _find_base(manifest: Manifest, folder: str | Path | None) -> tuple[str | Path, str | None]:
    """Return a folder, a GGUF file, or a Hub id with its commit."""
    name = manifest.base.repo_id
    if folder is not None:
        if not Path(folder).is_dir():
            raise SourceError(f"{folder}: there is no such folder; give the one that holds {name}")
        return Path(folder), None
    if name.startswith(GGUF):
        return find_gguf(name), None
    if name.startswith(PATH):
        raise SourceError(
            f"the base of this checkpoint was the local folder {name.removeprefix(PATH)};"
            " say where it lies now with base_folder=, or --base"
        )
    return name, manifest.base.revision
