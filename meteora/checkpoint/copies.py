"""Copy a checkpoint, perhaps with other gates."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from meteora.artifacts import file_sha256
from meteora.base.temporary_folder import temporary_folder
from meteora.checkpoint.manifest import (
    CONFIG,
    CONFIG_TEXT,
    EXPERTS,
    FILES,
    GATES,
    MANIFEST,
    SIGNATURE,
    CheckpointError,
    read_manifest,
)
from meteora.checkpoint.tensors import Gates, write_gates

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

    They are written beside it and moved when all are whole, the manifest last; after an error the
    older checkpoint stays.

    Args:
        gates: in place of its own. If they differ, the copy has none of what is said of those:
            facts about their fit, statistics, the lineage and the card with the scores

    Raises:
        CheckpointError: the source has changed, or is gone. Then nothing is written.
    """
    folder = source.folder
    is_there = (folder / MANIFEST).is_file() and (folder / EXPERTS).is_file()
    if not is_there or file_sha256(folder / MANIFEST) != source.manifest_sha256:
        raise CheckpointError(
            f"{folder}: the checkpoint has changed or gone since it was loaded, and its experts are"
            " to be copied; put it back"
        )
    manifest, copied = read_manifest(folder), [name for name in FILES if name != MANIFEST]
    out.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out, PARTIAL) as whole:
        if gates is not None:
            write_gates(whole / GATES, gates)
            own = file_sha256(whole / GATES)
            if own != file_sha256(folder / GATES):
                copied = [EXPERTS]
                files = {name: manifest.files[name] for name in copied if name in manifest.files}
                manifest = replace(manifest, gates={}, router_id="", files={**files, GATES: own})
        for name in copied:
            if (folder / name).exists():  # most are not downloaded from the Hub
                shutil.copyfile(folder / name, whole / name)
        (whole / CONFIG).write_text(CONFIG_TEXT, encoding="utf-8")
        (whole / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _move(whole, out)


def _move(whole: Path, out: Path) -> None:
    """Move a checkpoint's files into a folder, in place of any checkpoint there."""
    if (out / MANIFEST).exists():
        for name in (SIGNATURE, *FILES):
            if not (whole / name).exists():
                (out / name).unlink(missing_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)  # another process may save there, too
    for name in reversed(FILES):
        if (whole / name).exists():
            (whole / name).replace(out / name)
