"""Pair the tensors of a file as A and B of modules; refuse or leave out its other tensors.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      PEFT
model.layers.0.self_attn.q_proj.lora_A.default.weight               without prefix, with a name
model.layers.0.self_attn.q_proj.lora_a                              MLX-LM, transposed
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from meteora.adapters.config import Claim, OnExtras
from meteora.artifacts import AdapterSpec, Reason
from meteora.artifacts.specs import HEADS
from meteora.untrusted.findings import Findings, listed
from meteora.untrusted.safetensors_header import TensorInfo

DTYPES = ("F32", "F16", "BF16")
MAX_DEPTH = 40
"""Most dots in the name of a factor."""
PREFIX = "base_model.model."
WRAPPERS = re.compile(
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What PEFT puts before a module's path, and what `torch.compile`, DDP and FSDP put around modules.
PEFT comes twice where an adapter was trained on a model that had one already."""
PEFT_KEY = re.compile(r"(?P<path>[^.].*)\.lora_(?P<factor>[AB])(\.(?P<name>[^.]+))?\.weight")
MLX_KEY = re.compile(r"(?P<path>[^.].*)\.lora_(?P<factor>[ab])")

# Parts of tensor names that no plain LoRA has, each with a reason code and a description.
VARIANT_KEYS = (
    ("lora_magnitude_vector", "dora", "magnitudes of DoRA"),
    (".lora_B.bias", "lora_bias", "a bias of B"),
    ("trainable_tokens_", "trainable_tokens", "rows of the embedding"),
    (".base_layer.lora_", "target_parameters", "LoRA on bare parameters, as of fused experts"),
    ("lora_diag", "kasa", "KaSA's singular values"),
    ("prompt_embeddings", "peft_type", "prompt embeddings"),
    *(
        (mark, "diffusers", "weights for an image model")
        for mark in (
            "lora_unet_", "lora.down.weight", "lora_down.weight", "unet.", "transformer_blocks.",
            "text_encoder.", "lora_te_", "lora_te1_", "diffusion_model.",
        )
    ),
)  # fmt: skip
EMBEDDINGS = {"embed_tokens", "embed_in", "wte", "wpe", "word_embeddings", "shared"}
WHOLE_MODULES = (
    EMBEDDINGS
    | HEADS
    | {"lora_embedding_A", "lora_embedding_B", "score", "classifier", "qa_outputs", "v_head"}
)
"""Names of embeddings and heads, which belong to the base or to one task."""
LORA_EMBEDDING = ".lora_embedding_"


@dataclass(frozen=True)
class AdapterTensors:
    """Where the factors of one module lie in the file.

    Not transposed, `a_key` is A [r, IN] and `b_key` B [OUT, r], as PEFT writes them (for GPT-2's
    Conv1D too). Transposed, they are A [IN, r] and B [r, OUT], as MLX-LM does.
    """

    a_key: str
    b_key: str
    transposed: bool


class Stamp(NamedTuple):
    """Facts of a file that change when its content does."""

    inode: int
    num_bytes: int
    written_ns: int
    """Time of the last change, since the epoch."""

    @classmethod
    def of(cls, file: BinaryIO) -> Self:
        status = os.fstat(file.fileno())
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Adapter:
    """A LoRA that can be an expert: its spec, and where its tensors lie."""

    spec: AdapterSpec
    weights: Path
    """The safetensors file."""
    tensors: dict[str, AdapterTensors]
    """By the module's path in the base model, the same as in `spec.modules`."""
    reasons: tuple[Reason, ...] = ()
    """Warnings that a person should know; the adapter can be used."""
    stamp: Stamp | None = None
    """Of the file when it was checked; None if its times were too recent to be reliable."""


