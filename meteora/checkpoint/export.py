"""Export one expert of a checkpoint as an adapter that PEFT loads.

The stack holds the numbers of an adapter unchanged. Where its tensors had PEFT's names, the
exported file is byte for byte the original, and its hash proves that.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora.adapters.files import CONFIG, PEFT_WEIGHTS
from meteora.adapters.tensors import PREFIX
from meteora.adapters.weights import DTYPES
from meteora.artifacts import MeteoraError, file_sha256
from meteora.base.temporary_folder import temporary_folder
from meteora.checkpoint.manifest import ExpertEntry, Manifest, number_of, read_manifest
from meteora.checkpoint.tensors import open_experts, save_tensors
from meteora.untrusted.findings import inline_code

WORD = re.compile(r"[\w./-]+")
"""A text that needs no quotes in YAML, such as a licence identifier or `owner/name`."""


class ExportError(MeteoraError):
    """An expert cannot be exported."""


def export_expert(folder: Path, name: str, out: Path, base_model: str = "") -> bool:
    """Write an expert as a PEFT adapter.

    Args:
        folder: the checkpoint; it stays as it is
        out: a folder, new or empty
        base_model: the base that the adapter itself named, if known; the config names it if the
            checkpoint's base is not on the Hub

    Returns:
        Whether the file of weights is byte for byte the original; if not, the values of its tensors
        are the same, under PEFT's names.

    Raises:
        UnknownExpertError: there is no such expert.
        ExportError: the folder is not empty.
    """
    manifest = read_manifest(folder)
    e = number_of(name, manifest.names, folder)
    entry, tensors = manifest.experts[e], {}
    with open_experts(folder, manifest) as stack:
        for path, a, b in stack.of_expert(e):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = a.clone()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous().clone()
    config = adapter_config(manifest, e, base_model)
    with new_folder(out) as made:
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(
            _readme(entry, config["base_model_name_or_path"] or ""), encoding="utf-8"
        )
        return _write_weights(made / PEFT_WEIGHTS, tensors, entry.weights_sha256)


def _write_weights(path: Path, tensors: dict[str, Tensor], original_sha256: str) -> bool:
    """Write an adapter's tensors; return whether one of their exact casts is the original file."""
    # the stack may be wider than this adapter's own file
    for candidate in _exact_casts(tensors):
        save_tensors(path, candidate, {"format": "pt"})
        if file_sha256(path) == original_sha256:
            return True
    save_tensors(path, tensors, {"format": "pt"})
    return False


def _readme(entry: ExpertEntry, base: str) -> str:
    """The card of an expert, with the base that it names."""
    front = {"base_model": base, "license": entry.licence, "library_name": "peft"}
    lines = [f"{key}: {value}" for key, value in front.items() if WORD.fullmatch(value)]
    about = [f"From {inline_code(entry.source)}."]
    about += [f"Its base is {inline_code(base)}."] if base else []
    about += [f"Its licence is {inline_code(entry.licence)}."] if entry.licence else []
    return "\n".join(["---", *lines, "---", "", f"# {entry.name}", "", *about, ""])


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Make a folder, or fill an empty one, with all that the block writes; else with nothing.

    Yields:
        the folder to write into. What is left of it after a kill, the next export to the same
        place removes.

    Raises:
        ExportError: something is in `out`, or a file is in place of a folder around it.
    """
    is_folder = out.is_dir()
    beside = out if is_folder else out.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ExportError(f"{beside} is no folder; give the name of a new folder") from None
    with temporary_folder(beside, ".export-") as scratch:
        is_empty = is_folder and [path.name for path in out.iterdir()] == [scratch.name]
        if not is_empty and (out.exists() or out.is_symlink()):
            raise ExportError(f"{out} holds something already; give the name of a new folder")
        made = scratch / "whole"
        made.mkdir()
        yield made
        if is_folder:
            for path in made.iterdir():
                path.rename(out / path.name)
        else:
            made.rename(out)


def _exact_casts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors as they are, then in each dtype that holds every number exactly."""
    yield dict(tensors)
    for dtype in DTYPES.values():
        cast = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        if all(
            tensor.dtype != dtype and torch.equal(tensor, cast[key].to(tensor.dtype))
            for key, tensor in tensors.items()
        ):
            yield cast


def adapter_config(manifest: Manifest, e: int, base_model: str = "") -> dict[str, Any]:
    """Return the PEFT config of expert `e`: every module by its path, with rank and alpha.

    Args:
        base_model: named if the checkpoint's base is not on the Hub
    """
    own = {
        path: (entry.ranks[e], entry.scaling[e])
        for path, entry in manifest.modules.items()
        if entry.ranks[e]
    }
    plain = {path: scaling * r for path, (r, scaling) in own.items()}
    rooted = {path: scaling * r**0.5 for path, (r, scaling) in own.items()}
    use_rslora = not _whole(plain) and _whole(rooted)  # people choose whole numbers as alpha
    alphas = {path: _rounded(alpha) for path, alpha in (rooted if use_rslora else plain).items()}
    ranks = {path: r for path, (r, _) in own.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    on_hub = ":" not in manifest.base.repo_id
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base.repo_id if on_hub else base_model or None,
        "revision": manifest.base.revision if on_hub else None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(p)}": own for p, own in ranks.items() if own != r},
        "alpha_pattern": {f"^{re.escape(p)}": own for p, own in alphas.items() if own != alpha},
        "use_rslora": use_rslora,
        "target_modules": list(own),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _whole(alphas: Mapping[str, float]) -> bool:
    return all(isinstance(_rounded(alpha), int) for alpha in alphas.values())


def _rounded(alpha: float) -> float:
    """Return the nearest whole number if `alpha` differs from it by rounding errors alone."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest) else alpha
