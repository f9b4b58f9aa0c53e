"""An exported expert is the file that was stacked, and PEFT loads it."""

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meteora.adapters import reader
from meteora.adapters.files import CONFIG, PEFT_WEIGHTS
from meteora.artifacts import file_sha256
from meteora.checkpoint.export import ExportError, adapter_config, export_expert, new_folder
from meteora.checkpoint.manifest import MANIFEST, UnknownExpertError
from tests.conftest import World


@pytest.mark.parametrize("name", ["all_seven", "attention", "q_and_v", "patterns"])
def test_an_expert_comes_out_as_the_file_that_went_in(
    world: World, tmp_path: Path, name: str
) -> None:
    """Ranks 2 to 8, rsLoRA, rank and alpha patterns, one layer only."""
    out = tmp_path / name
    assert export_expert(world.checkpoint, name, out)
    assert file_sha256(out / PEFT_WEIGHTS) == file_sha256(world.adapters[name] / PEFT_WEIGHTS)
    assert (out / PEFT_WEIGHTS).stat().st_mode == (out / "README.md").stat().st_mode
    before, after = reader.read(world.adapters[name]).spec, reader.read(out).spec
    assert after.modules == before.modules
    assert after.use_rslora == before.use_rslora


def test_peft_gives_the_same_logits_with_it(
    world: World, peft_model: Callable[..., Any], tmp_path: Path
) -> None:
    ids = torch.arange(3, 40)[None]
    for name in ("attention", "patterns"):
        export_expert(world.checkpoint, name, tmp_path / name)
        with torch.no_grad():
            found = peft_model(world.base, tmp_path / name)(ids).logits
            assert torch.equal(found, world.load_peft(name)(ids).logits)


def test_a_narrow_adapter_comes_out_narrow_from_a_wide_stack(
    world: World,
    build_adapter: Callable[..., Path],
    fuse_adapters: Callable[..., Any],
    tmp_path: Path,
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    narrow = build_adapter(world.base, tmp_path / "b", seed=9, dtype=torch.bfloat16, **lora)
    fused = tmp_path / "fused"
    fuse_adapters(world.base, {"wide": world.adapters["q_and_v"], "narrow": narrow}, fused)
    assert export_expert(fused, "narrow", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / PEFT_WEIGHTS).values()} == {
        torch.bfloat16
    }


def test_a_licence_and_a_base_go_with_it(world: World, tmp_path: Path) -> None:
    export_expert(world.checkpoint, "q_and_v", tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] is None  # this base is a folder of ours
    assert config["revision"] is None  # no commit, but its hash
    assert config["r"] == 8
    assert config["lora_alpha"] == 16
    assert config["rank_pattern"] == {}

    export_expert(world.checkpoint, "q_and_v", tmp_path / "named", "org/base")
    config = json.loads((tmp_path / "named" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base"  # as it came
    text = (tmp_path / "named" / "README.md").read_text()
    assert "base_model: org/base\n" in text
    assert "Its base is `org/base`." in text


def test_what_a_stranger_s_checkpoint_says_is_no_markup_in_a_card(
    world: World, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(world.checkpoint, theirs)
    body = json.loads((theirs / MANIFEST).read_text())
    markup = "[log in](http://elsewhere)"
    body["experts"][0] |= {"licence": f"` {markup}", "source": f"path:{markup}"}
    (theirs / MANIFEST).write_text(json.dumps(body))
    export_expert(theirs, body["experts"][0]["name"], tmp_path / "out", f"`{markup}")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("[log in]") == 3
    assert "[log in]" not in re.sub("`[^`\n]*`", "", text)


def test_an_alpha_near_zero_is_not_zero(world: World) -> None:
    modules = {
        path: replace(entry, scaling=tuple(1e-10 * one for one in entry.scaling))
        for path, entry in world.manifest.modules.items()
    }
    config = adapter_config(replace(world.manifest, modules=modules), 2)
    assert config["lora_alpha"] == pytest.approx(16e-10)


def test_what_is_not_there_and_what_is_in_the_way_is_said(world: World, tmp_path: Path) -> None:
    with pytest.raises(UnknownExpertError, match="all_seven, attention"):
        export_expert(world.checkpoint, "no_such", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine", tmp_path / "link"):
        with pytest.raises(ExportError, match="holds something"):
            export_expert(world.checkpoint, "q_and_v", taken)
    for inside in ("out", "new/out"):
        with pytest.raises(ExportError, match="is no folder; give the name of a new folder"):
            export_expert(world.checkpoint, "q_and_v", tmp_path / "full" / "mine" / inside)


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)

    def fail() -> None:
        with new_folder(out) as made:
            (made / "folder").mkdir()
            (made / "folder" / "file").touch()
            (made / "link").symlink_to(tmp_path)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert out.exists() == there
    assert not there or not any(out.iterdir())


def test_an_empty_folder_with_a_relative_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on, a temporary folder in it has an absolute path."""
    made_there = tempfile.mkdtemp
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda *a, **k: str(Path(made_there(*a, **k)).resolve())
    )
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    with new_folder(Path("out")) as made:
        (made / "whole").touch()
    assert [path.name for path in Path("out").iterdir()] == ["whole"]


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_is_killed_is_made_by_the_same_command(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    killed = os.fork()
    if killed == 0:
        with new_folder(out) as made:
            (made / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert out.exists() == there
    assert not there or not list(out.glob("half")), "nothing of it has its name"
    with new_folder(out) as made:
        (made / "whole").touch()
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [out]
