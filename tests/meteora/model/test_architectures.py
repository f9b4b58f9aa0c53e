"""No architecture is known to the code: each of these is found, routed and calibrated alike."""

import json
import random
import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.loading import layers_on_disk, load_folder
from meteora.base.shapes import (
    fingerprint_of,
    linear_sizes,
    norms_of,
    shape_of,
    shape_of_model,
    weight_norms,
)
from meteora.base.sources import SourceError
from meteora.checkpoint.manifest import MANIFEST, ModuleEntry
from meteora.fitting.background import fit_to_background
from meteora.fitting.calibrate import calibrate
from meteora.fitting.layerwise import Sweep, SweepError
from meteora.fitting.sequences import LabelledSequence
from meteora.model.chat import Chat
from meteora.model.fused import EXPERTS, force_expert, insert_layer, without_experts
from meteora.model.update_sizes import read_prompts
from meteora.routing.gates import gates_of
from meteora.routing.hooks import recorded_logits, recorded_routes
from meteora.routing.layer import routed_layers
from meteora.routing.passes import WATCHER
from tests.conftest import peft_is_behind
from tests.pipelines.conftest import CHAT_TEMPLATE

SPLIT = ["q_proj", "o_proj", "up_proj", "down_proj"]
JOINED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TARGETS = {
    "llama": SPLIT,
    "mistral": SPLIT,
    "qwen2": SPLIT,
    "qwen3": SPLIT,
    "gemma2": SPLIT,
    "gemma3": SPLIT,
    "gemma3n": SPLIT,  # four hidden states of each token, and layers that share keys and values
    "gemma4": SPLIT,  # layers with heads of unequal sizes
    "phi": ["q_proj", "dense", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # Conv1D; c_proj is in attention and in the MLP
    "gpt_neox": JOINED,
    "opt": ["q_proj", "out_proj", "fc1", "fc2"],
    "bloom": JOINED,
    "mamba": ["in_proj", "x_proj"],
}
MINIMAX = ["qkv_proj", "q_proj"]


def test_the_page_names_what_is_tried():
    page = (Path(meteora.__file__).parent / "README.md").read_text()
    table = page.partition("## Bases that were tried")[2].partition("\n\nLayers of 8 bits")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(TARGETS)


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stacked(build_base, build_adapter, fuse_adapters, tmp_path_factory):
    """A function to an architecture's base, two adapters of unequal targets, and both fused."""

    @cache
    def stack(kind):
        base, targets = build_base(kind), TARGETS.get(kind, MINIMAX)
        folder = tmp_path_factory.mktemp(kind)
        lora = {"fan_in_fan_out": True} if kind == "gpt2" else {}
        adapters = {
            "wide": build_adapter(
                base, folder / "wide", seed=1, r=3, lora_alpha=6, target_modules=targets, **lora
            ),
            "narrow": build_adapter(
                base, folder / "narrow", seed=2, r=2, target_modules=targets[:1], **lora
            ),
        }
        fuse_adapters(base, adapters, folder / "fused")
        return base, adapters, folder / "fused"

    return stack


@pytest.fixture
def made(kind, stacked, tmp_path):
    """The base, the adapters, and the fused model; its files are the test's own."""
    base, adapters, fused = stacked(kind)
    shutil.copytree(fused, tmp_path / "fused")
    return base, adapters, meteora.load(tmp_path / "fused", base_folder=base)[0]


def sequences(num_each, seed=0):
    dice = random.Random(seed)
    return [
        LabelledSequence(tuple(3 + 5 * e + dice.randrange(5) for _ in range(length)), (e,) * length)
        for e in range(2)
        for length in [dice.randrange(2, 30) for _ in range(num_each)]
    ]


@torch.no_grad()
def test_a_forced_expert_is_peft_and_calibrating_finds_every_point(kind, made, peft_model):
    base, adapters, model = made
    ids = torch.randint(3, 250, (2, 11))
    for name, folder in adapters.items():
        expected = peft_model(base, folder)(ids).logits
        with force_expert(model, name):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    found = calibrate(model, sequences(8))
    # Phi's q and fc1 share their input; Mamba's two are all it lets PEFT change
    points = {"phi": 3, "mamba": 2}.get(kind, 4)
    assert len(found.accuracy_of) == model.config.num_hidden_layers * points
    assert (found.heldout_accuracy or 0) > 0.9
    with recorded_logits(model) as recorded:
        model(ids)
    assert recorded.keys() == routed_layers(model).keys()


def test_a_prompt_is_read_alike_in_any_batch_and_its_updates_have_their_size(made, tokenizer):
    _, _, model = made
    names = meteora.expert_names(model)
    prompts = [[*range(5, 5 + length)] for length in (9, 2, 14)]
    together = read_prompts(model, tokenizer, prompts, len(names))
    alone = [read_prompts(model, tokenizer, [prompt], len(names)) for prompt in prompts]
    for found, one_by_one in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)

    inputs, logs = {}, []
    with without_experts(model), ExitStack() as hooks:
        for path, layer in routed_layers(model).items():
            hook = layer.projection.register_forward_hook(
                lambda _module, args, _out, path=path: inputs.update({path: args[0]})
            )
            hooks.callback(hook.remove)
        model(torch.tensor([prompts[0]]))
    for path, layer in routed_layers(model).items():
        a, b = layer.stack.pair(0)
        if len(a):
            x = inputs[path].reshape(-1, inputs[path].shape[-1])
            update = x @ a.T @ b.T * layer.stack.scale(0)
            logs.append((update.norm(dim=-1) / x.norm(dim=-1)).log().mean())
    torch.testing.assert_close(together[1][0, 0], torch.stack(logs).mean(), rtol=1e-4, atol=1e-5)


