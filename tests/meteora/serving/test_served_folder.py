"""The folder that vLLM serves: what is in it, and what is refused before anything is loaded."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.sources import SourceError
from meteora.checkpoint.export import ExportError
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    ModuleEntry,
    read_manifest,
)
from meteora.model.fused import WrongBaseError
from meteora.serving import vllm_plugin
from meteora.serving.served_folder import export_for_vllm, find_served_checkpoint
from meteora.serving.vllm_version import UnservableError, problem_with_version
from tests.meteora.serving.served_world import ROUTER_ID, with_router

SHARED = RouterOptions("gate", 1, 1.0, opening="shared", share="point")
PLENTY = 1 << 40
TEMPLATE = Template((3, 4), (5,))


@pytest.fixture
def checkpoint(world, tmp_path):
    return with_router(world.checkpoint, world.manifest, world.base, SHARED, tmp_path / "made")


def test_files_are_links_to_where_they_lie(world, checkpoint, tmp_path):
    out = tmp_path / "out"
    assert export_for_vllm(checkpoint, world.base, out) == ""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).is_symlink()
        assert (out / name).samefile(world.base / name)
    assert {path.name for path in (out / "meteora").iterdir()} == {MANIFEST, EXPERTS, GATES}
    assert (out / "meteora" / EXPERTS).samefile(world.checkpoint / EXPERTS)
    config = json.loads((out / "config.json").read_text())
    asked = config.pop("quantization_config")
    assert config == json.loads((world.base / "config.json").read_text())
    assert asked["quant_method"] == "meteora"
    assert asked["checkpoint"] == ROUTER_ID
    assert find_served_checkpoint(str(out), None, PLENTY) == out / "meteora"


def test_an_adapter_beside_the_base_is_not_served_as_weights_of_it(world, checkpoint, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(world.base, base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        base.joinpath(name).write_bytes(b"{}")
    manifest = read_manifest(checkpoint)
    of_hub = dataclasses.replace(manifest.base, repo_id="org/base", revision="a" * 40)
    (checkpoint / MANIFEST).write_text(dataclasses.replace(manifest, base=of_hub).to_json())
    export_for_vllm(checkpoint, base, out)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(out.glob("adapter*"))


def test_a_copy_needs_neither_base_nor_checkpoint(world, checkpoint, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(world.base, base)
    export_for_vllm(checkpoint, base, out, copy=True)
    shutil.rmtree(base)
    shutil.rmtree(checkpoint)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert find_served_checkpoint(str(out), None, PLENTY) == out / "meteora"


def test_a_router_without_gates_has_no_file_of_gates(world, tmp_path):
    options = RouterOptions("norm", 2, 1.0)
    folder = with_router(world.checkpoint, world.manifest, world.base, options, tmp_path / "made")
    export_for_vllm(folder, world.base, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out/meteora").iterdir()} == {MANIFEST, EXPERTS}


def test_gates_that_look_ahead_are_refused_with_the_key_to_set(world, tmp_path):
    options = RouterOptions("gate", 1, 1.0, opening="prompt", share="point")
    folder = with_router(
        world.checkpoint, world.manifest, world.base, options, tmp_path / "made", TEMPLATE
    )
    with pytest.raises(ExportError, match=r"set `router: \{opening: shared\}` in the recipe"):
        export_for_vllm(folder, world.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_that_wait_for_a_question_come_with_the_options_that_vllm_needs(world, tmp_path):
    options = RouterOptions("gate", 1, 1.0, opening="prompt", share="turn")
    folder = with_router(
        world.checkpoint, world.manifest, world.base, options, tmp_path / "made", TEMPLATE
    )
    needed = export_for_vllm(folder, world.base, tmp_path / "out")
    assert needed.startswith("--no-enable-prefix-caching --no-enable-chunked-prefill")


def test_experts_on_the_head_are_refused(world, tmp_path):
    """vLLM's head takes none: it served the base alone, without a word."""
    options = RouterOptions("norm", 1, 1.0)
    modules = {"lm_head": ModuleEntry(32, 300, (1, 0, 0, 0), (1.0, 0.0, 0.0, 0.0))}
    manifest = dataclasses.replace(world.manifest, modules=world.manifest.modules | modules)
    folder = with_router(world.checkpoint, manifest, world.base, options, tmp_path / "made")
    with pytest.raises(ExportError, match="experts change the head lm_head, and vLLM's head takes"):
        export_for_vllm(folder, world.base, tmp_path / "out")


