"""Exported experts in llama.cpp: does each give the answers that were recorded of its adapter?

    pip install --no-deps xllamacpp
    python -m tests.benchmarks.llama_cpp CHECKPOINT HOME OUT

CHECKPOINT is one that `meteora run quickstart` made in HOME, since its base is a GGUF file. Each
adapter's recorded answers are asked again over HTTP, greedy: on the base in 32 bits, on its file as
it is, and, to see that an expert matters, on the base in 32 bits without it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from meteora.artifacts import ArtifactId
from meteora.base.sources import find_gguf
from meteora.checkpoint.gguf_export import export_gguf
from meteora.checkpoint.manifest import read_manifest
from pipelines.scoring.served import RecordedAnswer, Server, recorded_answers
from store.ledger import Ledger

MOST = 1_000_000


def write_in_32_bits(base: Path, out: Path) -> None:
    """The same model with its weights dequantised."""
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(out, reader.fields.pop("general.architecture").contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            kind, *inside = field.types
            writer.add_key_value(key, field.contents(), kind, inside[-1] if inside else None)
    for tensor in reader.tensors:
        exact = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, exact.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def num_same(base: Path, expert: Path | None, asked: Sequence[RecordedAnswer]) -> int:
    """How many of the recorded answers llama.cpp gives, with one expert or none."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 1024, 1, 0, 0
    params.cpuparams.n_threads = 1  # threads that wait for each other are slow beside other work
    params.use_jinja, params.warmup, params.verbosity = True, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if expert is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(expert), 1.0)]
    running = xllamacpp.Server(params)  # ends when nothing holds it
    answers = Server(running.listening_address).answers(asked)
    return sum(
        answer.strip() == one.output.strip() for answer, one in zip(answers, asked, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    manifest, ledger = read_manifest(given.checkpoint), Ledger(given.home)
    files = export_gguf(given.checkpoint, given.out)
    quantised, exact = find_gguf(manifest.base.repo_id), given.out / "base-in-32-bits.gguf"
    write_in_32_bits(quantised, exact)
    settings = {"32 bits": exact, quantised.name: quantised}
    print("|".join(["expert", "answers", *settings, "32 bits, without the expert"]))
    for entry, file in zip(manifest.experts, files, strict=True):
        asked = recorded_answers(ledger, ArtifactId(entry.adapter_id), MOST)
        same = [num_same(base, file, asked) for base in settings.values()]
        same.append(num_same(exact, None, asked))
        print("|".join(map(str, [entry.name, len(asked), *same])), flush=True)


if __name__ == "__main__":
    main()