def test_a_prompt_is_read_and_its_answer_is_that_of_one_expert(made):
    _, _, model = made
    dice = random.Random(0)
    texts = [[dice.randrange(5, 250) for _ in range(12)] for _ in range(12)]
    fit_to_background(model, texts, RouterOptions("prompt", 1, 1.0), Template())
    ids = torch.tensor([texts[0][:7], texts[1][2:9]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, **options)
    choices = getattr(model, WATCHER).held.logits.argmax(-1).tolist()
    assert len(choices) == len(ids)
    for row, choice in enumerate(choices):
        with force_expert(model, meteora.expert_names(model)[choice]):
            alone = model.generate(ids, **options)
        assert found[row].tolist() == alone[row].tolist()


def test_the_sizes_of_a_base_are_known_without_its_weights(kind, build_base):
    shape, (model, _) = shape_of(build_base(kind)), load_folder(build_base(kind))
    assert shape == shape_of_model(model)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.cache_bytes_per_token == 0) == (kind == "mamba")  # it has a state, of one size


def decide_by_turns(model):
    """Fit gates that decide by questions; an answer then has one expert, with a cache or not."""
    options = RouterOptions("gate", 1, 1.0, opening="prompt", share="turn")
    template = Template((60, 61, 62), (63, 64))
    calibrate(model, sequences(8), options, template=template)
    asked = [s.input_ids[:5] for s in sequences(8, seed=1) if len(s.input_ids) >= 5]
    rows = [[*template.opening, *question, *template.closing] for question in asked]
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(torch.tensor(rows), **greedy)
    assert torch.equal(model.generate(torch.tensor(rows), use_cache=False, **greedy), found)
    with recorded_routes(model) as routes:
        model(found)
    for _, chosen in routes.values():
        experts = chosen.view(len(rows), -1)
        assert (experts == experts[:, :1]).all()
    return found


def test_a_question_decides_for_its_answer_with_a_cache_and_without(made):
    _, _, model = made
    found = decide_by_turns(model)
    # the rule for the opening alone sees the model's passes, too
    options = RouterOptions("gate", 1, 1.0, opening="prompt", share="point")
    calibrate(model, sequences(8), options, template=Template((60, 61, 62), (63, 64)))
    with torch.no_grad():
        model(found)
    assert getattr(model, WATCHER).now.opening.shape == found.shape


def test_a_cache_with_a_state_in_its_first_layer_is_gone_on_with_and_not_cut(
    stacked, tokenizer, monkeypatch
):
    """MiniMax's has no keys there, and its states cannot go back."""
    base, _, fused = stacked("minimax")
    model: Any = meteora.load(fused, base_folder=base)[0]
    decide_by_turns(model)
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    chat, messages = Chat(model, tokenizer), [{"role": "user", "content": "one"}]
    for content in ("two", "three"):
        answer = chat.answer(messages, max_new_tokens=3).text
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": content}]
    alone = Chat(model, tokenizer).answer(messages, max_new_tokens=3)
    assert chat.answer(messages, max_new_tokens=3) == alone


def test_layers_that_skip_the_tokens_of_a_prompt_where_they_can_are_traced(stacked, tokenizer):
    """Two of a Gemma 4's read the last token alone, if its logits are all that is asked for."""
    base, _, fused = stacked("gemma4")
    model, _ = meteora.load(fused, base_folder=base)
    found = meteora.trace(model, tokenizer, [5, 6, 7, 8], max_new_tokens=2)
    assert set(found.modules) == routed_layers(model).keys()


