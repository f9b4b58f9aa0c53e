"""The bases of a home: read-only files that are checked before each use.

A base is too large to be hashed at every start. A note in its folder holds the size, the time and
the hash of every file. A file is hashed again when its size or its time differs from the note, and
`meteora verify` hashes all of them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from meteora.artifacts import SHA256, ArtifactId, BaseSpec, MeteoraError, Noun, file_sha256
from meteora.base.sources import combined_sha256
from store.check import Finding
from store.errors import StoreError
from store.files import READ_ONLY, read_note, write_whole
from store.ledger import Ledger

NOTE = ".sealed.json"
"""The note in the folder of a base; deleting the folder deletes it, too."""


class DamagedBaseError(MeteoraError):
    """The bytes of a base in a home have changed since it was made."""


@dataclass(frozen=True)
class SealedFile(Noun):
    """Size, time and hash of a base's file at the time of hashing."""

    path: str
    """Relative to the folder of the base."""
    num_bytes: int
    written_ns: int
    """Time of the last change, since the epoch."""
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: str) -> Self:
        """Hash a file."""
        before = (folder / path).stat()
        return cls(path, before.st_size, before.st_mtime_ns, file_sha256(folder / path))

    def is_unchanged(self, folder: Path) -> bool:
        """Whether the file exists with the same size and time."""
        try:
            now = (folder / self.path).stat()
        except FileNotFoundError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.num_bytes, self.written_ns)


def base_at(home: Path, base_id: ArtifactId) -> Path:
    """The folder of a base in a home; it may not exist yet."""
    return home / "bases" / base_id.partition(":")[2]


def unfinished(folder: Path) -> Path:
    """The folder of a base's download that was stopped; the next run goes on with its files."""
    return folder.with_name(f"{folder.name}.partial")


def seal(folder: Path, home: Path) -> None:
    """Make the files of a new base read-only, and note their hashes.

    The folder itself stays writable, so that it can be deleted.
    """
    _write_note(folder, home, [SealedFile.of(folder, path) for path in _paths(folder)])


def require_sound(ledger: Ledger, spec: BaseSpec) -> None:
    """Check a base before it is loaded; files with the size and time of the note are not hashed.

    A base of an earlier version gets its note and read-only files now. A base in the user's own
    folder or behind a link is not checked: its files do not belong to the home.

    Raises:
        DamagedBaseError: A file is missing, was added, or has other bytes.
    """
    folder = base_at(ledger.home, spec.stored.id)
    if not folder.is_dir() or folder.is_symlink():
        return
    noted, weights = _read_note(folder), ledger.weights_of(spec.id)
    if (
        noted is not None
        and [file.path for file in noted] == _paths(folder)
        and all(file.is_unchanged(folder) for file in noted)
        and weights in (None, _weights(noted))
    ):
        return
    files = [SealedFile.of(folder, path) for path in _paths(folder)]
    if problems := _problems(noted, files, weights):
        raise DamagedBaseError(
            f"{folder}: {problems[0]}; delete this folder and run the recipe again, which brings"
            " the base anew"
        )
    _write_note(folder, ledger.home, files)


def verify_bases(ledger: Ledger) -> Iterator[Finding]:
    """Hash every file of every base in a home; yield a finding for each fault."""
    for folder in sorted((ledger.home / "bases").glob("*/")):
        if folder.is_symlink() or not SHA256.fullmatch(folder.name):
            continue
        base_id = ArtifactId(f"base:{folder.name}")
        files = [SealedFile.of(folder, path) for path in _paths(folder)]
        if problems := _problems(_read_note(folder), files, ledger.weights_of(base_id)):
            touched = [base_id, *_made_from(ledger, base_id)]
            for problem in problems:
                name = str(folder.relative_to(ledger.home))
                yield Finding("base", name, problem, tuple(touched))


def _made_from(ledger: Ledger, base_id: ArtifactId) -> list[str]:
    """The ids of all artifacts that were made from a base, and of their scores.

    Empty if the index cannot be read, which is a finding of its own.
    """
    query = f"""
        WITH made AS (
            SELECT '{base_id}' AS id
            UNION SELECT descendant_id FROM ancestors WHERE ancestor_id = '{base_id}'
        )
        SELECT id FROM made UNION SELECT scores.id FROM scores JOIN made ON subject_id = made.id
        EXCEPT SELECT '{base_id}' ORDER BY ALL
        """  # noqa: S608  (64 hex digits)
    try:
        return [artifact_id for (artifact_id,) in ledger.query(query).rows]
    except StoreError:
        return []


def _problems(
    noted: Sequence[SealedFile] | None, files: Sequence[SealedFile], weights: str | None
) -> list[str]:
    """The faults of a base, each as a clause, by its note and by the ledger's hash of its weights.

    There is no note in homes of earlier versions.
    """
    problems = []
    if noted is not None:
        before, now = ({file.path: file.sha256 for file in some} for some in (noted, files))
        problems += [f"{path} is missing" for path in before if path not in now]
        problems += [f"{path} is no file of this base" for path in now if path not in before]
        problems += [
            f"the bytes of {path} have changed since the base was made"
            for path in before
            if path in now and before[path] != now[path]
        ]
    if not problems and weights not in (None, _weights(files)):
        problems.append("the bytes of its weights have changed since the base was made")
    return problems


def _paths(folder: Path) -> list[str]:
    """All files but hidden ones, which a file manager may add; sorted."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if not any(p.startswith(".") for p in path.parts))


def _weights(files: Sequence[SealedFile]) -> str:
    return combined_sha256([f.sha256 for f in files if f.path.endswith(".safetensors")])


def _read_note(folder: Path) -> list[SealedFile] | None:
    """The files of the note; None if there is no readable one."""
    return read_note(folder / NOTE, lambda files: [*map(SealedFile.from_dict, files)]) or None


def _write_note(folder: Path, home: Path, files: Sequence[SealedFile]) -> None:
    """Write the note. A read-only home gets none, and every check hashes again."""
    with suppress(OSError, StoreError):
        for file in files:
            (folder / file.path).chmod(READ_ONLY)
        text = json.dumps([file.to_dict() for file in files], indent=1) + "\n"
        write_whole(folder / NOTE, text.encode(), root=home)
