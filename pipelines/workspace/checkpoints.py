"""The folder of a checkpoint that a person names, its base, and the files that it alone needs."""

import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from meteora.artifacts import ArtifactId, RouterSpec, file_sha256
from meteora.base.sources import PATH
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    EXPERTS,
    LINEAGE,
    CheckpointError,
    read_manifest,
)
from pipelines.workspace.bases import base_at, require_sound
from pipelines.workspace.context import checkpoint_at
from store.errors import UnknownError
from store.garbage import Removable
from store.ledger import Ledger

FEWEST_DIGITS = 8
"""Of an id whose model is to be deleted: with fewer, a slip of the finger may name another."""


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
            f"{name} has no checkpoint under {folder.parent}; give the id of a router, as"
            " `meteora run` prints it, and if its folder was deleted, run its recipe again"
        )
    return folder


def _resolved(ledger: Ledger, name: str) -> ArtifactId:
    """The id of the one router that begins so; else that of the one artifact, for a message."""
    with suppress(UnknownError):
        return ledger.resolve(f"router:{name}")
    return ledger.resolve(name)


def files_to_free(ledger: Ledger, names: Iterable[str]) -> list[Removable]:
    """The files of models that no other model in the home needs: folders and blobs.

    The models are named by ids of routers, or folders of checkpoints in this home. A model whose
    gates are here counts without its folder, too: its recipe makes that of the blobs.

    Raises:
        UnknownError: The ledger has no such router, or the folder is not in the home.
    """
    models = [_router_in(ledger, name) for name in names]
    folders = {checkpoint_at(ledger.home, router_id) for router_id in models}
    sha256s: set[str] = set()
    for router_id in models:
        if spec := ledger.spec_of(router_id):  # `add` to a stranger's checkpoint records nothing
            fused_id = RouterSpec.from_dict(spec).fused_id
            sha256s.update(ledger.blobs_of(router_id), ledger.blobs_of(fused_id))
    for folder in {*ledger.home.glob("checkpoints/*")} - folders:
        sha256s -= _tensors_of(folder)
    for router_id, spec in ledger.specs_of().items():
        if router_id.startswith("router:") and router_id not in models:
            sha256s -= _blobs_that_wait(ledger, ArtifactId(router_id), spec)
    files = [
        *((str(folder), folder) for folder in sorted(folders)),
        *((sha256, ledger.blobs.place_of(sha256)) for sha256 in sorted(sha256s)),
    ]
    return [Removable(name, path, _own_bytes(path)) for name, path in files if path.exists()]


def _blobs_that_wait(ledger: Ledger, router_id: ArtifactId, spec: dict[str, Any]) -> set[str]:
    """The blobs of a model whose gates are here, with or without a checkpoint's folder."""
    experts = {*ledger.blobs_of(RouterSpec.from_dict(spec).fused_id)}
    own = {*ledger.blobs_of(router_id)} - experts  # a router that is only measured has none
    return experts | own if own and all(sha256 in ledger.blobs for sha256 in own) else set()


def _router_in(ledger: Ledger, name: str) -> ArtifactId:
    """The id of a router, from a prefix of it, or from the folder of its checkpoint in the home."""
    folder = Path(name)
    if not folder.is_dir():
        folder = ledger.home / "checkpoints" / name
    if not folder.is_dir():
        if len(name.removeprefix("router:")) < FEWEST_DIGITS:
            raise UnknownError(
                f"{name!r} is too short for what is to be deleted; give {FEWEST_DIGITS} digits or"
                " more of the id, as `meteora run` prints it"
            )
        router_id = _resolved(ledger, name)
        if not router_id.startswith("router:"):
            raise UnknownError(f"{router_id} is no router; give the id of one")
        return router_id
    router_id = ArtifactId(read_manifest(folder).router_id)
    own = checkpoint_at(ledger.home, router_id)
    if not (own.is_dir() and own.samefile(folder)):
        raise UnknownError(
            f"{folder} does not lie in the store in {ledger.home}; --home names another, and what"
            " lies elsewhere can be deleted as any folder"
        )
    return router_id


def _tensors_of(folder: Path) -> set[str]:
    """The SHA-256 of each file of tensors in a checkpoint."""
    try:
        named = {*read_manifest(folder).files.values()}
    except CheckpointError:
        named = set()
    # earlier versions named none
    return named or {file_sha256(path) for path in folder.glob("*.safetensors") if path.is_file()}


def _own_bytes(path: Path) -> int:
    """Bytes of a blob, or of a folder's files that are no links to blobs."""
    if path.is_file():
        return path.stat().st_size
    stats = (part.stat() for part in path.rglob("*") if part.is_file())
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's folder has its texts and the manifest's files; none is hashed."""
    try:
        names = {EXPERTS, CONFIG, CARD, LINEAGE, *read_manifest(folder).files}
    except CheckpointError:
        return False
    return all((folder / name).is_file() for name in names)


def base_at_hand(folder: Path, home: Path) -> Path | None:
    """The base of a checkpoint, if this home has it as safetensors; raises as `require_sound`."""
    spec = read_manifest(folder).base.spec
    base = base_at(home, spec.stored.id)
    if not base.is_dir():
        return None
    require_sound(Ledger(home), spec)
    return base


def base_option(base_model: str, folder: Path | None) -> str:
    """The `--base` option for a next command; empty unless the base is a local folder.

    A checkpoint does not name the folder of its base, so the user must.
    """
    if not base_model.startswith(PATH):
        return ""
    return f" --base {shlex.quote(str(folder)) if folder else 'FOLDER'}"
