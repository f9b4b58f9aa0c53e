"""Open a file of tensors only if it is sound; it may come from a stranger.

Before a tensor is loaded, four things are checked: the header is within limits; every tensor has a
float type; the file has the SHA-256 that the manifest names, if it names one; no number is NaN or
infinite.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from meteora.adapters import finite
from meteora.artifacts import file_sha256
from meteora.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from meteora.untrusted.findings import listed, shortened
from meteora.untrusted.safetensors_header import HeaderError, TensorInfo, read_header

AGAIN = "download or build the checkpoint again"


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
        raise CheckpointError(
            f"{folder}: there is no {name} in it; the checkpoint is not whole, {AGAIN}"
        )
    tensors = _read_header(path)
    expected = manifest.files.get(name)
    if expected is not None and file_sha256(path) != expected:
        raise CheckpointError(
            f"{path}: it is damaged, or belongs to another {MANIFEST}: its SHA-256 is not the one"
            f" that is named there; {AGAIN}"
        )
    if foreign := sorted({info.dtype for info in tensors.values()}.difference(dtypes)):
        raise CheckpointError(
            f"{path}: it has tensors of {listed(foreign)}, where {', '.join(dtypes)} are possible;"
            f" {AGAIN}"
        )
    _refuse_not_finite(path, tensors)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: it is damaged, or belongs to another {MANIFEST}"
            f" ({shortened(error, 200)}); {AGAIN}"
        ) from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with path.open("rb") as file:
            # a dropped expert can leave modules without ranks, whose tensors are empty
            return read_header(file, path.stat().st_size, empty=True)
    except HeaderError as error:
        raise CheckpointError(f"{path}: it is damaged: {error}; {AGAIN}") from None


def _refuse_not_finite(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    try:
        with path.open("rb") as file:
            bad = [key for key, info in tensors.items() if not finite.scan(file, info).finite]
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from None
    if bad:
        raise CheckpointError(f"{path}: NaN or infinity is in {listed(bad)}; {AGAIN}")
