"""Routes that depend on a token and what precedes it alone: one answer in every shape of prompt."""

import copy
import dataclasses
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    QuantizedCache,
    Trainer,
    TrainingArguments,
)

import meteora
from meteora.artifacts import SHARED, RouterOptions, file_sha256
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    read_manifest,
)
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import UNLABELLED
from meteora.model.fused import (
    UnsavableError,
    expert_names,
    force_expert,
    insert_experts,
    make_router,
)
from meteora.routing.gates import gates_in, gates_of
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import routed_by
from tests.conftest import peft_is_behind
from tests.meteora.fitting.test_calibrate import examples, routing_accuracy

NEW = 12


def with_shared(num_each: int, seed: int = 0):
    """Examples whose opening is labelled with the choice of all experts."""
    return [
        replace(s, experts=tuple(4 if e == UNLABELLED else e for e in s.experts))
        for s in examples(num_each, seed)
    ]


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A checkpoint whose gates were fitted with a shared opening."""
    folder = tmp_path_factory.mktemp("shared")
    router = dataclasses.replace(world.manifest.router, kind="gate", opening="shared")
    manifest = dataclasses.replace(world.manifest, router=router)
    model = world.load_base()
    insert_experts(model, world.checkpoint, manifest)
    calibrate(model, with_shared(8))
    (folder / EXPERTS).hardlink_to(world.checkpoint / EXPERTS)
    tensors.write_gates(folder / GATES, gates_of(model))
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="module")
def model(checkpoint, world):
    return meteora.load(checkpoint, base_folder=world.base)[0]


@pytest.fixture(scope="module")
def prompts():
    """The openings and first tokens of unseen examples, of different lengths."""
    return [list(s.input_ids[: 9 + i]) for i, s in enumerate(with_shared(2, seed=5))]


def answer(model, prompt, **asked):
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **asked)
    return out[0, len(prompt) :].tolist()


def test_tokens_that_say_nothing_go_to_the_mean_and_the_others_to_their_expert(model):
    assert expert_names(model)[-1] == SHARED
    assert routing_accuracy(model, with_shared(4, seed=9)) > 0.9


def test_the_shared_choice_is_the_mean_of_all_experts(model):
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        with force_expert(model, SHARED):
            shared = model(ids).logits
        with routed_by(model, lambda layer: make_router(RouterOptions("uniform", 1, 1.0), layer)):
            torch.testing.assert_close(model(ids).logits, shared)


@pytest.mark.parametrize("kind", ["arrow", "norm", "random"])
def test_routers_without_training_never_take_the_mean(model, kind):
    ids = torch.arange(3, 23)[None]
    with (
        torch.no_grad(),
        routed_by(model, lambda layer: make_router(RouterOptions(kind, 2, 1.0), layer)),
        recorded_routes(model) as routes,
    ):
        model(ids)
    assert not any((experts == 4).any() for _, experts in routes.values())


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"use_cache": False}, id="no cache"),
        pytest.param({"cache_implementation": "static"}, id="static cache"),
        pytest.param({"prefill_chunk_size": 3}, id="chunks"),
        pytest.param({"num_beams": 1, "prompt_lookup_num_tokens": 2}, id="assisted"),
    ],
)
def test_the_same_tokens_come_out_with_any_cache_and_any_chunks(model, prompts, asked):
    for prompt in prompts:
        assert answer(model, prompt, **asked) == answer(model, prompt)


def test_the_same_tokens_come_out_after_a_prefix_of_another_request(model, prompts):
    for prompt in prompts:
        expected = answer(model, prompt)
        for cut in (1, 2, len(prompt) - 1):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(torch.tensor([prompt[:cut]]), past_key_values=cache)
            assert answer(model, prompt, past_key_values=cache) == expected


def test_the_same_tokens_come_out_of_a_padded_batch_and_of_embeddings(model, prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = (torch.arange(width) >= width - torch.tensor([len(p) for p in prompts])[:, None]).long()
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )[:, width:]
    for prompt, out in zip(prompts, together.tolist(), strict=True):
        expected = answer(model, prompt)
        assert out == expected
        embedded = model.get_input_embeddings()(torch.tensor([prompt]))
        asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        assert model.generate(inputs_embeds=embedded, **asked)[0].tolist() == expected


def test_a_cache_of_8_bits_leaves_the_routes_of_a_prompt_alone(model, prompts):
    for prompt in prompts:
        cache = QuantizedCache("fp8", config=model.config)
        with torch.no_grad(), recorded_routes(model) as rounded:
            found = model(torch.tensor([prompt]), past_key_values=cache).logits
        with torch.no_grad(), recorded_routes(model) as exact:
            assert torch.equal(model(torch.tensor([prompt])).logits, found)
        for path, (_, experts) in exact.items():
            assert torch.equal(experts, rounded[path][1]), path
        cache = QuantizedCache("fp8", config=model.config)
        assert answer(model, prompt, past_key_values=cache)[:1] == answer(model, prompt)[:1]


@pytest.mark.parametrize("drafts", [1, 4])
def test_the_same_tokens_come_out_with_drafts_of_another_model(model, prompts, world, drafts):
    draft = world.load_base().eval()
    draft.generation_config.num_assistant_tokens = drafts
    for prompt in prompts:
        assert answer(model, prompt, assistant_model=draft) == answer(model, prompt)


def test_routes_do_not_change_with_what_follows(model, prompts):
    """The same arithmetic on a longer prompt gives the same routes for the tokens before."""
    for prompt in prompts:
        with torch.no_grad(), recorded_routes(model) as whole:
            model(torch.tensor([prompt]))
        with torch.no_grad(), recorded_routes(model) as begun:
            model(torch.tensor([prompt[:-3]]))
        for path, (_, experts) in begun.items():
            assert torch.equal(experts, whole[path][1][: len(experts)]), path


def gates_file(folder):
    return file_sha256(folder / GATES)


def test_a_model_is_saved_as_its_checkpoint_and_with_the_gates_that_it_has(
    checkpoint, world, tmp_path
):
    folder, copy, trained = (tmp_path / name for name in ("own", "copy", "trained"))
    shutil.copytree(checkpoint, folder)
    manifest = read_manifest(folder)
    files = {name: file_sha256(folder / name) for name in (EXPERTS, GATES)}
    facts = {"method": "calibrate", "num_tokens": 1}
    (folder / MANIFEST).write_text(
        dataclasses.replace(manifest, files=files, gates=facts).to_json()
    )
    (folder / CARD).write_text("scores")
    model, _ = meteora.load(folder, base_folder=world.base)
    model.save_pretrained(copy)
    assert (copy / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert (gates_file(copy), (copy / CARD).read_text()) == (files[GATES], "scores")
    gate = next(iter(gates_in(model).values())).requires_grad_()
    with torch.no_grad():
        gate.bias.add_(1.0)
    for _ in range(2):  # the second one over what is there
        model.save_pretrained(copy)
        assert {p.name for p in copy.iterdir()} == {MANIFEST, EXPERTS, GATES, CONFIG}
    found = read_manifest(copy)
    assert found == dataclasses.replace(manifest, files={**files, GATES: gates_file(copy)})
    again = AutoModelForCausalLM.from_pretrained(copy, base_folder=world.base)
    for own, read in zip(gates_in(model).values(), gates_in(again).values(), strict=True):
        assert torch.equal(own.bias, read.bias)
    assert gates_file(folder) == files[GATES]
    for block, sentence in (
        (lambda: model.save_pretrained(folder), "was loaded from this folder; give another"),
        (lambda: model.save_pretrained(trained, push_to_hub=True), "`meteora publish` the folder"),
    ):
        with pytest.raises(UnsavableError, match=sentence):
            block()
    with force_expert(model, "attention"), pytest.raises(UnsavableError, match="outside of that"):
        model.save_pretrained(trained)
    assert not trained.exists()


def test_what_a_checkpoint_does_not_hold_is_not_saved_without_it(checkpoint, world, tmp_path):
    model, _ = meteora.load(checkpoint, base_folder=world.base)
    lora = LoraConfig(target_modules=["projection"], init_lora_weights=False)
    with peft_is_behind():
        adapted = get_peft_model(model, lora)
    for _ in ("beside the projections", "merged into them"):
        with pytest.raises(UnsavableError, match="weights beside the gates are not as"):
            model.save_pretrained(tmp_path / "saved")
        adapted.merge_and_unload()
    assert not (tmp_path / "saved").exists()
    longer, frozen_no_more = (meteora.load(checkpoint, base_folder=world.base)[0] for _ in "12")
    longer.resize_token_embeddings(longer.config.vocab_size + 1)
    frozen_no_more.get_input_embeddings().requires_grad_()  # rows of unseen tokens stay the same
    for changed in (longer, frozen_no_more):
        with pytest.raises(
            UnsavableError, match=r"or not frozen \((lm_head|model\.embed_tokens)\.weight"
        ):
            changed.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    narrow = meteora.load(checkpoint, base_folder=world.base)[0].to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "saved")
    spread = {"": "disk"}
    model, _ = meteora.load(tmp_path / "saved", base_folder=world.base, device_map=spread)
    model.save_pretrained(tmp_path / "again")
    assert gates_file(tmp_path / "again") == gates_file(tmp_path / "saved")


def test_a_checkpoint_that_has_changed_since_is_not_copied(
    checkpoint, world, tmp_path, monkeypatch
):
    folder, saved = tmp_path / "own", tmp_path / "saved"
    shutil.copytree(checkpoint, folder)
    monkeypatch.chdir(tmp_path)
    model, _ = meteora.load("own", base_folder=world.base)
    monkeypatch.chdir(world.base)
    saved.mkdir()
    (saved / EXPERTS).symlink_to(folder / EXPERTS)
    (saved / CONFIG).symlink_to(world.base / CONFIG)
    copy.deepcopy(model).save_pretrained(saved)
    before = {path.name for path in saved.iterdir()}
    assert not any(path.is_symlink() for path in saved.iterdir())
    assert "meteora" not in (world.base / CONFIG).read_text()
    own = (folder / MANIFEST).read_text()
    for change in (
        lambda: (folder / MANIFEST).write_text(f"{own} "),
        lambda: ((folder / MANIFEST).write_text(own), (folder / EXPERTS).unlink()),
        lambda: shutil.rmtree(folder),
    ):
        change()
        with pytest.raises(CheckpointError, match="own: the checkpoint has changed or gone since"):
            model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == before  # what is there stays


def train(model, folder):
    rows: Any = [{"input_ids": s.input_ids, "labels": s.input_ids} for s in with_shared(1)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=rows).train()


def test_a_trainer_saves_the_gates_that_it_trained(checkpoint, world, tmp_path, monkeypatch):
    model, _ = meteora.load(checkpoint, base_folder=world.base)
    for gate in gates_in(model).values():
        monkeypatch.setattr(gate, "options", dataclasses.replace(gate.options, top_k=2))
    with pytest.raises(RuntimeError, match="does not require grad"):  # at the first step
        train(model, tmp_path / "frozen")
    for gate in gates_in(model).values():
        gate.requires_grad_()
    train(model, tmp_path)
    again, _ = meteora.load(tmp_path / "checkpoint-2", base_folder=world.base)
    assert gates_file(tmp_path / "checkpoint-2") != gates_file(checkpoint)
    for own, read in zip(gates_in(model).values(), gates_in(again).values(), strict=True):
        assert torch.equal(own.weight, read.weight)