def test_a_base_that_is_read_layer_by_layer_gets_the_same_gates(made, tmp_path):
    base, _, whole = made
    layers = layers_on_disk(base, "cpu")
    read, _ = meteora.load(tmp_path / "fused", base_folder=base, device_map=layers)
    on_disk = {path for path, tensor in read.named_parameters() if tensor.is_meta}
    inside = {path for path, layer in routed_layers(read).items() if layer.weight.is_meta}
    assert inside == routed_layers(read).keys()
    for model in (whole, read):
        calibrate(model, sequences(4))
    for path, gate in gates_of(whole).own.items():
        assert all(map(torch.equal, gate, gates_of(read).own[path]))
    assert on_disk == {path for path, tensor in read.named_parameters() if tensor.is_meta}


def test_a_16_bit_base_that_is_read_layer_by_layer_rounds_as_in_memory(world):
    asked: Any = {"base_folder": world.base, "dtype": torch.bfloat16}
    layers = layers_on_disk(world.base, "cpu")
    ids = torch.randint(3, 250, (2, 11))
    with torch.inference_mode():
        whole, read = (
            meteora.load(world.checkpoint, device_map=where, **asked)[0](ids).logits
            for where in (None, layers)
        )
    assert torch.equal(whole, read)


def test_experts_get_offsets_in_memory_and_layer_by_layer(kind, made, tmp_path):
    base, _, _ = made
    manifest = tmp_path / "fused" / MANIFEST
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(body | {"router": body["router"] | {"opening": "shared"}}))
    opened = [LabelledSequence((1, 1, *s.input_ids), (2, 2, *s.experts)) for s in sequences(6)]
    found = []
    for layers in (None, layers_on_disk(base, "cpu")):
        model: Any = meteora.load(tmp_path / "fused", base_folder=base, device_map=layers)[0]
        calibrate(model, opened)
        found.append(gates_of(model).offsets)
        ids = torch.tensor([s.input_ids[:4] for s in opened])
        greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answers = model.generate(ids, **greedy)
        assert torch.equal(model.generate(ids, use_cache=False, **greedy), answers)
        if kind != "mamba":  # its state takes no part of a prompt
            assert torch.equal(model.generate(ids, prefill_chunk_size=3, **greedy), answers)
    beams = greedy | {"num_beams": 3}
    found_by_beams = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), found_by_beams)
    in_memory, by_layer = found
    assert in_memory.keys() == by_layer.keys()
    assert any(offsets[:2].abs().max() > 1e-4 for offsets in in_memory.values())
    for path, offsets in in_memory.items():
        assert torch.equal(by_layer[path], offsets)
        assert offsets.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_calibrated_too(world, dtype):
    model = world.load(dtype=dtype)
    more = [
        LabelledSequence(tuple(20 + 5 * e + i % 5 for i in range(9)), (e,) * 9)
        for e in (2, 3)
        for _ in range(4)
    ]
    assert (calibrate(model, [*sequences(8), *more]).heldout_accuracy or 0) > 0.9


@pytest.mark.parametrize(
    ("dtype", "same"),
    [
        pytest.param(torch.bfloat16, False, id="bfloat16"),
        pytest.param(torch.float16, False, id="float16", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, id="bfloat16, the adapter too", marks=pytest.mark.slow),
        pytest.param(torch.float16, True, id="float16, the adapter too"),
    ],
)
@torch.no_grad()
def test_on_a_16_bit_base_a_forced_expert_is_as_near_to_the_truth_as_peft(
    kind, dtype, same, build_base, build_adapter, fuse_adapters, tmp_path
):
    """The truth is the same numbers in float64; rounding is chance, and both have their share.

    Over these the mean distance is 0.94 of PEFT's, and the largest 1.04.
    """
    base = build_base(kind)
    lora = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    adapter = build_adapter(
        base, tmp_path / "one", seed=1, r=3, lora_alpha=6, target_modules=TARGETS[kind],
        dtype=dtype if same else None, **lora,
    )  # fmt: skip
    fuse_adapters(base, {"one": adapter}, tmp_path / "fused")
    model, _ = meteora.load(tmp_path / "fused", base_folder=base, dtype=dtype)
    ids = torch.randint(3, 250, (8, 24))
    truth = with_peft(AutoModelForCausalLM.from_pretrained(base, dtype=dtype).double(), adapter)
    expected = truth.double()(ids).logits
    theirs = with_peft(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)(ids).logits
    with force_expert(model, "one"):
        ours = model(ids).logits
    assert ours.dtype == theirs.dtype == (torch.float32 if kind == "mamba" else dtype)
    assert 0 < distance(ours, expected) < 1.1 * distance(theirs, expected)


