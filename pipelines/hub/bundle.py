"""What is to be published: some files of a folder, and how they differ from what the Hub lists."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.hub.snapshot import CHUNK, ListedFile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Parcel:
    """What is to be published: a folder, of whose files the names are known beforehand."""

    folder: Path
    files: Mapping[str, ListedFile]
    """By path, hashed both ways: the Hub lists large files by one and small ones by the other."""
    names: Collection[str]
    """What an earlier publication may have held; of these the repository keeps no others."""
    mark: str
    """The file by which an earlier publication is known."""

    @property
    def digest(self) -> str:
        """Of every path and every byte."""
        lines = [f"{path} {file.sha256}\n" for path, file in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def missing(self, there: Mapping[str, ListedFile]) -> list[str]:
        """Paths that a commit lacks, or holds with other bytes."""
        return [path for path, file in self.files.items() if not same(there.get(path), file)]

    def stale(self, there: Mapping[str, ListedFile]) -> list[str]:
        """Paths of an earlier publication that this one has not."""
        return [path for path in there if path in self.names and path not in self.files]


def pack(folder: Path, names: Collection[str], mark: str) -> Parcel:
    """Hash the files of a folder that are to be published; whatever else lies there stays here."""
    files = {name: _hashed(folder, name) for name in sorted(names) if (folder / name).is_file()}
    return Parcel(folder, files, frozenset(names), mark)


def same(listed: ListedFile | None, here: ListedFile) -> bool:
    """Whether the Hub lists the very bytes that lie here."""
    if listed is None:
        return False
    if listed.sha256:
        return listed.sha256 == here.sha256
    return listed.git_sha1 == here.git_sha1


def _hashed(folder: Path, name: str) -> ListedFile:
    path = folder / name
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha256.update(chunk)
            git_sha1.update(chunk)
    return ListedFile(name, size, git_sha1.hexdigest(), sha256.hexdigest())
