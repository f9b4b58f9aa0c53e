"""Signatures over a checkpoint's folder, with OpenSSF's model-signing and a key in a file.

The signature is the file `model.sig` in the folder, a Sigstore bundle. It can be checked with the
public key and the package `model-signing` alone. No network is used.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from meteora.artifacts import MeteoraError
from meteora.base.temporary_folder import temporary_folder
from meteora.checkpoint.manifest import MANIFEST, SIGNATURE
from meteora.untrusted.findings import brief, listed
from store.files import replace_text

if TYPE_CHECKING:
    from model_signing.hashing import Config

HOW = (
    "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes a key, and"
    " `openssl ec -in key.pem -pubout -out key.pub` its public half"
)
MISMATCHES = (
    (re.compile(r"Hash mismatch for '([^']*)'"), "has changed"),
    (re.compile(r"Missing files in model '[^']*': ([^'\"]*)"), "is missing"),
    (re.compile(r"Extra files found in model '[^']*': ([^'\"]*)"), "was not there"),
)


class SignatureError(MeteoraError):
    """A folder cannot be signed, or differs from its signature."""


def is_signed(folder: Path) -> bool:
    """Whether there is a signature, so that no file of the folder may change any more."""
    return (folder / SIGNATURE).is_file()


def sign(folder: Path, private_key: Path) -> Path:
    """Sign every file of a checkpoint, but for git's own; return the signature's path.

    An older signature stays if the new one cannot be written.

    Raises:
        SignatureError: The folder is no checkpoint, or holds more than files, or the key cannot
            sign.
    """
    _require_checkpoint(folder)
    hashing, signing, _ = _library()
    signature = folder / SIGNATURE
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SignatureError(
            f"{private_key} is no private key that can sign ({_why(error)}); {HOW}"
        ) from None
    config.set_hashing_config(_hashed(hashing))
    with temporary_folder(Path(tempfile.gettempdir()), "meteora-sign-") as scratch:
        made = scratch / SIGNATURE
        try:
            config.sign(folder, made)
        except ValueError as error:  # a pipe, a link to nothing, or a name that is not UTF-8
            raise SignatureError(
                f"{folder} cannot be signed ({brief(error)}); take that out"
            ) from None
        replace_text(signature, made.read_text(encoding="utf-8"))
    return signature


def check_signature(folder: Path, public_key: Path) -> None:
    """Compare a checkpoint with its signature.

    Raises:
        SignatureError: A file has changed since it was signed, or another key signed.
    """
    _require_checkpoint(folder)
    hashing, _, verifying = _library()
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise SignatureError(f"{folder} is not signed: there is no {SIGNATURE} in it")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, AttributeError) as error:
        raise SignatureError(
            f"{public_key} is no public key that can verify ({_why(error)}); {HOW}"
        ) from None
    config.set_hashing_config(_hashed(hashing))
    try:
        config.verify(folder, signature)
    except Exception as error:
        raise SignatureError(
            f"{folder} is not what the owner of {public_key} signed: {_difference(error)}"
        ) from None


def _hashed(hashing: ModuleType) -> Config:
    """Hash every file by SHA-256, but for the signature and git's own, which the Hub adds.

    Files may be links into a cache.
    """
    # relative to the checkpoint's folder, as the library takes it
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=True)
    return config.set_allow_symlinks(True)


def _why(error: Exception) -> str:
    """Why a key cannot be used; the library reads `curve` of whatever key it gets."""
    return "it is no ECDSA key" if isinstance(error, AttributeError) else brief(error)


def _difference(error: Exception) -> str:
    """The differences that the library reports, in a few words."""
    text = str(error).replace("\\'", "'")  # the message has a Python list with escaped quotes
    found = [
        f"{name} {what}"
        for pattern, what in MISMATCHES
        for names in pattern.findall(text)
        for name in names.split(", ")
    ]
    if found:
        return listed(found)
    if "Key mismatch" in text:
        return "another key signed it"
    if "Cannot use '" in text:  # a pipe, or a link to nothing
        return brief(error)
    return f"{SIGNATURE} is no signature of that key ({brief(error)})"


def _require_checkpoint(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        raise SignatureError(f"{folder} is no fused checkpoint: there is no {MANIFEST} in it")


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from model_signing import hashing, signing, verifying  # noqa: PLC0415  (an extra)
    except ImportError:
        raise SignatureError(
            "signatures are made by model-signing: pip install 'meteora-pipelines[signing]'"
        ) from None
    return hashing, signing, verifying
