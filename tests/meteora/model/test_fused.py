"""A fused model is PEFT where it is told to be, and the base where it has no experts."""

import dataclasses
import shutil
from typing import get_args

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import meteora
from meteora.artifacts import RouterOptions, Unfitted
from meteora.base.sources import SourceError
from meteora.checkpoint.manifest import EXPERTS as EXPERTS_FILE
from meteora.checkpoint.manifest import MANIFEST, ModuleEntry, UnknownExpertError
from meteora.kernels.stack import ExpertStack
from meteora.model.fused import (
    NotFusedError,
    RoutedAdaptersError,
    WrongBaseError,
    expert_names,
    force_expert,
    insert_experts,
    insert_layer,
    make_router,
    stack_for,
    without_dropout,
    without_experts,
)
from meteora.model.saving import UnsavableError
from meteora.routing.expert_cache import ExpertCache
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import MoELoRALinear, routed_by, routed_layers
from meteora.routing.routers import Fixed

EXPERTS = ["all_seven", "attention", "q_and_v", "patterns"]


@pytest.fixture
def ids():
    return torch.randint(3, 250, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(world):
    """With router `uniform`: every token is changed by every expert."""
    return world.load()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("name", EXPERTS)
def test_a_forced_expert_equals_peft_with_that_adapter(world, model, ids, name):
    """Ranks 3 to 8, rsLoRA, rank and alpha patterns, q and v only, one layer only."""
    expected = logits(world.load_peft(name), ids)
    assert not torch.allclose(expected, logits(world.load_base(), ids), atol=1e-2)
    with force_expert(model, name):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_routes_at_random_draws_in_each_layer_for_itself(world, tmp_path, ids):
    router = RouterOptions("random", 1, 1.0)
    (tmp_path / EXPERTS_FILE).hardlink_to(world.checkpoint / EXPERTS_FILE)
    manifest = dataclasses.replace(world.manifest, router=router)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    model, _ = meteora.load(tmp_path, base_folder=world.base)
    with recorded_routes(model) as routes:
        logits(model, ids)
    drawn = [tuple(experts[:, 0].tolist()) for _, experts in routes.values()]
    assert len({*drawn}) == len(drawn)


def test_a_stack_of_one_is_plain_lora(world, fuse_adapters, tmp_path, ids):
    """With E = K = 1 the router has nothing to decide: y = W x + scaling · B A x."""
    name = "all_seven"
    fuse_adapters(world.base, {name: world.adapters[name]}, tmp_path)
    model, _ = meteora.load(tmp_path, base_folder=world.base)
    torch.testing.assert_close(
        logits(model, ids), logits(world.load_peft(name), ids), rtol=1e-5, atol=1e-5
    )


def test_uniform_is_the_mean_of_what_the_experts_add(model):
    layer = routed_layers(model)["model.layers.1.self_attn.q_proj"]
    x = torch.randn(4, 32)
    added = []
    for name in EXPERTS:
        with force_expert(model, name):
            added.append(layer(x) - layer.projection(x))
    torch.testing.assert_close(
        layer(x) - layer.projection(x), torch.stack(added).mean(0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", get_args(Unfitted))
@pytest.mark.parametrize("cached", [None, 3_000, 1 << 20])
def test_a_model_on_a_gpu_answers_as_on_the_cpu(world, ids, kind, cached):
    found = []
    for device in ("cpu", "cuda"):
        model = world.load(device=device, expert_cache_bytes=cached)
        with routed_by(model, lambda layer: make_router(RouterOptions(kind, 2, 1.0), layer)):
            answer = model.generate(
                ids.to(device), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            found.append((logits(model, ids.to(device)).cpu(), answer.cpu()))
    (on_cpu, answer_on_cpu), (on_gpu, answer_on_gpu) = found
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
    assert torch.equal(answer_on_gpu, answer_on_cpu)


def test_without_experts_is_the_base_bit_for_bit(world, model, ids):
    expected = logits(world.load_base(), ids)
    assert not torch.equal(logits(model, ids), expected)
    with without_experts(model):
        assert torch.equal(logits(model, ids), expected)


def test_routers_come_back_after_every_block_even_after_an_exception(model):
    def routers():
        return [layer.router for layer in routed_layers(model).values()]

    def fail_at_the_last(layer):
        if layer is list(routed_layers(model).values())[-1]:
            raise RuntimeError("no router for you")

    before = routers()
    blocks = [
        lambda: force_expert(model, "q_and_v"),
        lambda: without_experts(model),
        lambda: routed_by(model, lambda layer: make_router(RouterOptions("norm", 1, 1.0), layer)),
    ]
    for block in blocks:
        with block():
            assert all(now is not then for now, then in zip(routers(), before, strict=True))
        with pytest.raises(ZeroDivisionError), block():
            raise ZeroDivisionError
        assert all(now is then for now, then in zip(routers(), before, strict=True))
    with pytest.raises(RuntimeError), routed_by(model, fail_at_the_last):
        pass
    assert all(now is then for now, then in zip(routers(), before, strict=True))


def test_blocks_nest(world, model, ids):
    with force_expert(model, "attention"):
        expected = logits(model, ids)
        with without_experts(model):
            assert torch.equal(logits(model, ids), logits(world.load_base(), ids))
        assert torch.equal(logits(model, ids), expected)


def test_blocks_may_end_in_any_order(model):
    """As those of two generators do, each of which streams an answer."""

    def routers():
        return [layer.router for layer in routed_layers(model).values()]

    own, open_blocks = routers(), {}
    for name in ("attention", "q_and_v", "patterns"):
        open_blocks[name] = force_expert(model, name)
        open_blocks[name].__enter__()
    newest = routers()
    for name in ("attention", "q_and_v"):
        open_blocks[name].__exit__(None, None, None)
        assert all(now is then for now, then in zip(routers(), newest, strict=True))
    open_blocks["patterns"].__exit__(None, None, None)
    assert all(now is then for now, then in zip(routers(), own, strict=True))


def test_a_model_without_experts_is_called_so(world):
    base, sentence = world.load_base(), "this LlamaForCausalLM has no experts; load a fused model"
    with pytest.raises(NotFusedError, match=sentence), force_expert(base, "attention"):
        pass
    for ask in (expert_names, meteora.expert_cache):
        with pytest.raises(NotFusedError, match=sentence):
            ask(base)


def test_the_base_can_be_named_where_it_is_no_choice_of_the_routers(world, model, ids):
    with force_expert(model, "(base)"):
        assert torch.equal(logits(model, ids), logits(world.load_base(), ids))


@pytest.mark.parametrize("name", ["no_such", 2, None])
def test_an_unknown_expert_is_refused_with_the_names_there_are(model, name):
    with (
        pytest.raises(UnknownExpertError, match="all_seven, attention, q_and_v"),
        force_expert(model, name),
    ):
        pass


def test_adapters_are_no_parameters_and_scaling_survives_a_narrow_dtype(model):
    """`.to(bfloat16)` rounds the experts, as it was asked to, and never α/√r."""
    layer = routed_layers(model)["model.layers.0.self_attn.q_proj"]
    assert {name for name, _ in layer.named_parameters()} == {"projection.weight"}
    exact = layer.stack.rank_scaling.clone()
    model.to(torch.bfloat16)
    assert layer.stack.a.dtype == torch.bfloat16
    assert torch.equal(layer.stack.rank_scaling, exact)


@pytest.mark.parametrize("kind", get_args(Unfitted))
def test_routers_without_training_are_set_by_the_manifest(world, tmp_path, ids, kind):
    (tmp_path / EXPERTS_FILE).hardlink_to(world.checkpoint / EXPERTS_FILE)
    router = RouterOptions(kind, 2, 0.5)
    manifest = dataclasses.replace(world.manifest, router=router)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    model, _ = meteora.load(tmp_path, base_folder=world.base)
    assert logits(model, ids).isfinite().all()
    assert expert_names(model) == EXPERTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_its_dtype_and_the_experts_keep_theirs(world, ids, dtype):
    """PEFT does the same: adapters in float32 beside a 16-bit base."""
    model = world.load(dtype=dtype)
    layer = routed_layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.stack.a.dtype == torch.float32
    with force_expert(model, "attention"):
        narrow = logits(model, ids)
    with force_expert(wide := world.load(), "attention"):
        exact = logits(wide, ids)
    assert narrow.dtype == dtype
    assert (narrow - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("cache", [None, ExpertCache(1 << 20)])
def test_a_large_scaling_does_not_overflow_in_float16(cache):
    """A x of 200, times 512, is more than 65,504; B brings it back."""
    torch.manual_seed(0)
    projection, x = torch.nn.Linear(64, 32, bias=False).half(), torch.randn(5, 64).half()
    a, b = torch.randn(4, 64), (1e-3 * torch.randn(32, 4)).half()
    a = (a * 200 / (x.float() @ a.T).abs().max()).half()
    entry = ModuleEntry(64, 32, ranks=(4,), scaling=(512.0,))
    if cache is None:
        stack = stack_for(projection.weight, a, b, entry, None)
    else:
        stack = ExpertStack(a, b, entry.ranks, entry.scaling, mapped=True)
    layer = MoELoRALinear(projection, stack, Fixed(torch.ones(1)), cache=cache)
    exact = x.double() @ projection.weight.double().T
    exact += 512 * x.double() @ a.double().T @ b.double().T
    with torch.no_grad():
        for y in (layer(x), torch.cat([layer(token) for token in x.split(1)])):
            assert y.dtype is torch.float16
            assert (y - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "nn", "int8", torch.int32, torch.float8_e4m3fn])
def test_a_dtype_in_which_nothing_computes_is_refused_before_anything_is_looked_for(dtype):
    with pytest.raises(SourceError, match=f"dtype={dtype!r} is no floating-point type of 16 bits"):
        meteora.load("no/such/folder", dtype=dtype)


def test_a_fused_model_is_not_saved_as_if_it_were_its_base(world, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = world.load_base()
    insert_experts(base, world.checkpoint, world.manifest)
    for save in (base.save_pretrained, base.push_to_hub, model.push_to_hub):
        with pytest.raises(UnsavableError, match="model of `meteora"):
            save("saved")
    assert not (tmp_path / "saved").exists()
    world.load_base().save_pretrained(tmp_path / "base")
    model.save_pretrained("saved")  # without gates it is a copy
    assert meteora.expert_names(meteora.load("saved", base_folder=world.base)[0]) == EXPERTS


def test_what_transformers_asks_of_a_model_s_name_and_adapters_is_true(world):
    model = world.load()
    assert model.config._name_or_path == model.name_or_path == str(world.checkpoint)
    assert model.active_adapters() == EXPERTS
    for choose in (lambda: model.set_adapter("q_and_v"), model.enable_adapters):
        with pytest.raises(RoutedAdaptersError, match=r"force_expert\(model, name\)"):
            choose()
    with pytest.raises(RoutedAdaptersError, match=r"without_experts\(model\)"):
        model.disable_adapters()
    before = [path for path, _ in model.named_modules()]
    for change, given in (
        (model.add_adapter, LoraConfig(target_modules=["projection"])),
        (model.load_adapter, str(world.adapters["q_and_v"])),
        (model.delete_adapter, "q_and_v"),
    ):
        with pytest.raises(RoutedAdaptersError, match="`meteora add` or `meteora drop`"):
            change(given)
    assert [path for path, _ in model.named_modules()] == before  # none is half added


def test_a_routed_head_can_be_tied_again(world, ids):
    model = AutoModelForCausalLM.from_pretrained(world.base, tie_word_embeddings=True)
    model.tie_weights()
    size = model.config.vocab_size
    entry = dataclasses.replace(
        world.manifest.modules["model.layers.0.self_attn.q_proj"],
        out_features=size, ranks=(1,), scaling=(1.0,),
    )  # fmt: skip
    insert_layer(model, "lm_head", torch.ones(1, 32), torch.ones(size, 1), entry)
    expected = logits(model, ids)
    model.lm_head.projection.weight = torch.nn.Parameter(torch.ones(size, 32))
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model, ids), expected)


def test_another_base_is_refused_and_the_sentence_names_what_differs(world, build_base):
    with pytest.raises(WrongBaseError, match=r"architecture Qwen2ForCausal.*, not LlamaForCausalL"):
        meteora.load(world.checkpoint, base_folder=build_base("qwen2"))


def test_a_base_of_other_weights_is_refused(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    trained = {
        name: 1.01 * weight for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(trained, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        WrongBaseError, match=r"this base has weights with sha256:\w{12}; the check"
    ):
        meteora.load(world.checkpoint, base_folder=base)


def test_a_layer_of_another_size_or_none_at_all_is_refused(world):
    base = world.load_base()
    path = "model.layers.0.self_attn.q_proj"
    entry = world.manifest.modules[path]
    a, b = torch.zeros(1, 32), torch.zeros(32, 1)
    wider = dataclasses.replace(entry, in_features=64)
    with pytest.raises(WrongBaseError, match=r"take 64 inputs and give 32, this base has \(32, 32"):
        insert_layer(base, path, a, b, wider)
    with pytest.raises(WrongBaseError, match="this base has LlamaRMSNorm"):
        insert_layer(base, "model.norm", a, b, entry)
    with pytest.raises(WrongBaseError, match=r"layers\.9\.self_attn\.q_proj: this base has no"):
        insert_layer(base, "model.layers.9.self_attn.q_proj", a, b, entry)


def test_each_module_has_its_own_mode_again_after_a_block_without_dropout():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[0].eval()
    with without_dropout(model):
        assert not any(module.training for module in model.modules())
        model.append(torch.nn.Dropout())
    assert [module.training for module in model.modules()] == [True, False, True, True]