def test_routes_by_chance_are_refused(world, tmp_path):
    options = RouterOptions("random", 1, 1.0)
    folder = with_router(world.checkpoint, world.manifest, world.base, options, tmp_path / "made")
    with pytest.raises(ExportError, match="its router is 'random'"):
        export_for_vllm(folder, world.base, tmp_path / "out")


def test_another_base_is_refused(world, checkpoint, build_base, tmp_path):
    with pytest.raises(WrongBaseError, match="this base has hidden_size 64"):
        export_for_vllm(checkpoint, build_base("llama_64"), tmp_path / "out")
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    save_file({k: v + 1 for k, v in load_file(base / "model.safetensors").items()}, base / "m")
    (base / "m").rename(base / "model.safetensors")
    with pytest.raises(WrongBaseError, match="this base has weights with sha256:"):
        export_for_vllm(checkpoint, base, tmp_path / "out")


def test_a_base_that_is_quantised_or_has_no_safetensors_is_refused(world, checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(ExportError, match="its weights are quantised"):
        export_for_vllm(checkpoint, base, tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config))
    manifest = read_manifest(checkpoint)
    entry = dataclasses.replace(manifest.base, repo_id="owner/base", revision="0" * 40)
    named = dataclasses.replace(manifest, base=entry)
    (checkpoint / MANIFEST).write_text(named.to_json())
    (base / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="there are no safetensors in it"):
        export_for_vllm(checkpoint, base, tmp_path / "out")


