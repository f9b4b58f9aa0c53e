"""A fused model is saved as a checkpoint, and not without what a checkpoint cannot hold."""

import copy
import dataclasses
import errno
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import meteora
from meteora.artifacts import file_sha256
from meteora.base.temporary_folder import HERE
from meteora.checkpoint import copies
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    EVAL_RESULTS,
    EXPERTS,
    FILES,
    GATES,
    LINEAGE,
    MANIFEST,
    SIGNATURE,
    STATISTICS,
    CheckpointError,
    read_manifest,
)
from meteora.checkpoint.tensors import read_gates
from meteora.model.fused import force_expert
from meteora.model.saving import UnsavableError
from meteora.routing.gates import gates_in
from tests.conftest import peft_is_behind
from tests.meteora.model.conftest import with_shared


def gates_file(folder):
    return file_sha256(Path(folder) / GATES)


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
    (folder / EVAL_RESULTS).parent.mkdir()
    (folder / EVAL_RESULTS).write_text("scores")
    model, _ = meteora.load(folder, base_folder=world.base)
    model.save_pretrained(copy)
    assert (copy / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert (gates_file(copy), (copy / CARD).read_text()) == (files[GATES], "scores")
    assert (copy / EVAL_RESULTS).read_text() == "scores"
    gate = next(iter(gates_in(model).values())).requires_grad_()
    with torch.no_grad():
        gate.bias.add_(1.0)
    for _ in range(2):  # the second one over what is there
        model.save_pretrained(copy)
        assert {p.name for p in copy.iterdir()} == {MANIFEST, EXPERTS, GATES, CONFIG}
        assert len({p.stat().st_mode for p in copy.iterdir()}) == 1
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
    (folder / GATES).unlink()  # the model has gates in memory
    model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} >= {GATES, EXPERTS}
    before = {path.name for path in saved.iterdir()}
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


def test_over_an_older_checkpoint_comes_a_whole_one_or_none(
    checkpoint, world, tmp_path, monkeypatch
):
    saved = tmp_path / "saved"
    shutil.copytree(checkpoint, saved)
    for name in (SIGNATURE, STATISTICS):  # of its own gates
        (saved / name).write_text("older")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model, _ = meteora.load(checkpoint, base_folder=world.base)

    def full(_source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {MANIFEST, EXPERTS, GATES, CONFIG}


@pytest.mark.parametrize("is_over_another", [True, False])
def test_killed_while_files_move_it_leaves_nothing_for_the_next_save_or_loading(
    checkpoint, tmp_path, monkeypatch, *, is_over_another
):
    whole = tmp_path / "whole"
    shutil.copytree(checkpoint, whole)
    for name in (STATISTICS, CARD, LINEAGE):
        (whole / name).write_text("of these gates")
    source, other = copies.Source.of(whole), read_gates(whole, read_manifest(whole))
    module, (weight, bias) = next(iter(other.own.items()))
    other = dataclasses.replace(other, own={**other.own, module: (weight, bias + 1.0)})
    older = dataclasses.replace(other, own={**other.own, module: (weight, bias + 2.0)})
    loaded = []
    for left in itertools.count():
        saved = tmp_path / f"saved-{left}"
        if is_over_another:
            copies.copy_checkpoint(source, saved, older)
            for name in (SIGNATURE, STATISTICS, EVAL_RESULTS):
                (saved / name).parent.mkdir(exist_ok=True)
                (saved / name).write_text("older")
        with monkeypatch.context() as patch:
            steps = itertools.count()
            for step in ("unlink", "replace"):
                patch.setattr(Path, step, killed_after(left, steps, getattr(Path, step)))
            try:
                copies.copy_checkpoint(source, saved)
                break
            except KeyboardInterrupt:
                pass
        with suppress(CheckpointError):
            own = read_gates(saved, read_manifest(saved)).own[module][1]
            loaded.append(int((own - bias).max()))
        copies.copy_checkpoint(source, saved, other)
        assert {path.name for path in saved.iterdir() if path.is_file()} == {
            MANIFEST,
            EXPERTS,
            GATES,
            CONFIG,
        }
        assert not (saved / EVAL_RESULTS).exists()
    assert left > len(FILES) - 2
    assert set(loaded) == ({2} if is_over_another else set())  # the new one only at the end


def killed_after(most, steps, step):
    """A step of `Path` that ends the process in place of the one after the first `most`."""

    def do(path, *arguments, **options):
        if next(steps) == most:
            raise KeyboardInterrupt
        return step(path, *arguments, **options)

    return do


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_moves(
    checkpoint, world, tmp_path
):
    model, _ = meteora.load(checkpoint, base_folder=world.base)
    for name in (CARD, EXPERTS):
        saved = tmp_path / name
        shutil.copytree(checkpoint, saved)
        (saved / name).unlink(missing_ok=True)
        (saved / name / "mine").mkdir(parents=True)
        before = {path: path.is_file() and path.read_bytes() for path in saved.rglob("*")}
        with pytest.raises(CheckpointError, match=f"{name} is a folder, .* move it away, or save"):
            model.save_pretrained(saved)
        assert {path: path.is_file() and path.read_bytes() for path in saved.rglob("*")} == before
    holder = tmp_path / "beside" / EVAL_RESULTS.partition("/")[0]
    holder.parent.mkdir()
    holder.write_text("mine")
    with pytest.raises(CheckpointError, match=f"{holder.name} is a file, .* move it away, or save"):
        model.save_pretrained(holder.parent)
    assert [*holder.parent.iterdir()] == [holder]
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for no_folder in (holder, link):
        with pytest.raises(CheckpointError, match=f"{no_folder.name} is no folder, .* another"):
            model.save_pretrained(no_folder)


def test_no_file_that_a_link_leads_to_goes_into_a_copy(checkpoint, world, tmp_path):
    """A stranger's link may lead to a private file; no load reads a card."""
    theirs, private = tmp_path / "theirs", tmp_path / "a-key"
    shutil.copytree(checkpoint, theirs)
    private.write_text("private")
    model, _ = meteora.load(theirs, base_folder=world.base)

    def refused(name, sentence):
        with pytest.raises(CheckpointError, match=f"{name} is {sentence}"):
            model.save_pretrained(tmp_path / "copy")
        assert list((tmp_path / "copy").iterdir()) == []
        (theirs / name).unlink()

    for name in (CARD, STATISTICS, LINEAGE):
        (theirs / name).unlink(missing_ok=True)
        (theirs / name).symlink_to(private)
        refused(name, f"a link to {private}")
    os.mkfifo(theirs / CARD)
    refused(CARD, "not a regular file")

    blob = tmp_path / "blobs" / ("0" * 40)  # as in the Hub's cache
    blob.parent.mkdir()
    blob.write_text("a card")
    (theirs / CARD).symlink_to(blob)
    for name in (EXPERTS, GATES):
        (theirs / name).rename(tmp_path / name)  # such as on a larger disk
        (theirs / name).symlink_to(tmp_path / name)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / CARD).read_text() == "a card"
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_what_a_killed_save_left_is_removed_by_the_next(checkpoint, world, tmp_path):
    left = tmp_path / f"{copies.PARTIAL}{HERE}dead"  # its lock went with its process
    left.mkdir()
    (left / EXPERTS).write_bytes(b"half")
    meteora.load(checkpoint, base_folder=world.base)[0].save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, EXPERTS, GATES, CONFIG}


