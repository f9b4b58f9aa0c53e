"""Export experts as LoRA adapters in GGUF, the format of llama.cpp.

    model.layers.0.self_attn.q_proj      blk.0.attn_q.weight.lora_a [r, IN], .lora_b [OUT, r]

llama.cpp scales an adapter by alpha / r with one alpha for all modules. If a module needs another
alpha, its B is scaled. llama.cpp orders the rows of q and k differently for some bases; so does B
here. There are no gates: llama.cpp takes one adapter for a whole request.
"""

from collections import Counter
from pathlib import Path

import gguf
import torch
from gguf import MODEL_ARCH

from meteora.artifacts import Fingerprint
from meteora.base.shapes import shape_of
from meteora.checkpoint.export import ExportError, new_folder
from meteora.checkpoint.manifest import Manifest, number_of, read_manifest
from meteora.checkpoint.sound_file import AGAIN
from meteora.checkpoint.tensors import ExpertsFile, open_experts

ARCHITECTURES = {
    "CohereForCausalLM": MODEL_ARCH.COMMAND_R,
    "Gemma2ForCausalLM": MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": MODEL_ARCH.GEMMA3,
    "GemmaForCausalLM": MODEL_ARCH.GEMMA,
    "GraniteForCausalLM": MODEL_ARCH.GRANITE,
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "NemotronForCausalLM": MODEL_ARCH.NEMOTRON,
    "Olmo2ForCausalLM": MODEL_ARCH.OLMO2,
    "Olmo3ForCausalLM": MODEL_ARCH.OLMO2,
    "Phi3ForCausalLM": MODEL_ARCH.PHI3,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
    "SmolLM3ForCausalLM": MODEL_ARCH.SMOLLM3,
    "StableLmForCausalLM": MODEL_ARCH.STABLELM,
    "Starcoder2ForCausalLM": MODEL_ARCH.STARCODER2,
}
"""llama.cpp's architecture by the class in transformers. For each, both generate the same tokens
(`tests/benchmarks/llama_cpp_bases.py`)."""
HEAD = "output.weight"
"""llama.cpp's name of the output head's weight; a base whose head is its embeddings has none."""
IN_PAIRS = {MODEL_ARCH.LLAMA, MODEL_ARCH.GRANITE, MODEL_ARCH.SMOLLM3}
"""Architectures whose q and k have another order of rows in llama.cpp."""


def export_gguf(folder: Path, out: Path, name: str = "", base: Path | None = None) -> list[Path]:
    """Write each expert as `NAME.gguf`; returns the paths of the files.

    Args:
        folder: the checkpoint; it stays as it is
        out: a folder, new or empty
        name: of one expert; empty: all experts
        base: the folder of the base, if it is at hand: its config says whether it has a head of
            its own

    Raises:
        UnknownExpertError: there is no such expert.
        ExportError: llama.cpp has no such base or module, or the folder is not empty.
    """
    manifest = read_manifest(folder)
    every = range(len(manifest.experts))
    asked = [number_of(name, manifest.names, folder)] if name else every
    names = _tensor_names(folder, manifest)
    heads = [
        path
        for path, own in names.items()
        if own == HEAD and any(manifest.modules[path].ranks[e] for e in asked)
    ]
    if heads and base and not shape_of(base).head_parameters:
        raise ExportError(
            f"{folder}: an expert is on {heads[0]}, whose weights are the embeddings' in this base;"
            " llama.cpp takes no LoRA there, so drop its experts, or name another with --expert"
        )
    files = {e: f"{manifest.names[e]}.gguf" for e in asked}
    # the stack is checked once, for all experts
    with new_folder(out) as made, open_experts(folder, manifest) as stack:
        for e, file in files.items():
            _write(made / file, stack, e, names)
    return [out / file for file in files.values()]


def _tensor_names(folder: Path, manifest: Manifest) -> dict[str, str]:
    """llama.cpp's name of the weight of each module that an expert changes."""
    base = manifest.base.fingerprint
    if (architecture := ARCHITECTURES.get(base.architecture)) is None:
        raise ExportError(
            f"{folder}: its base is a {base.architecture}, and adapters are written for"
            f" {', '.join(ARCHITECTURES)}"
        )
    known = gguf.get_tensor_name_map(architecture, base.num_hidden_layers)
    modules = {path: entry for path, entry in manifest.modules.items() if entry.num_ranks}
    names = {path: known.get_name(path) for path in modules}
    if unknown := [path for path, name in names.items() if name is None]:
        raise ExportError(f"{folder}: llama.cpp has no name for {unknown[0]}; drop its experts")
    for path, entry in modules.items():
        heads = _heads(path, base)
        if heads is not None and (heads < 1 or entry.out_features % (2 * heads)):
            raise ExportError(
                f"{folder}: {path} has {entry.out_features} outputs, which are not those of {heads}"
                f" heads; {AGAIN}"
            )
    return {path: f"{name}.weight" for path, name in names.items()}


def _write(out: Path, stack: ExpertsFile, e: int, names: dict[str, str]) -> None:
    manifest = stack.manifest
    base, entry = manifest.base.fingerprint, manifest.experts[e]
    architecture = ARCHITECTURES[base.architecture]
    alphas = Counter(module.scaling[e] * module.ranks[e] for module in manifest.modules.values())
    del alphas[0.0]  # of modules that it lacks
    alpha = alphas.most_common(1)[0][0]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(entry.name)
    if entry.licence:
        writer.add_license(entry.licence)
    for path, a, b in stack.of_expert(e):
        own = manifest.modules[path].scaling[e] * len(a)
        scaled = b if own == alpha else b.float() * (own / alpha)
        heads = _heads(path, base) if architecture in IN_PAIRS else None
        if heads is not None:  # in llama.cpp the two rows of a pair lie together
            scaled = scaled.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)
        for tensor, kind in ((a, "lora_a"), (scaled, "lora_b")):
            exact = tensor if tensor.dtype == torch.float16 else tensor.float()
            writer.add_tensor(f"{names[path]}.{kind}", exact.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(path: str, base: Fingerprint) -> int | None:
    """The number of heads of q or k; None for other modules."""
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}
    return heads.get(path.rpartition(".")[2])