def test_a_base_whose_config_says_that_it_is_not_quantised_is_taken(world, checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    export_for_vllm(checkpoint, base, tmp_path / "out")
    assert find_served_checkpoint(str(tmp_path / "out"), None, PLENTY)


def test_a_folder_with_something_in_it_is_left_alone(world, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ExportError, match="holds something already"):
        export_for_vllm(checkpoint, world.base, tmp_path / "out")


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_stops_halfway_leaves_nothing(
    world, checkpoint, tmp_path, monkeypatch, there
):
    out, put = tmp_path / "out", shutil.copyfile
    if there:
        out.mkdir()

    def fill_up(source, target):
        if source.name == EXPERTS:
            raise OSError(errno.ENOSPC, "no space left")
        put(source, target)

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    with pytest.raises(OSError, match="no space left"):
        export_for_vllm(checkpoint, world.base, out, copy=True)
    assert out.exists() == there
    monkeypatch.undo()
    export_for_vllm(checkpoint, world.base, out, copy=True)
    assert (out / "config.json").is_file()


def test_a_served_folder_is_checked_before_anything_is_loaded(world, checkpoint, tmp_path):
    out = tmp_path / "out"
    export_for_vllm(checkpoint, world.base, out)
    with pytest.raises(UnservableError, match=r"take at least 0\.0 GB"):
        find_served_checkpoint(str(out), None, 10_000)
    weights = out / "model.safetensors"
    other = {k: v + 1 for k, v in load_file(weights).items()}
    weights.unlink()
    with pytest.raises(WrongBaseError, match="it is gone since the export"):
        find_served_checkpoint(str(out), None, PLENTY)
    save_file(other, weights)
    with pytest.raises(WrongBaseError, match="it holds other weights than at the export"):
        find_served_checkpoint(str(out), None, PLENTY)
    weights.unlink()
    weights.symlink_to(world.base / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with pytest.raises(WrongBaseError, match="this base has num_attention_heads 2"):
        find_served_checkpoint(str(out), None, PLENTY)


def test_a_checkpoint_that_took_the_place_of_the_exported_one_is_refused(
    world, checkpoint, tmp_path
):
    """A folder with links serves what lies there now, and its config said something else."""
    out = tmp_path / "out"
    export_for_vllm(checkpoint, world.base, out)
    manifest = read_manifest(checkpoint)
    for router_id, named in ((f"router:{'1' * 64}", "it is router:1"), ("", "without an id")):
        other = dataclasses.replace(manifest, router_id=router_id)
        (checkpoint / MANIFEST).write_text(other.to_json())
        with pytest.raises(UnservableError, match=f"{named}.*was exported with router:000"):
            find_served_checkpoint(str(out), None, PLENTY)


@pytest.mark.parametrize("name", [EXPERTS, GATES])
def test_a_file_of_the_checkpoint_that_is_gone_is_named(world, checkpoint, name, tmp_path):
    out = tmp_path / "out"
    export_for_vllm(checkpoint, world.base, out)
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (out / "meteora" / name).unlink()
    (out / "meteora" / name).symlink_to(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"there is no {name} in it; the checkpoint is not"):
        find_served_checkpoint(str(out), None, PLENTY)
    with pytest.raises(CheckpointError, match=f"there is no {name} in it; the checkpoint is not"):
        export_for_vllm(checkpoint, world.base, tmp_path / "another")


def test_a_served_folder_that_names_no_weights_is_refused(world, checkpoint, tmp_path):
    out = tmp_path / "out"
    export_for_vllm(checkpoint, world.base, out)
    config = json.loads((out / "config.json").read_text())
    for hashes in (None, [], {}, {"../elsewhere/model.safetensors": "0" * 64}, {"x.bin": ""}):
        config["quantization_config"]["base_weights"] = hashes
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnservableError, match="does not say which weights"):
            find_served_checkpoint(str(out), None, PLENTY)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_base_without_a_config_is_refused_in_one_sentence(world, checkpoint, text, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "config.json").unlink()
    if text is not None:
        (base / "config.json").write_text(text)
    said = r"there is no config\.json" if text is None else "or its config is damaged"
    with pytest.raises(SourceError, match=said):
        export_for_vllm(checkpoint, base, tmp_path / "out")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_base_of_32_bits_may_be_served_in_16(world, checkpoint, tmp_path, key):
    """Most bases on the Hub have the older name of the key."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "dtype"}
    (base / "config.json").write_text(json.dumps(config | {key: "float32"}))
    export_for_vllm(checkpoint, base, out)
    halves = (base / "model.safetensors").stat().st_size // 2
    least = (checkpoint / EXPERTS).stat().st_size + halves
    assert find_served_checkpoint(str(out), None, least) == out / "meteora"
    with pytest.raises(UnservableError, match="use a larger device"):
        find_served_checkpoint(str(out), None, least - 1)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", ""])
def test_a_version_of_vllm_that_is_not_known_is_named(version):
    assert f"vLLM is {version or 'not installed'}" in problem_with_version(version)


def test_the_known_version_of_vllm_is_no_problem():
    assert problem_with_version("0.32.0+cpu") == problem_with_version("0.32.1") == ""


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_plugin_needs_no_package_that_vllm_does_not_bring():
    """It is installed without the packages that it names, and vLLM's are others."""
    absent = ("duckdb", "lm_eval", "peft", "prefect", "re2")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}));"
        "import meteora.serving.served_folder, meteora.serving.fused_experts"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_imports_no_torch():
    """vLLM calls it in each process, also for models without experts."""
    code = (
        "import sys, meteora.serving.vllm_plugin;"
        "sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_does_nothing_without_vllm():
    vllm_plugin.register()
