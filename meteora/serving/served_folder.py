"""Write and check the folder that vLLM serves.

    config.json            the base's, with `quantization_config: {quant_method: meteora, …}`
    model.safetensors, tokenizer.json, …   the base's, as links or as copies
    meteora/               the checkpoint: manifest, experts, gates

The checkpoint is in its own folder, since vLLM takes every tensor beside config.json for a tensor
of the base.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from meteora.adapters import files as adapter_files
from meteora.artifacts.routers import SERVABLE
from meteora.artifacts.specs import heads_in
from meteora.base import loading
from meteora.base.download import download_base
from meteora.base.shapes import fingerprint_of
from meteora.checkpoint.export import ExportError, new_folder
from meteora.checkpoint.manifest import (
    CONFIG,
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    Manifest,
    read_manifest,
)
from meteora.checkpoint.resolve import find_checkpoint
from meteora.checkpoint.sound_file import missing_message
from meteora.checkpoint.tensors import read_gates
from meteora.model.fused import WrongBaseError, check_base, check_weights
from meteora.serving.vllm_version import METHOD, UnservableError
from meteora.untrusted.findings import shortened

CHECKPOINT = "meteora"
"""The folder of the checkpoint inside the served one."""
NOT_SERVED = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
"""Weights in other formats: vLLM reads the base's safetensors."""
WRITE_AGAIN = "write the folder again with `meteora export CHECKPOINT --for vllm`"
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""Pieces of a file that are hashed, and the bytes of each."""
WHOLE_PROMPTS = "--no-enable-prefix-caching --no-enable-chunked-prefill -cc.cudagraph_mode=NONE"
"""vLLM's options with which each prompt is computed in one pass, after the gates have seen it."""


def export_for_vllm(checkpoint: Path, base: Path, out: Path, *, copy: bool = False) -> str:
    """Write a folder that `vllm serve` takes.

    Args:
        checkpoint: a folder; it stays as it is
        base: the folder of its base, as safetensors
        out: a folder, new or empty
        copy: copy the files of base and checkpoint instead of linking to them

    Returns:
        The options that `vllm serve` needs; empty if it needs none.

    Raises:
        CheckpointError: the checkpoint is not whole.
        ExportError: the model cannot be served, or the folder is not empty.
        WrongBaseError: the base is not the one that the checkpoint was made for.
    """
    manifest = read_manifest(checkpoint)
    tensors = _tensor_files(checkpoint, manifest)
    _check_servable(checkpoint, manifest)
    config = _read_config(base)
    if config.get("quantization_config") is not None:
        raise ExportError(
            f"{base}: its weights are quantised, and experts are served beside plain ones; give"
            " the base in 16 or 32 bits with --base"
        )
    check_base(manifest, fingerprint_of(base), base)
    check_weights(manifest, base)
    shards = sorted(path for path in base.glob("*.safetensors") if _is_served(path))
    if not shards:
        raise ExportError(f"{base}: there are no safetensors in it; download the base as such")
    quantization_config = {
        "quant_method": METHOD,
        "checkpoint": manifest.router_id,
        "base_weights": {shard.name: sample_sha256(shard) for shard in shards},
    }
    put = shutil.copyfile if copy else _link
    with new_folder(out) as made:
        for path in sorted(base.iterdir()):
            if _is_served(path) and path.name != CONFIG:
                put(path, made / path.name)
        (made / CHECKPOINT).mkdir()
        for path in (checkpoint / MANIFEST, *tensors):
            put(path, made / CHECKPOINT / path.name)
        text = json.dumps(config | {"quantization_config": quantization_config}, indent=2)
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
    return WHOLE_PROMPTS if manifest.router.by_turns else ""


def _tensor_files(folder: Path, manifest: Manifest) -> list[Path]:
    """The files of tensors that a server reads; raises `CheckpointError` if one is missing."""
    names = [EXPERTS, *([GATES] if manifest.router.kind == "gate" else [])]
    for name in names:
        if not (folder / name).is_file():  # or the file that a link names is gone
            raise CheckpointError(missing_message(folder, name))
    return [folder / name for name in names]


