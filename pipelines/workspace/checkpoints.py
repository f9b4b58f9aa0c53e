"""The folder of a checkpoint that a person names, and of its base."""

import shlex
from contextlib import suppress
from pathlib import Path

from meteora.artifacts import ArtifactId
from meteora.base.sources import PATH
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    EXPERTS,
    LINEAGE,
    MANIFEST,
    CheckpointError,
    read_manifest,
)
from pipelines.workspace.bases import base_at, require_sound
from pipelines.workspace.context import checkpoint_at
from store.errors import UnknownError
from store.ledger import Ledger


def checkpoint_folder(name: str, home: Path) -> Path:
    """The folder of a checkpoint, by its id in the ledger; any other name as a path.

    Raises:
        UnknownError: There is no ledger, or it has the id, but no checkpoint with it.
    """
    if Path(name).is_dir() or "/" in name:
        return Path(name)
    if not home.is_dir():
        raise UnknownError(f"{name} is no folder, and there is no store in {home}; check --home")
    try:
        folder = checkpoint_at(home, _resolved(Ledger(home), name))
    except UnknownError as error:
        raise UnknownError(
            f"{name} is no folder here, and in the store in {home} {error}; --home names another"
        ) from error
    if not folder.is_dir():
        raise UnknownError(
            f"{name} is no checkpoint under {folder.parent}; give the id of a router, as"
            " `meteora run` prints it"
        )
    return folder


def _resolved(ledger: Ledger, name: str) -> ArtifactId:
    """The id of the one router that begins so; else that of the one artifact, for a message."""
    with suppress(UnknownError):
        return ledger.resolve(f"router:{name}")
    return ledger.resolve(name)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's folder has its texts and the manifest's files; none is hashed."""
    try:
        names = {EXPERTS, CONFIG, CARD, LINEAGE, *read_manifest(folder).files}
    except CheckpointError:
        return False
    return all((folder / name).is_file() for name in names)


def base_at_hand(folder: Path, home: Path) -> Path | None:
    """The base of a checkpoint, if this home has it as safetensors already.

    Raises:
        DamagedBaseError: The bytes of this base have changed since it was made.
    """
    if not (folder / MANIFEST).is_file():
        return None
    spec = read_manifest(folder).base.spec
    base = base_at(home, spec.stored.id)
    if not base.is_dir():
        return None
    require_sound(Ledger(home), spec)
    return base


def base_option(base_model: str, folder: Path | None) -> str:
    """The `--base` option for a next command; empty unless the base is a local folder.

    A checkpoint does not name the folder of its base, so the user must.

    Args:
        base_model: As the checkpoint names it.
    """
    if not base_model.startswith(PATH):
        return ""
    return f" --base {shlex.quote(str(folder)) if folder else 'FOLDER'}"
