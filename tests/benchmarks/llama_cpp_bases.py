"""Experts of many bases in llama.cpp: does it give the tokens that transformers gives?

    pip install --no-deps xllamacpp
    python -m tests.benchmarks.llama_cpp_bases BASE LLAMA_CPP OUT

BASE is a folder with SmolLM2-135M-Instruct, for its tokenizer. LLAMA_CPP is llama.cpp's source
code, whose package `conversion` makes a GGUF file of each model. The models are tiny and of random
weights, one for each architecture that `meteora export --for llama.cpp` takes, and so are two
experts: one changes all linear layers, one q and k alone. Greedy, in 32 bits, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import torch
import transformers
import xllamacpp
from peft import LoraConfig, get_peft_model

import meteora
from meteora.adapters import reader
from meteora.adapters.compatibility import fit_to_base
from meteora.artifacts import RouterOptions
from meteora.base import loading
from meteora.base.shapes import fingerprint_of, linear_sizes
from meteora.checkpoint.gguf_export import ARCHITECTURES, export_gguf
from meteora.checkpoint.manifest import EXPERTS, MANIFEST, BaseEntry, ExpertEntry, Manifest
from meteora.checkpoint.stack import module_entries, stack_adapters
from meteora.model.fused import insert_experts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 64, "query_pre_attn_scalar": 16}
FURTHER: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": WINDOW,
    "Gemma3ForCausalLM": WINDOW,
    "Olmo3ForCausalLM": {"sliding_window": 64},
    "Phi3ForCausalLM": {"original_max_position_embeddings": 256},
    "GraniteForCausalLM": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
}
CONFIGS = {"Gemma3ForCausalLM": "Gemma3TextConfig"}
"""Names of configs that do not follow from the architecture's."""
EXPERTS_OF = {"everywhere": "all-linear", "attention": ["q_proj", "k_proj"]}
FUSED = {"Phi3ForCausalLM": ["qkv_proj"]}
PROMPTS = ("Compute 3 + 33.", "Order these: 9, 4, 1", "Once upon a time", "The ISO date of March 3")
NUM_NEW = 16
CONVERT = """
import sys, pathlib, gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
base, out = map(pathlib.Path, sys.argv[1:])
config = ModelBase.load_hparams(base, False)
made = get_model_class(get_model_architecture(config, ModelType.TEXT), mmproj=False)
made.get_vocab_base_pre = lambda *_: "smollm"  # it does not expect this tokenizer here
made.set_vocab = lambda self: self._set_vocab_gpt2()
with torch.inference_mode():
    made(base, gguf.LlamaFileType.ALL_F32, out).write()
"""
SOURCE, COMMIT = "path:made", f"sha256:{'0' * 64}"


def write_base(architecture: str, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    name = CONFIGS.get(architecture, architecture.replace("ForCausalLM", "Config"))
    ends = {f"{end}_token_id": tokenizer.eos_token_id for end in ("bos", "eos", "pad")}
    sizes = SIZES | FURTHER.get(architecture, {}) | ends
    torch.manual_seed(0)
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_checkpoint(base: Path, architecture: str, out: Path) -> Manifest:
    """Two experts of random weights, and no gates."""
    adapters = []
    for seed, (name, targets) in enumerate(EXPERTS_OF.items()):
        asked = targets if name == "everywhere" else FUSED.get(architecture, targets)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = LoraConfig(r=4 - 2 * seed, lora_alpha=8, target_modules=asked, task_type="CAUSAL_LM")
        adapter = get_peft_model(model, lora)
        torch.manual_seed(seed)
        for path, parameter in adapter.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=0.3)
        adapter.save_pretrained(str(out / name))
        adapters.append(fit_to_base(reader.read(out / name), linear_sizes(base)))
    stack_adapters(adapters, out / EXPERTS)
    entries = [
        ExpertEntry(name, one.spec.id, SOURCE, COMMIT, one.spec.weights_sha256, "", "")
        for name, one in zip(EXPERTS_OF, adapters, strict=True)
    ]
    manifest = Manifest(
        base=BaseEntry(SOURCE, COMMIT, fingerprint_of(base)),
        experts=tuple(entries),
        modules=module_entries([one.spec for one in adapters]),
        router=RouterOptions("uniform", 1, 1.0),
    )
    (out / MANIFEST).write_text(manifest.to_json())
    return manifest


def convert(llama_cpp: Path, base: Path, out: Path) -> None:
    """By llama.cpp's own code, which needs its own version of gguf."""
    paths = os.pathsep.join([str(llama_cpp), str(llama_cpp / "gguf-py")])
    command = [sys.executable, "-c", CONVERT, base, out]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True)


def in_llama_cpp(base: Path, expert: Path | None, prompts: list[list[int]]) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 256, 1, 0, 0
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = disabled
    if expert is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(expert), 1.0)]
    running = xllamacpp.Server(params)  # ends when nothing holds it
    found = []
    for ids in prompts:
        asked = {"prompt": ids, "n_predict": NUM_NEW, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | {"return_tokens": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(f"{running.listening_address}/completion", body, headers)  # noqa: S310
        with urlopen(request) as answer:  # noqa: S310  (on this machine)
            found.append(json.load(answer)["tokens"])
    return found


def in_transformers(model: Any, expert: str, prompts: list[list[int]]) -> list[list[int]]:
    routing = meteora.force_expert(model, expert) if expert else meteora.without_experts(model)
    with routing, torch.inference_mode():
        return [
            model.generate(
                torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "llama_cpp", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    tokenizer = loading.load_tokenizer(given.base)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    print("|".join(["architecture", "base", *EXPERTS_OF]), flush=True)
    for architecture in ARCHITECTURES:
        out = given.out / architecture
        shutil.rmtree(out, ignore_errors=True)
        base, checkpoint = out / "base", out / "checkpoint"
        write_base(architecture, tokenizer, base)
        manifest = write_checkpoint(base, architecture, checkpoint)
        convert(given.llama_cpp, base, out / "base.gguf")
        files = {file.stem: file for file in export_gguf(checkpoint, out / "experts")}
        model, _ = loading.load_folder(base, dtype=torch.float32)
        insert_experts(model, checkpoint, manifest)
        same = [
            sum(map(list.__eq__, in_transformers(model.eval(), expert, prompts), theirs))
            for expert in ("", *EXPERTS_OF)
            for theirs in [in_llama_cpp(out / "base.gguf", files.get(expert), prompts)]
        ]
        shown = [f"{count} of {len(PROMPTS)}" for count in same]
        print("|".join([architecture, *shown]), flush=True)


if __name__ == "__main__":
    main()
