"""Copy a checkpoint, perhaps with other gates."""

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from meteora.artifacts import file_sha256
from meteora.base.temporary_folder import temporary_folder
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    CONFIG_TEXT,
    EVAL_RESULTS,
    EXPERTS,
    FILES,
    GATES,
    LINEAGE,
    MANIFEST,
    SIGNATURE,
    STATISTICS,
    CheckpointError,
    read_manifest,
)
from meteora.checkpoint.tensors import Gates, write_gates
from meteora.untrusted.links import link_out

BESIDE = (SIGNATURE, EVAL_RESULTS, GATES, STATISTICS, CARD, LINEAGE)
"""The files that not every checkpoint has."""
PARTIAL = ".partial-"
"""How the names of temporary folders with files of a checkpoint begin."""


class Source(NamedTuple):
    """A checkpoint that may be copied later."""

    folder: Path
    """Absolute, since a program may go to another folder."""
    manifest_sha256: str

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The checkpoint in a folder, as it is now."""
        return cls(folder.absolute(), file_sha256(folder / MANIFEST))


def copy_checkpoint(source: Source, out: Path, gates: Gates | None = None) -> None:
    """Copy a checkpoint's files to another folder, in place of any checkpoint there.

    They are written beside it and moved when all are whole; after an error the older checkpoint
    stays.

    Args:
        gates: in place of its own. If they differ, the copy has none of what is said of those:
            facts about their fit, statistics, the lineage and the card with the scores

    Raises:
        CheckpointError: the source has changed, is gone, or has a link to elsewhere; or a folder is
            where a file has to be. Then nothing is written.
    """
    folder = source.folder
    is_there = (folder / MANIFEST).is_file() and (folder / EXPERTS).is_file()
    if not is_there or file_sha256(folder / MANIFEST) != source.manifest_sha256:
        raise CheckpointError(
            f"{folder}: the checkpoint has changed or gone since it was loaded, and its experts are"
            " to be copied; put it back"
        )
    _refuse_folders(out)
    manifest = read_manifest(folder)
    copied = [name for name in (*FILES, EVAL_RESULTS) if name != MANIFEST]
    out.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out, PARTIAL) as whole:
        if gates is not None:
            write_gates(whole / GATES, gates)
            own = file_sha256(whole / GATES)
            is_same = (folder / GATES).is_file() and file_sha256(folder / GATES) == own
            if not is_same:
                copied = [EXPERTS]
                files = {name: manifest.files[name] for name in copied if name in manifest.files}
                manifest = replace(manifest, gates={}, router_id="", files={**files, GATES: own})
        for name in copied:
            if (folder / name).exists():  # most are not downloaded from the Hub
                _refuse_foreign(folder, name)
                (whole / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, whole / name)
        (whole / CONFIG).write_text(CONFIG_TEXT, encoding="utf-8")
        (whole / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _move(whole, out)


def _refuse_foreign(folder: Path, name: str) -> None:
    """Refuse to copy what is not a file of the checkpoint: a link out of it, a device, a pipe."""
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is not a regular file; take it out")
    # the others were read as tensors when the model was loaded, and are often large
    if name not in (EXPERTS, GATES) and (target := link_out(folder, name)):
        raise CheckpointError(
            f"{folder / name} is a link to {target}, whose text a copy would hold; put the file"
            " itself there, or take the link out"
        )


def _refuse_folders(out: Path) -> None:
    """Refuse a folder in the place of a file: it may hold anything, so it is not removed.

    A file in the place of a folder is refused, too.
    """
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise CheckpointError(f"{out} is no folder, and a checkpoint is one; give another name")
    if (holder := (out / EVAL_RESULTS).parent).is_file():
        raise CheckpointError(
            f"{holder} is a file, and a checkpoint has a folder there; move it away, or save into"
            " another folder"
        )
    for name in (*FILES, SIGNATURE, EVAL_RESULTS):
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise CheckpointError(
                f"{out / name} is a folder, and a checkpoint has a file there; move it away, or"
                " save into another folder"
            )


def _move(whole: Path, out: Path) -> None:
    """Move a checkpoint's files into a folder, in place of any checkpoint there.

    Whenever it is killed, the folder has the older checkpoint, the new one, or what cannot be
    loaded. What could stay beside the files of a later save is there only while the manifest is,
    and then that save removes it. The gates come last: without them no checkpoint loads that has
    some.
    """
    if (out / MANIFEST).exists():
        for name in (*BESIDE, MANIFEST):
            (out / name).unlink(missing_ok=True)  # another process may save there, too
        with suppress(OSError):  # it has other files, or is gone
            (out / EVAL_RESULTS).parent.rmdir()
    for name in (EXPERTS, CONFIG, MANIFEST, *reversed(BESIDE)):
        if (whole / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            (whole / name).replace(out / name)