def test_several_may_save_in_one_folder_at_once(checkpoint, world, tmp_path):
    """As each process of a training does that does not ask whether it is the main one."""
    source = copies.Source.of(checkpoint)
    with ThreadPoolExecutor(3) as pool:
        saves = [pool.submit(copies.copy_checkpoint, source, tmp_path) for _ in range(60)]
    for one in saves:
        one.result()
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, EXPERTS, GATES, CONFIG}
    meteora.load(tmp_path, base_folder=world.base)


class Resuming(Trainer):
    """A trainer of a model that was loaded from the folder that it resumes from."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        pass


def train(model, folder, steps=2, resumed=None):
    rows: Any = [{"input_ids": s.input_ids, "labels": s.input_ids} for s in with_shared(1)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Resuming(model, args, train_dataset=rows).train(resume_from_checkpoint=resumed)


def to_train(folder, world, monkeypatch):
    """The model in a folder, with gates that a trainer can train."""
    model, _ = meteora.load(folder, base_folder=world.base)
    for gate in gates_in(model).values():
        monkeypatch.setattr(gate, "options", dataclasses.replace(gate.options, top_k=2))
        gate.requires_grad_()
    return model


def test_a_trainer_saves_the_gates_that_it_trained(checkpoint, world, tmp_path, monkeypatch):
    model = to_train(checkpoint, world, monkeypatch)
    with pytest.raises(RuntimeError, match="does not require grad"):  # at the first step
        train(model.requires_grad_(requires_grad=False), tmp_path / "frozen")
    model = to_train(checkpoint, world, monkeypatch)
    train(model, tmp_path)
    again, _ = meteora.load(tmp_path / "checkpoint-2", base_folder=world.base)
    assert gates_file(tmp_path / "checkpoint-2") != gates_file(checkpoint)
    for own, read in zip(gates_in(model).values(), gates_in(again).values(), strict=True):
        assert torch.equal(own.weight, read.weight)


def test_a_training_that_stopped_goes_on_as_if_it_had_not(checkpoint, world, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(to_train(checkpoint, world, monkeypatch), whole, 4)
    train(to_train(checkpoint, world, monkeypatch), stopped, 2)
    resumed = str(stopped / "checkpoint-2")
    train(to_train(resumed, world, monkeypatch), stopped, 4, resumed)
    assert gates_file(stopped / "checkpoint-4") == gates_file(whole / "checkpoint-4")
    assert gates_file(stopped / "checkpoint-4") != gates_file(resumed)