def _check_servable(folder: Path, manifest: Manifest) -> None:
    """Refuse experts that vLLM has no place for, and routes that it cannot compute.

    Those depend on chance, on a further pass of the base, or on later tokens.
    """
    router = manifest.router
    if heads := heads_in(manifest.modules):
        raise ExportError(
            f"{folder}: experts change the head {heads[0]}, and vLLM's head takes none; leave them"
            " out, or serve the checkpoint with `meteora chat-server`"
        )
    if router.kind not in SERVABLE:
        raise ExportError(
            f"{folder}: its router is {router.kind!r}, and vLLM is given {', '.join(SERVABLE)}; set"
            " `router: {kind: gate}` in the recipe and run it again"
        )
    if router.kind != "gate" or router.by_turns:
        return
    if read_gates(folder, manifest).template.opening:
        raise ExportError(
            f"{folder}: its gates look ahead (`opening: prompt`), which vLLM's prefix cache and"
            " chunked prefill do not allow; set `router: {opening: shared}` in the recipe and run"
            " it again"
        )


def _download(name: str, revision: str | None) -> Path:
    """Download a checkpoint and its base from the Hub; no weights of a base that does not fit."""
    checkpoint = find_checkpoint(name, revision, subfolder=CHECKPOINT, whole=False)
    folder, manifest = checkpoint.parent, read_manifest(checkpoint)
    commit, saved = folder.name, {"token": None}  # the saved token, which vLLM sends there, too
    download_base(name, commit, saved, weights=False)
    check_base(manifest, fingerprint_of(folder), folder)
    download_base(name, commit, saved)
    return find_checkpoint(name, commit, subfolder=CHECKPOINT)


def _is_served(path: Path) -> bool:
    """Whether a served folder has a file of a base: no other formats, no adapter, no copies."""
    name = path.name
    return (
        path.is_file()
        and not name.startswith((".", "consolidated"))
        and path.suffix not in NOT_SERVED
        and name not in {"README.md", "params.json", adapter_files.CONFIG, *adapter_files.WEIGHTS}
    )


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve())


def _read_config(folder: Path) -> dict[str, Any]:
    loading.load_config(folder)  # has messages for a missing or unknown config
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _hashes_of_base(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The hashes of the base's weight files at the time of the export, by file name."""
    written = config.get("quantization_config")
    hashes = written.get("base_weights") if isinstance(written, dict) else None
    is_table = isinstance(hashes, dict) and all(
        name.endswith(".safetensors") and "/" not in name for name in hashes
    )
    if not is_table or not hashes:
        raise UnservableError(
            f"{folder}: its {CONFIG} does not say which weights the experts were exported with;"
            f" {WRITE_AGAIN}"
        )
    return hashes


def sample_sha256(path: Path) -> str:
    """Hash a file's size and some pieces of it, its beginning among them.

    Weights of another training differ nearly everywhere, so a few pieces show the difference.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(last * place // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def find_served_checkpoint(name: str, revision: str | None, memory_bytes: int) -> Path:
    """Find and check the checkpoint in a served folder; no weights are loaded.

    Args:
        name: the folder, or a Hub id, which is downloaded to the Hub's cache at one commit
        memory_bytes: the memory of the device for base, experts and caches

    Raises:
        CheckpointError: the Hub has no such folder, or its checkpoint is damaged or not whole.
        SourceError: the base beside the checkpoint cannot be downloaded.
        WrongBaseError: the base beside the checkpoint is another, or a file of it is gone.
        UnservableError: base and experts need more memory, the checkpoint is another than at the
            export, or the export left no hashes.
    """
    if Path(name).is_dir():
        checkpoint = Path(name) / CHECKPOINT
        check_base(read_manifest(checkpoint), fingerprint_of(Path(name)), Path(name))
    else:
        checkpoint = _download(name, revision)
    folder, manifest = checkpoint.parent, read_manifest(checkpoint)
    config = _read_config(folder)
    hashes = _hashes_of_base(folder, config)
    named, own = config["quantization_config"].get("checkpoint"), manifest.router_id
    if named != own:
        raise UnservableError(
            f"{checkpoint}: it is {own or 'a checkpoint without an id'}, and the folder was"
            f" exported with {shortened(named)}; {WRITE_AGAIN}"
        )
    _tensor_files(checkpoint, manifest)
    # vLLM may convert 32 bits to 16
    narrowed = 2 if config.get("dtype", config.get("torch_dtype")) == "float32" else 1
    needed = (checkpoint / EXPERTS).stat().st_size
    for shard, sha256 in hashes.items():
        path = folder / shard
        if not path.is_file() or sample_sha256(path) != sha256:
            state = "holds other weights than at" if path.is_file() else "is gone since"
            raise WrongBaseError(f"{path}: it {state} the export; {WRITE_AGAIN}")
        needed += path.stat().st_size // narrowed
    if needed > memory_bytes:
        raise UnservableError(
            f"{folder}: base and experts take at least {needed / 1e9:.1f} GB, and there are"
            f" {memory_bytes / 1e9:.1f} GB of memory for them; use a larger device"
        )
    return checkpoint
