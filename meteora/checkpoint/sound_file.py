"""Open a file of tensors only if it is sound; it may come from a stranger.

Before a tensor is loaded, four things are checked: the header is within limits; every tensor has a
float type; the file has the SHA-256 that the manifest names, if it names one; no number is NaN or
infinite.
"""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from meteora.adapters import finite
from meteora.artifacts import file_sha256
from meteora.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from meteora.untrusted.findings import listed, shortened
from meteora.untrusted.safetensors_header import HeaderError, read_header

AGAIN = "download or build the checkpoint again"


def missing_message(folder: Path, name: str) -> str:
    """The message if a checkpoint lacks a file."""
    return f"{folder}: there is no {name} in it; the checkpoint is not whole, {AGAIN}"


@contextmanager
def open_sound(
    folder: Path, name: str, manifest: Manifest, *, dtypes: Collection[str] = finite.FLOATS
) -> Generator[safe_open]:
    """Check a file of a checkpoint from its first byte to its last, and open it.

    Args:
        name: of the file
        dtypes: that its tensors may have, as safetensors names them

    Raises:
        CheckpointError: it is missing or damaged, or is not the file that the manifest describes.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(missing_message(folder, name))
    try:
        with path.open("rb") as file:
            _check(file, path, manifest.files.get(name), dtypes)
    except (HeaderError, EOFError) as error:
        raise CheckpointError(f"{path}: it is damaged: {error}; {AGAIN}") from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: it is damaged, or belongs to another {MANIFEST}"
            f" ({shortened(error, 200)}); {AGAIN}"
        ) from error


def _check(file: BinaryIO, path: Path, sha256: str | None, dtypes: Collection[str]) -> None:
    """Refuse a file with another hash, other types, or numbers that are not finite."""
    # a dropped expert can leave modules without ranks, whose tensors are empty
    tensors = read_header(file, path.stat().st_size, empty=True)
    if sha256 is not None and file_sha256(path) != sha256:
        raise CheckpointError(
            f"{path}: it is damaged, or belongs to another {MANIFEST}: its SHA-256 is not the one"
            f" that is named there; {AGAIN}"
        )
    if foreign := sorted({info.dtype for info in tensors.values()}.difference(dtypes)):
        raise CheckpointError(
            f"{path}: it has tensors of {listed(foreign)}, where {', '.join(dtypes)} are possible;"
            f" {AGAIN}"
        )
    if bad := [key for key, info in tensors.items() if not finite.scan(file, info).finite]:
        raise CheckpointError(f"{path}: NaN or infinity is in {listed(bad)}; {AGAIN}")