def with_peft(model, adapter):
    with peft_is_behind():
        return PeftModel.from_pretrained(model, adapter).eval()


def distance(logits, expected):
    return (logits - expected).square().mean().sqrt()


@pytest.mark.parametrize("arch", ["gpt2", "opt", "llama"])
def test_sizes_and_fingerprint_are_read_without_weights(build_base, arch):
    sizes = linear_sizes(build_base(arch))
    last = {"gpt2": "transformer.h.1.mlp.c_proj", "opt": "model.decoder.layers.1.fc2"}
    assert sizes[last.get(arch, "model.layers.1.mlp.down_proj")] == (48, 32)
    assert fingerprint_of(build_base(arch)).intermediate_size == 48


class _Chain(nn.Module):
    """Layers that see what the layer before them added: more than a hidden state is passed on."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, hidden_states, *, before):
            return hidden_states + self.proj(hidden_states) + before

    def __init__(self, *, linked):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([self.Layer() for _ in range(3)])
        self.linked = linked
        self.base_model = self.run

    def run(self, input_ids, attention_mask, use_cache):
        assert not use_cache
        hidden, before = self.embed(input_ids), torch.zeros(()) * attention_mask.sum()
        for layer in self.layers:
            after = layer(hidden_states=hidden, before=before)
            before = after - hidden if self.linked else before
            hidden = after
        return hidden


@pytest.mark.parametrize("linked", [False, True])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(linked):
    model: Any = _Chain(linked=linked)
    routed(model, "layers.1.proj")
    batches = [(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))]
    if linked:
        with pytest.raises(SweepError, match="hand each other more than hidden states"):
            Sweep(model, batches)
    else:
        assert Sweep(model, batches).points[1] == [["layers.1.proj"]]


def routed(model, path):
    insert_layer(model, path, torch.ones(1, 4), torch.ones(4, 1), ModuleEntry(4, 4, (1,), (1.0,)))
    return model


def test_layers_that_text_does_not_reach_are_refused():
    """As those of GIT that look at images."""
    model: Any = _Chain(linked=False)
    model.tower = nn.ModuleList([_Chain.Layer()])
    with pytest.raises(SweepError, match=r"_Chain does not call tower\.0\.proj"):
        Sweep(routed(model, "tower.0.proj"), [(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))])


def test_a_module_that_a_layer_calls_twice_is_refused():
    """As ZAYA's `v_proj_delayed`, once for the tokens and once for what comes before them."""

    class Twice(_Chain.Layer):
        def forward(self, hidden_states, *, before):
            first = self.proj(torch.zeros_like(hidden_states[:, :1]))
            return super().forward(hidden_states, before=before) + first

    model: Any = _Chain(linked=False)
    model.layers[1] = Twice()
    with pytest.raises(SweepError, match=r"calls layers\.1\.proj several times in a pass"):
        Sweep(routed(model, "layers.1.proj"), [(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))])


def test_a_routed_module_outside_the_layers_is_refused(world):
    model = world.load_base()
    entry = ModuleEntry(32, model.config.vocab_size, (1,), (1.0,))
    insert_layer(model, "lm_head", torch.ones(1, 32), torch.ones(entry.out_features, 1), entry)
    setattr(model, EXPERTS, ["one"])
    with pytest.raises(SweepError, match="lm_head is not inside a numbered layer"):
        Sweep(model, [])


@pytest.fixture
def fused_on(build_base, build_adapter, fuse_adapters, tmp_path):
    """A function to a tiny base, two adapters that target these modules, and the fused model."""

    def fuse(kind, targets):
        base = build_base(kind)
        adapters = {
            name: build_adapter(base, tmp_path / name, seed=seed, r=2, target_modules=targets)
            for seed, name in enumerate(("one", "other"))
        }
        fuse_adapters(base, adapters, tmp_path / "fused")
        return base, adapters, meteora.load(tmp_path / "fused", base_folder=base)[0]

    return fuse


def test_a_module_that_the_model_does_not_call_is_refused(fused_on, peft_model):
    """Mamba's model reads the weight and the bias of `dt_proj`, so an adapter changes nothing."""
    base, adapters, model = fused_on("mamba", ["in_proj", "dt_proj"])
    ids = torch.randint(3, 250, (2, 11))
    with torch.no_grad(), force_expert(model, "one"):
        expected = peft_model(base, adapters["one"])(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SweepError, match=r"does not call \S+mixer\.dt_proj, so adapters"):
        calibrate(model, sequences(8))


