"""The files to publish, and their differences to the Hub's listing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from meteora.artifacts import file_sha256
from pipelines.hub.snapshot import ListedFile, git_sha1


@dataclass(frozen=True)
class Bundle:
    """Files of a folder to publish together."""

    folder: Path
    files: Mapping[str, ListedFile]
    """By path, with both hashes: the Hub lists large files by SHA-256, small ones by git SHA-1."""
    names: Collection[str]
    """Possible paths of a publication; those that this one lacks are removed from the Hub."""

    @property
    def digest(self) -> str:
        """SHA-256 over every path and every byte."""
        lines = [f"{path} {file.sha256}\n" for path, file in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def missing(self, there: Mapping[str, ListedFile]) -> list[str]:
        """Paths that a commit lacks, or has with other bytes, by the files that are there."""
        return [path for path, file in self.files.items() if not same(there.get(path), file)]

    def stale(self, there: Mapping[str, ListedFile]) -> list[str]:
        """Paths that a commit has from an earlier publication, and that this bundle lacks."""
        return [path for path in there if path in self.names and path not in self.files]


def make_bundle(folder: Path, names: Collection[str]) -> Bundle:
    """Hash the named files of a folder; other files in it are not published."""
    files = {name: _hashed(folder, name) for name in sorted(names) if (folder / name).is_file()}
    return Bundle(folder, files, frozenset(names))


def same(listed: ListedFile | None, here: ListedFile) -> bool:
    """Whether the file on the Hub has the same bytes as the one here."""
    if listed is None:
        return False
    if listed.sha256:
        return listed.sha256 == here.sha256
    return listed.git_sha1 == here.git_sha1


def _hashed(folder: Path, name: str) -> ListedFile:
    path = folder / name
    return ListedFile(name, path.stat().st_size, git_sha1(path), file_sha256(path))
