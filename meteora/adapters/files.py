"""Find an adapter's config and weights, or name the other files that lie there."""

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meteora.adapters.config import Claim, OnExtras, mlx_claim, peft_claim
from meteora.untrusted.findings import Findings, listed, shortened
from meteora.untrusted.strict_json import StrictJSONError, parse_object

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = (PEFT_WEIGHTS, "adapters.safetensors")
"""PEFT's name and MLX-LM's."""
DIFFUSERS = "pytorch_lora_weights.safetensors"
MAX_CONFIG_BYTES = 2 << 20
MAX_TABLES = 50_000
"""Brackets in a config: real ones have dozens, and a table takes 30 times the bytes of its text."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRAINING_STATE = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""How the names begin of pickles that trainers write beside weights."""
HOW_TO_CONVERT = (
    "a pickle can run code when it is opened, so it is never read here; on a machine that you can"
    " spare, load it with PEFT and call model.save_pretrained(folder), which writes safetensors"
)

BROKEN = (
    "{} is a link, and the file that it leads to is not here, as where the Hub's cache was copied"
    " in part; copy the file itself, such as with cp -L"
)

# The first bytes of other files that are found in place of a config or of weights.
SIGNATURES = (
    (b"version https://git-lfs", "lfs_pointer", "a Git LFS pointer; fetch the file it stands for"),
    (b"\x00\x05\x16\x07", "apple_double", "macOS's notes on a file (AppleDouble), not the file"),
    (b"PK\x03\x04", "pickle", f"a zip archive, as PyTorch pickles are; {HOW_TO_CONVERT}"),
    *(
        (bytes([0x80, protocol]), "pickle", f"a pickle; {HOW_TO_CONVERT}")
        for protocol in range(2, 6)
    ),
    (b"GGUF", "gguf", "a GGUF file; convert it back to PEFT's safetensors"),
    (b"<!doctype html", "html", "a web page, often an error or a log-in page; download it again"),
    (b"<?xml", "html", "an error page of a storage, in XML; download it again"),
    (b"<html", "html", "a web page, often an error or a log-in page; download it again"),
)


def find_files(path: Path, found: Findings) -> tuple[Path | None, Path | None]:
    """Find config and weights of the adapter at `path`: its folder, its config or its weights.

    A missing one is None. Any other file counts as a config without weights.
    """
    if path.is_dir():
        folder = path
    elif not path.exists():
        found.refuse(*_absent(path))
        return None, None
    elif path.suffix in PICKLES:
        found.refuse("pickle", f"it is {path.name}; {HOW_TO_CONVERT}")
        return None, None
    elif path.name == CONFIG or path.suffix == ".safetensors":
        folder = path.parent
    else:
        return path, None
    config = folder / CONFIG
    weights = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if path.suffix == ".safetensors":
        weights = [path]
    elif not weights:
        _explain_missing_weights(folder, found, is_config_alone=path.name == CONFIG)
    if not config.exists():
        no_config = "no_config", f"{CONFIG} is missing, which says how its tensors are scaled"
        found.refuse(*(_absent(config) if config.is_symlink() else no_config))
        return None, weights[0] if weights else None
    return config, weights[0] if weights else None


def _absent(path: Path) -> tuple[str, str]:
    """The code and the message of a file that is not there."""
    if path.is_symlink():
        return "broken_link", BROKEN.format(path.name)
    return "missing", "there is nothing here"


def _explain_missing_weights(folder: Path, found: Findings, *, is_config_alone: bool) -> None:
    if broken := [folder / name for name in WEIGHTS if (folder / name).is_symlink()]:
        found.refuse(*_absent(broken[0]))
        return
    if is_config_alone:  # it is judged by its claims
        return
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    pickles = pickled_weights(names)
    others = [name for name in names if ".safetensors" in name]
    if pickles:
        found.refuse("pickle", f"its weights are {listed(pickles)} alone; {HOW_TO_CONVERT}")
    elif "meteora.json" in names:
        found.refuse("fused", "it is a fused checkpoint already, not an adapter")
    elif DIFFUSERS in names:
        found.refuse("diffusers", f"{DIFFUSERS} is a LoRA for an image model of diffusers")
    elif "adapters.npz" in names:
        found.refuse(
            "no_weights",
            "its weights are adapters.npz, as MLX-LM wrote them before it had adapter_config.json;"
            " load them there and save them as adapters.safetensors",
        )
    elif others:
        found.refuse("no_weights", f"it has {listed(others)}, but none of {' or '.join(WEIGHTS)}")
    elif inner := [name for name in names if (folder / name / CONFIG).is_file()]:
        found.refuse("no_weights", f"adapters lie in its folders; say which: {listed(inner)}")
    else:
        found.refuse("no_weights", f"it has neither {' nor '.join(WEIGHTS)}")


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Return the files that can be weights and are pickles by their names."""
    return [
        name for name in names if name.endswith(PICKLES) and not name.startswith(TRAINING_STATE)
    ]


def other_format(head: bytes) -> tuple[str, str] | None:
    """Return the reason code and the name of another file format that begins with `head`."""
    lowered = head.lstrip().lower()
    for signature, code, what in SIGNATURES:
        if head.startswith(signature) or lowered.startswith(signature):
            return code, what
    return None


def is_regular(path: Path, found: Findings) -> bool:
    """Refuse anything but a regular file: opening others can block. A link is followed."""
    if stat.S_ISREG(path.stat().st_mode):
        return True
    found.refuse("not_a_file", f"{path.name} is not a regular file")
    return False


def read_claim(path: Path, extras: OnExtras, found: Findings) -> Claim | None:
    """Read the config at `path`; return None if it cannot be read."""
    if not is_regular(path, found):
        return None
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    config = _parse(data, path.name, found)
    if config is None:
        return None
    if isinstance(config.get("lora_parameters"), dict):
        return mlx_claim(config, found)
    if "peft_type" in config:
        return peft_claim(config, extras, found)
    _explain_other_config(config, found)
    return None


def _parse(data: bytes, name: str, found: Findings) -> dict[str, Any] | None:
    if len(data) > MAX_CONFIG_BYTES:
        found.refuse("config_size", f"{name} has more than {MAX_CONFIG_BYTES} bytes")
    elif data.count(b"[") + data.count(b"{") > MAX_TABLES:
        found.refuse("config_size", f"{name} has more than {MAX_TABLES} lists and tables")
    elif not data.strip():
        found.refuse("empty", f"{name} is empty")
    elif other := other_format(data[:64]):
        found.refuse(other[0], f"{name} is {other[1]}")
    else:
        try:
            return parse_object(data)
        except StrictJSONError as error:
            found.refuse("config", f"{name} cannot be read: {error}")
    return None


def _explain_other_config(config: dict[str, Any], found: Findings) -> None:
    if "fine_tune_type" in config or "lora_layers" in config:
        found.refuse("mlx_fine_tune_type", "it is an MLX-LM config without lora_parameters")
    elif {"model_class", "model_name"} <= config.keys() or "adapter_residual_before_ln" in config:
        found.refuse(
            "adapterhub", "it is an adapter of AdapterHub (bottleneck layers), not PEFT's LoRA"
        )
    elif config and config.keys() <= {"base_model", "base_model_name_or_path"}:
        found.refuse(
            "stub",
            "it is a stub: it names a base and says nothing of an adapter, which lies elsewhere",
        )
    else:
        keys = listed(sorted(config)) or "nothing"
        found.refuse("no_peft_type", f"it has no peft_type, only {shortened(keys, 120)}")
