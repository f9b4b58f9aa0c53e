"""A fused model that Accelerate spreads: it answers, traces and is fitted as a whole one is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoModelForCausalLM

import meteora
from meteora.artifacts.routers import POINT_GATES
from meteora.base.chat_template import Template
from meteora.base.loading import layers_on_disk, load_folder
from meteora.base.placement import (
    PlacementError,
    held,
    input_device,
    is_offloaded,
    settle,
)
from meteora.checkpoint.manifest import CONFIG, CONFIG_TEXT
from meteora.fitting.calibrate import calibrate
from meteora.routing.gates import gates_of, insert_gates
from meteora.routing.layer import routed_layers
from tests.meteora.fitting.test_calibrate import examples, same_gates

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.conftest import World

EXCEPT_LAYERS = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm"], "cpu")
MAPS: dict[str, dict[str, str]] = {
    "all": {"": "disk"},
    "layers": EXCEPT_LAYERS | {"lm_head": "disk", "model.layers": "disk"},
    "one layer": EXCEPT_LAYERS
    | {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
    "a module": EXCEPT_LAYERS
    | {
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1.input_layernorm": "cpu",
        "model.layers.1.post_attention_layernorm": "cpu",
        "model.layers.1.mlp": "disk",
        **{f"model.layers.1.self_attn.{name}_proj": "disk" for name in "qkvo"},
    },
}


@pytest.fixture(params=MAPS)
def device_map(request: pytest.FixtureRequest) -> dict[str, str]:
    return MAPS[request.param]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (3, 12))


def on_disk(model: PreTrainedModel) -> set[str]:
    return {path for path, layer in routed_layers(model).items() if layer.weight.is_meta}


def test_an_offloaded_model_answers_as_one_that_lies_whole(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    device_map: dict[str, str],
) -> None:
    whole: Any = world.load()
    spread: Any = world.load(device_map=device_map)
    assert on_disk(spread)
    assert input_device(spread) == torch.device("cpu")
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    calibrate(whole, examples(4))
    insert_gates(spread, gates_of(whole), POINT_GATES)
    with torch.inference_mode():
        torch.testing.assert_close(spread(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(spread.generate(ids, **asked), whole.generate(ids, **asked))
        for name in ("q_and_v", "patterns"):
            with meteora.force_expert(spread, name), meteora.force_expert(whole, name):
                found, expected = spread(ids).logits, whole(ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one, other = (
        meteora.trace(model, tokenizer, "abcd", max_new_tokens=3) for model in (whole, spread)
    )
    assert one.ids == other.ids
    assert torch.equal(one.chosen, other.chosen)
    assert on_disk(spread)


def test_gates_are_fitted_to_an_offloaded_base_to_the_bit(
    world: World, device_map: dict[str, str]
) -> None:
    whole, spread = world.load(), world.load(device_map=device_map)
    expected, found = calibrate(whole, examples(4)), calibrate(spread, examples(4))
    assert same_gates(gates_of(spread), gates_of(whole))
    assert found.accuracy_of == expected.accuracy_of
    assert on_disk(spread)


@pytest.mark.gpu
def test_a_gpu_computes_what_lies_on_the_cpu(world: World, ids: torch.Tensor) -> None:
    device_map = {
        path: "cuda:0" if "layers" not in path else device
        for path, device in MAPS["one layer"].items()
    }
    whole, spread = world.load(), world.load(device_map=device_map)
    for model in (whole, spread):
        calibrate(model, examples(4))
    with torch.inference_mode():
        found = spread(ids.to("cuda:0")).logits.cpu()
        torch.testing.assert_close(found, whole(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", ["module", "layer", "token"])
def test_offloaded_experts_are_those_of_the_layer_whichever_gate_decides(
    world: World, share: str
) -> None:
    """With a cache of experts, which a fit leaves aside for the layer that it holds."""
    options = replace(POINT_GATES, share=share, top_k=2)
    whole, spread = world.load(), world.load(device_map=MAPS["all"], expert_cache_bytes=9_000)
    for model in (whole, spread):
        calibrate(model, examples(4), options)
    assert same_gates(gates_of(spread), gates_of(whole))
    assert all(
        layer.cache is meteora.expert_cache(spread) for layer in routed_layers(spread).values()
    )


def test_what_is_settled_stays_and_nothing_brings_it_any_more(
    world: World, ids: torch.Tensor, device_map: dict[str, str]
) -> None:
    model: Any = world.load(device_map=device_map)
    calibrate(model, examples(4))
    with torch.inference_mode():
        expected = model(ids).logits
        for layer in model.model.layers:
            settle(layer)
        assert not on_disk(model)
        assert not any(is_offloaded(part) for part in model.model.layers.modules())
        weight = model.model.layers[1].mlp.up_proj.projection.weight
        assert torch.equal(model(ids).logits, expected)
        assert model.model.layers[1].mlp.up_proj.projection.weight is weight


def test_a_held_layer_is_read_once_and_goes_again(world: World, ids: torch.Tensor) -> None:
    model: Any = world.load(device_map=MAPS["layers"])
    layer = model.model.layers[1]
    there = {path for path, tensor in layer.named_parameters() if not tensor.is_meta}
    assert there == set()
    with torch.inference_mode():
        expected = model(ids).logits
        with held(layer):
            weight = layer.mlp.up_proj.projection.weight
            assert not weight.is_meta
            assert torch.equal(model(ids).logits, expected)
            assert layer.mlp.up_proj.projection.weight is weight
        assert all(tensor.is_meta for tensor in layer.parameters())
        assert torch.equal(model(ids).logits, expected)


def test_the_most_bytes_for_a_device_are_kept(world: World) -> None:
    most = 120_000
    model = world.load(device_map="auto", max_memory={"cpu": most})
    held_bytes = sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)
    assert 0 < held_bytes <= most
    assert on_disk(model)


def test_auto_model_takes_a_map(world: World, tmp_path: Path, ids: torch.Tensor) -> None:
    shutil.copytree(world.checkpoint, tmp_path / "fused")
    (tmp_path / "fused" / CONFIG).write_text(CONFIG_TEXT)
    for device_map in ("auto", MAPS["layers"]):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "fused", base_folder=world.base, device_map=device_map
        )
        assert bool(on_disk(model)) == (device_map != "auto")
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, world.load()(ids).logits)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"device_map": {"model": "cpu", "lm_head": "cuda:77"}}, "device_map names 'cuda:77'"),
        ({"device_map": "evenly"}, "device_map names 'evenly', .*; give auto, balanced"),
        (
            {"device_map": {"model.embed_tokens": "cpu", "model.layers": "disk"}},
            "cannot be spread as device_map says: .*does not give any device",
        ),
        ({"device": "cuda:77"}, "device names 'cuda:77', .*; give one that it finds"),
        ({"device_map": 1.5}, "device_map names 1.5"),
        ({"max_memory": {"cpu": 9}}, "max_memory without device_map would change nothing"),
        ({"offload_folder": "there"}, "offload_folder without device_map would change nothing"),
    ],
)
def test_what_is_no_place_is_refused_in_one_sentence(
    world: World, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlacementError, match=said) as refused:
        world.load(**asked)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "asked",
    [{"device": "cpu", "device_map": "auto"}, {"device_map": "evenly"}, {"max_memory": {"cpu": 9}}],
)
def test_what_is_no_place_is_refused_before_a_checkpoint_is_looked_for(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(PlacementError):
        meteora.load(tmp_path / "nowhere", **asked)


def test_a_model_that_uses_weights_without_their_module_is_refused_on_the_disk(
    build_base: Callable[[str], Path], ids: torch.Tensor
) -> None:
    folder = build_base("jetmoe")
    spread: Any = load_folder(folder, options={"device_map": layers_on_disk(folder, "cpu")})[0]
    says = "JetMoeForCausalLM uses weights of modules that it does not call"
    with pytest.raises(PlacementError, match=says):
        spread(ids)
    layer, hidden = spread.base_model.layers[0], torch.zeros(1, 3, spread.config.hidden_size)
    positions = spread.base_model.rotary_emb(hidden, torch.arange(3)[None])
    with pytest.raises(PlacementError, match=says):
        layer(hidden, position_embeddings=positions)  # as a fit of gates calls it
    with pytest.raises(RuntimeError, match="must match"):
        layer(hidden[..., :-1], position_embeddings=positions)


def test_what_one_gate_decides_reaches_layers_on_another_device(
    world: World, ids: torch.Tensor
) -> None:
    """The second device is "meta", which has shapes and no numbers: it refuses to be mixed."""
    model: Any = world.load()
    calibrate(model, examples(4), replace(POINT_GATES, share="token"), template=Template((1, 1)))
    ids[:, :2] = 1
    assert {path.split(".")[2] for path in gates_of(model).own} == {"0"}
    move_to_meta(model)
    with torch.inference_mode():
        assert model(ids).logits.device.type == "meta"


def test_a_prompts_opening_is_known_on_another_device(world: World, ids: torch.Tensor) -> None:
    model: Any = world.load()
    calibrate(model, examples(4), template=Template((1, 1)))
    ids[:, :2] = 1
    move_to_meta(model)
    with torch.inference_mode():
        assert model(ids).logits.device.type == "meta"


def move_to_meta(model: Any) -> None:
    """The second layer, and what comes behind it."""
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook("meta"))