def sort_tensors(
    tensors: Mapping[str, TensorInfo], claim: Claim, extras: OnExtras, found: Findings
) -> tuple[dict[str, AdapterTensors], tuple[str, ...]]:
    """Pair the factors; other tensors are refused, or stripped where the policy allows it.

    Returns:
        the pairs by the module's path in the base model, sorted; and what is stripped
    """
    factors: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    rest: list[str] = []
    for key in tensors:
        bare = WRAPPERS.sub("", key)
        pattern = MLX_KEY if claim.format == "mlx" else PEFT_KEY
        match = pattern.fullmatch(bare)
        if (
            match is None
            or bare.count(".") > MAX_DEPTH
            # MLX-LM has one pair of names for both; PEFT says lora_embedding_A
            or match["path"].rsplit(".", 1)[-1] in EMBEDDINGS
            or any(mark in key for mark, _, _ in VARIANT_KEYS)
        ):
            rest.append(key)
            continue
        factor = match["factor"].upper()
        names.add(match.groupdict().get("name") or "")
        pair = factors.setdefault(match["path"], {})
        if factor in pair:
            found.refuse("duplicate_module", f"{pair[factor]} and {key} are the same tensor's name")
        pair[factor] = key
    if len(names) > 1:
        found.refuse(
            "several_adapters", f"it holds several adapters ({listed(sorted(names))}); save each"
        )
    stripped = _sort_rest(rest, claim, extras, found)
    modules = _pairs(factors, claim.format == "mlx", found)
    if not factors:
        found.refuse("no_lora", f"none of its {len(tensors)} tensors is a lora_A or lora_B")
    elif claim.format == "peft":
        _check_prefix(tensors, found)
    return modules, stripped


def _check_prefix(keys: Collection[str], found: Findings) -> None:
    """Warn of keys by which PEFT would find no module."""
    if not any(PREFIX in key for key in keys):
        found.warn("bare_keys", f"its keys lack the prefix {PREFIX}; they are read as they are")
    wrapped = [key for key in keys if WRAPPERS.sub("", key) != key.removeprefix(PREFIX)]
    if wrapped:
        found.warn(
            "wrapped_keys",
            f"{listed(wrapped)}: its keys name what training put around the modules, and are read"
            " without it; PEFT would read none of them",
        )


def refuse_variants(keys: Collection[str], found: Findings) -> None:
    """Refuse a file without a config if the names of its tensors show that it is no plain LoRA."""
    for mark, code, what in VARIANT_KEYS:
        if members := [key for key in keys if mark in key]:
            found.refuse(code, f"it holds {what}: {listed(members)}")


def _pairs(
    factors: Mapping[str, Mapping[str, str]], transposed: bool, found: Findings
) -> dict[str, AdapterTensors]:
    alone = [f"{path}.lora_{next(iter(pair))}" for path, pair in factors.items() if len(pair) < 2]
    if alone:
        found.refuse(
            "missing_factor", f"{listed(sorted(alone))} is alone, without its other factor"
        )
    return {
        path: AdapterTensors(factors[path]["A"], factors[path]["B"], transposed)
        for path in sorted(factors)
        if len(factors[path]) == 2
    }


def _sort_rest(keys: list[str], claim: Claim, extras: OnExtras, found: Findings) -> tuple[str, ...]:
    """Refuse tensors that are no factor of a linear layer; return the stripped ones."""
    kinds: dict[tuple[str, str], list[str]] = {}
    strippable: list[str] = []
    embeddings = tuple(f"{k.partition(LORA_EMBEDDING)[0]}." for k in keys if LORA_EMBEDDING in k)
    for key in sorted(keys):
        variant = next(((code, why) for mark, code, why in VARIANT_KEYS if mark in key), None)
        bare = WRAPPERS.sub("", key)
        parts = bare.split(".")
        if variant is not None:
            kinds.setdefault(variant, []).append(key)
        elif (
            not WHOLE_MODULES.isdisjoint(parts)
            # PEFT saves every module whose path ends so, as `input_layernorm` for `norm`
            or any(f"{name}." in bare for name in claim.modules_to_save)
            or key.startswith(embeddings)  # beside a LoRA on one, whatever its name is
        ):
            strippable.append(key)
        elif parts[-1] == "bias":
            kinds.setdefault(("bias", "biases of the base"), []).append(key)
        else:
            what = ("unknown_tensors", "tensors that are no LoRA factors")
            kinds.setdefault(what, []).append(key)
    for (code, what), members in kinds.items():
        found.refuse(code, f"it holds {what}: {listed(members)}")
    if strippable and extras == "refuse":
        shown = listed(strippable)
        found.refuse(
            "modules_to_save",
            f"it holds the base's own weights under its LoRA: {shown}; PEFT saves them beside a"
            " LoRA on the head, mostly unchanged: allow its LoRA alone with modules_to_save: strip"
            if all(".base_layer." in key for key in strippable)
            else f"it replaces whole modules of the base: {shown}; experts share one base, so leave"
            " it out, or allow its LoRA alone with modules_to_save: strip",
        )
    elif strippable:
        found.warn(
            "stripped",
            f"{len(strippable)} tensors that replace modules of the base are left out:"
            f" {listed(strippable)}",
        )
    return tuple(strippable)
