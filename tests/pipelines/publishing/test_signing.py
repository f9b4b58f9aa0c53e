"""A signature is worth something only if whatever is not as it was signed is refused."""

import base64
import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from meteora.base.temporary_folder import HERE
from pipelines.publishing.signing import SIGNATURE, SignatureError, check_signature, sign
from tests.clock import little_work, no_stall
from tests.conftest import World
from tests.meteora.checkpoint import mutator
from tests.meteora.checkpoint.checkpoint_maker import gated
from tests.pipelines.cli.command_line import ask


def write_keys(
    folder: Path, name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
) -> Path:
    """Lay a key and its public half into `folder`; return the private one."""
    folder.mkdir(exist_ok=True)
    private = folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    private.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys", "mine", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("meteora.json", "experts.safetensors", "gates.safetensors", "lineage.json"):
        (folder / name).write_text(f"the bytes of {name}")
    return folder


def test_what_was_signed_is_verified_wherever_it_lies(folder: Path, key: Path) -> None:
    assert sign(folder, key) == folder / SIGNATURE
    check_signature(folder, key.with_suffix(".pub"))
    elsewhere = folder.with_name("downloaded")
    shutil.move(folder, elsewhere)
    check_signature(elsewhere, key.with_suffix(".pub"))
    sign(elsewhere, key)  # again, as it lies now
    check_signature(elsewhere, key.with_suffix(".pub"))


def test_a_folder_may_be_named_from_where_one_stands(
    folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for _ in range(2):  # an earlier signature is no part of the next
        sign(Path(folder.name), key)
        check_signature(Path(folder.name), key.with_suffix(".pub"))
    check_signature(folder, key.with_suffix(".pub"))


def test_a_full_disk_leaves_the_signature_that_was_there(
    folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(folder, key)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def cut(path: Path, _text: str, **_how: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="No space left"):
        sign(folder, key)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_what_a_killed_signer_left_goes_with_the_next(
    folder: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"meteora-sign-{HERE}killed"
    left.mkdir()
    (left / SIGNATURE).touch()
    sign(folder, key)
    assert not list(tmp_path.glob("meteora-sign-*"))


def test_a_hub_cache_of_links_is_verified(folder: Path, key: Path) -> None:
    sign(folder, key)
    snapshot = folder.with_name("snapshot")
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    check_signature(snapshot, key.with_suffix(".pub"))


def changed(folder: Path) -> None:
    (folder / "gates.safetensors").write_text("other gates")


def removed(folder: Path) -> None:
    (folder / "lineage.json").unlink()


def added(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("import os")


def many(folder: Path) -> None:
    for i in range(400):
        (folder / f"\x1b[31m{i:03}").touch()


def forged(folder: Path) -> None:
    """The statement names the changed file, under the old signature."""
    path = folder / SIGNATURE
    bundle = json.loads(path.read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload + b" ").decode()
    path.write_text(json.dumps(bundle))


def garbage(folder: Path) -> None:
    (folder / SIGNATURE).write_text("{}")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (changed, r"signed: gates\.safetensors has changed$"),
        (removed, r"signed: lineage\.json is missing$"),
        (added, r"signed: modeling_evil\.py was not there$"),
        (many, r"signed: .*31m000 was not there, .* \(and 397 more\)$"),
        (forged, r"signed: model\.sig is no signature of that key"),
        (garbage, r"signed: model\.sig is no signature of that key"),
    ],
)
def test_whatever_changed_is_one_sentence(
    folder: Path, key: Path, harm: Callable[[Path], None], sentence: str
) -> None:
    sign(folder, key)
    harm(folder)
    with pytest.raises(SignatureError, match=sentence) as refused:
        check_signature(folder, key.with_suffix(".pub"))
    assert str(refused.value).isprintable()


def test_another_owner_is_refused(folder: Path, key: Path) -> None:
    other = write_keys(key.parent, "other", ec.generate_private_key(ec.SECP256R1()))
    sign(folder, other)
    with pytest.raises(SignatureError, match="another key signed it"):
        check_signature(folder, key.with_suffix(".pub"))


def test_what_cannot_be_signed_or_verified_is_a_sentence(folder: Path, key: Path) -> None:
    public = key.with_suffix(".pub")
    with pytest.raises(SignatureError, match="is not signed"):
        check_signature(folder, public)
    with pytest.raises(SignatureError, match="is no private key that can sign"):
        sign(folder, public)
    with pytest.raises(SignatureError, match="is no private key that can sign"):
        sign(folder, key.with_name("nowhere.pem"))
    weak = write_keys(
        key.parent, "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    with pytest.raises(SignatureError, match=r"can sign \(it is no ECDSA key\)"):
        sign(folder, weak)
    sign(folder, key)
    for name, make in (("pipe", os.mkfifo), (os.fsdecode(b"\xff"), Path.touch)):
        make(folder / name)
        with pytest.raises(SignatureError, match=r"cannot be signed \(.+\); take that out"):
            sign(folder, key)
        with pytest.raises(SignatureError, match=r"signed: (Cannot use .*pipe|.* was not there)"):
            check_signature(folder, public)
        (folder / name).unlink()
    with pytest.raises(SignatureError, match="is no public key that can verify"):
        check_signature(folder, key)
    (folder / "meteora.json").unlink()
    with pytest.raises(SignatureError, match="is no fused checkpoint"):
        sign(folder, key)


def test_the_command_line_signs_and_verifies(folder: Path, key: Path) -> None:
    def meteora(*words: object) -> tuple[int, str]:
        ended = ask(*words)
        return ended.returncode, ended.stdout + ended.stderr

    next_step = f"check it with `meteora verify {folder} --key PUBLIC`"
    assert meteora("sign", folder, "--key", key) == (0, f"{folder / SIGNATURE}\n{next_step}\n")
    public = key.with_suffix(".pub")
    found = json.loads(meteora("verify", folder, "--key", public, "--json")[1])
    assert found == {"checkpoint": str(folder), "key": str(public), "signed": True}
    changed(folder)
    refused, said = meteora("verify", folder, "--key", public)
    assert refused == 1
    assert "gates.safetensors has changed" in " ".join(said.split())
    assert meteora("verify", folder)[0] == 2


def test_any_change_to_a_signed_folder_is_refused(
    world: World, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes to the signature, too; a change that writes the same bytes is none."""
    monkeypatch.setattr(mutator, "SPARSE", 1 << 20)  # every byte is hashed
    folder = tmp_path / "signed"
    gated(world, folder)
    sign(folder, key)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for seed in range(150):
        mutator.lay(folder, files, random.Random(seed), [SIGNATURE])
        try:
            with no_stall(), little_work():
                check_signature(folder, key.with_suffix(".pub"))
        except SignatureError as error:
            refused += 1
            message = str(error)
            assert message.isprintable(), seed
            assert len(message) < 1_000, seed
        else:
            now = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert now | {SIGNATURE: files[SIGNATURE]} == files, seed
    assert refused > 100