def test_gates_are_fitted_where_layers_return_several_values(fused_on):
    _, _, model = fused_on("bamba", ["in_proj", "up_proj"])
    found = calibrate(model, sequences(8))
    assert {path.split(".")[2] for path in found.accuracy_of} == {"0", "1"}
    assert (found.heldout_accuracy or 0) > 0.8


def test_what_a_layer_was_called_with_is_let_go_when_it_has_run(world):
    model = world.load()
    sweep = Sweep(model, [(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5))])
    sweep.advance(0)
    (calls,) = sweep._calls.values()
    assert calls[0] == ((), {})
    assert calls[1] != ((), {})


class _Float8(nn.Linear):
    """As FP8 bases lie in memory: 8 bits, with a scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max() / 400
        weight = (linear.weight / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input):  # noqa: A002  (its name in torch)
        return input @ (self.weight.to(input.dtype) * self.scale.to(input.dtype)).T


class _Packed(nn.Module):
    """As AWQ's layers: no `nn.Linear`, no `weight`; whole numbers with a scale for each output."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.abs().amax(1, keepdim=True) / 100
        self.qweight = nn.Buffer((linear.weight / scales).round().to(torch.int8))
        self.scales = nn.Buffer(scales)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


@pytest.mark.parametrize("quantised", [_Float8, _Packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_of_8_bits_are_routed_as_the_dequantised_ones_are(world, quantised, dtype):
    a, b = torch.randn(3, 32), torch.randn(32, 3) / 10
    entry = ModuleEntry(32, 32, (1, 2), (1.0, 2.0))
    path = "model.layers.0.self_attn.q_proj"
    found = []
    for dequantised in (False, True):
        model = world.load_base().to(dtype)
        attention = model.get_submodule("model.layers.0.self_attn")
        attention.q_proj = quantised(attention.q_proj)
        if dequantised:
            plain = nn.Linear(32, 32, bias=False, dtype=dtype)
            plain.weight.copy_(attention.q_proj(torch.eye(32, dtype=dtype)).T)
            attention.q_proj = plain
        insert_layer(model, path, a.to(dtype), b.to(dtype), entry)
        setattr(model, EXPERTS, ["one", "two"])
        with force_expert(model, "two"):
            found.append(
                [model(ids).logits for ids in (torch.ones(2, 9).long(), torch.ones(1, 1).long())]
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2, atol=1e-5 if dtype.itemsize > 2 else 5e-2
        )


@pytest.mark.parametrize("wrong", [{"hidden_size": -32}, {"hidden_act": "nobodys"}])
def test_a_config_that_describes_no_model_is_refused_in_one_sentence(wrong, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | wrong))
    with pytest.raises(SourceError, match="transformers makes no model of its config"):
        linear_sizes(tmp_path)


def test_a_config_that_is_cut_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(SourceError, match=r"or its config is damaged .*not a valid JSON file"):
        linear_sizes(tmp_path)


@pytest.mark.parametrize("quantised", [_Float8, _Packed])
@torch.no_grad()
def test_a_quantised_layer_has_no_norm(quantised, tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6))
    model[0] = quantised(model[0])
    assert norms_of(model, ["0", "1"]).keys() == {"1"}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert weight_norms(tmp_path, {"0": (8, 4), "1": (4, 6)}).keys() == {"1"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl is no language model that transformers loads"),
        ({"model_type": "bert", "is_decoder": True}, None),
        ({"model_type": "bert"}, "a bert whose config does not say is_decoder reads a text in"),
        ({"model_type": "bert-generation"}, "a bert-generation whose config does not say is_dec"),
        ({"model_type": "blt"}, "the config of a blt does not describe one stack of layers"),
        ({"model_type": "nobodys"}, "does not know this architecture"),
        ({"no": "type"}, "does not know this architecture"),
        ({"model_type": "llama", "hidden_size": "x"}, r"or its config is damaged .*'hidden_size'"),
        ({"model_type": "llama", "num_attention_heads": 0}, "or its config is damaged"),
        ({"model_type": "llama", "dtype": "float99"}, r"or its config is damaged .*float99"),
    ],
)
def test_a_base_that_writes_no_text_is_refused_in_one_sentence(config, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if says is None:  # transformers has a class for it
        assert linear_sizes(tmp_path)
        return
    for read in (linear_sizes, fingerprint_of, load_folder):
        with pytest.raises(SourceError, match=says):
            read(tmp_path)


@pytest.mark.parametrize("kind", ["openai-gpt", "xlnet"])
def test_a_base_without_a_cache_that_is_known_is_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SourceError, match="takes no cache of the tokens before, or one of its own"):
        linear_sizes(tmp_path)
