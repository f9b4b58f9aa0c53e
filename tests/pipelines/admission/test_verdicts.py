"""What is found out about an expert after it was accepted reaches the ledger and the screen."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora.artifacts import canonical_sha256
from meteora.base.sources import SourceError, path_from
from pipelines.admission import silent_experts
from pipelines.admission.candidate import Candidate, resolve
from pipelines.admission.sources import local_folder, pin_folder, resolve_adapter, resolve_base
from pipelines.recipe.recipe import Recipe
from pipelines.stages import build
from pipelines.stages.open_model import opened
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.conftest import plan_of


def altered(source: Path, out: Path, times: float) -> Path:
    """An adapter with its B multiplied."""
    out.mkdir(exist_ok=True)
    (out / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {name: t * times if "lora_B" in name else t for name, t in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return out


def test_silent_and_deafening_experts_are_recorded_with_their_verdict(
    workplace: Callable[..., RunContext],
    recipe_folder: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {"whisper": 1e-9, "plain": 0.1, "shout": 1e4}
    experts = []
    for name, factor in times.items():
        altered(world.adapters["q_and_v"], recipe_folder / name, factor)
        experts.append({"name": name, "adapter": f"path:{name}"})
    work = workplace(experts=experts, router={"kind": "norm"})
    planned = plan_of(work)
    build.stack(work, planned)
    with opened(work, planned) as (model, tokenizer):
        silent_experts.probe(work, planned.experts, model, tokenizer)
        with patch.object(type(model), "forward", side_effect=AssertionError):
            silent_experts.probe(work, (), model, tokenizer)  # as for `meteora benchmark`

    rows = work.ledger.query("SELECT name, codes FROM adapters").rows
    codes = {name: set(found) - {"base_local_path"} for name, found in rows}
    assert codes["whisper"] == {"no_effect"}
    assert "large_update" in codes["shout"]
    assert "no_effect" not in codes["plain"] | codes["shout"]
    said = capsys.readouterr().err
    assert "note: whisper: forced on a probe prompt it changes no logit" in said
    assert "note: shout: what it adds to" in said
    assert codes.keys() == times.keys()


def test_what_no_gate_can_be_fitted_for_is_refused_before_anything_is_built(
    workplace: Callable[..., RunContext], recipe_folder: Path, world: World
) -> None:
    """A LoRA on the head; a router without gates takes it."""
    headed = altered(world.adapters["q_and_v"], recipe_folder / "headed", 1.0)
    head = "base_model.model.lm_head.lora_{}.weight"
    tensors = load_file(headed / "adapter_model.safetensors")
    vocab_size = world.load_base().config.vocab_size
    tensors |= {head.format("A"): torch.ones(8, 32), head.format("B"): torch.ones(vocab_size, 8)}
    save_file(tensors, headed / "adapter_model.safetensors")
    config = json.loads((headed / "adapter_config.json").read_text(encoding="utf-8"))
    targets = [*config["target_modules"], "lm_head"]
    text = json.dumps(config | {"target_modules": targets})
    (headed / "adapter_config.json").write_text(text, encoding="utf-8")
    rows = "jsonl:q_and_v.train.jsonl"
    experts = [{"name": n, "adapter": f"path:{n}", "examples": rows} for n in ("headed", "q_and_v")]
    for kind, taken in {"gate": ["q_and_v"], "arrow": ["headed", "q_and_v"]}.items():
        work = workplace(
            experts=experts, router={"kind": kind}, policy={"on_refused": "skip"}, benchmark={}
        )
        planned = plan_of(work)
        assert [expert.name for expert in planned.experts] == taken
        if kind == "gate":
            work.ledger.ingest()
            (refused,) = work.ledger.query(
                "SELECT codes FROM adapters WHERE verdict = 'refuse'"
            ).rows
            assert refused == (["outside_layers"],)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_folder_without_weights_that_can_be_read_gets_a_verdict(
    name: str, workplace: Callable[..., RunContext], recipe_folder: Path, world: World
) -> None:
    """A pickle alone, or a pipe; it ends no run that leaves out what is refused."""
    folder = recipe_folder / f"odd-{name}"
    folder.mkdir(exist_ok=True)
    source = world.adapters["q_and_v"] / "adapter_config.json"
    (folder / "adapter_config.json").write_bytes(source.read_bytes())
    if name.endswith(".bin"):
        (folder / name).write_bytes(b"\x80\x02")
    elif not (folder / name).exists():
        os.mkfifo(folder / name)
    experts = [{"name": n, "adapter": f"path:{n}"} for n in (folder.name, "q_and_v")]
    work = workplace(
        experts=experts, router={"kind": "arrow"}, policy={"on_refused": "skip"}, benchmark={}
    )
    planned = plan_of(work)
    assert [expert.name for expert in planned.experts] == ["q_and_v"]
    work.ledger.ingest()
    (refused,) = work.ledger.query("SELECT codes FROM adapters WHERE verdict = 'refuse'").rows
    assert refused == ([{"adapter_model.bin": "pickle"}.get(name, "not_a_file")],)


def of_recipe(folder: Path, base: str, expert: dict[str, str]) -> RunContext:
    asked = {"base": base, "experts": (expert,), "router": {"kind": "prompt"}}
    recipe = Recipe.model_validate(asked)
    return RunContext(Ledger(folder / "home"), recipe, folder / "recipe.yaml", "a-run")


def test_a_folder_that_is_named_without_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "dates").mkdir(parents=True)
    expert = {"name": "a", "adapter": "adapters/dates"}
    said = "write path:adapters/dates for the folder, or adapters/dates@main for the Hub"
    for base in ("adapters/dates", "gguf:"):
        work = of_recipe(tmp_path, base, expert)
        with pytest.raises(SourceError, match=said if base != "gguf:" else "gguf:<package>/<file>"):
            resolve_base(work)
        with pytest.raises(SourceError, match=said):
            resolve_adapter(work, work.recipe.experts[0])


def test_a_persons_own_home_is_found(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(world.base.parent))
    expert = {"name": "a", "adapter": f"path:~/{world.base.name}/adapter"}
    work = of_recipe(tmp_path, f"path:~/{world.base.name}", expert)
    assert resolve_base(work).base_model == f"path:{world.base.name}"
    assert local_folder(work, work.recipe.experts[0]) == world.base / "adapter"
    assert path_from(tmp_path, "~other/x") == tmp_path / "~other" / "x"


def test_a_local_adapter_in_a_subfolder_is_named_by_both(world: World, tmp_path: Path) -> None:
    """The subfolder was named twice, and the folder not at all."""
    shutil.copytree(world.adapters["q_and_v"], tmp_path / "many" / "dates")
    expert = {"name": "a", "adapter": "path:many", "subfolder": "dates"}
    work = of_recipe(tmp_path, "path:base", expert)
    ref = resolve_adapter(work, work.recipe.experts[0])
    assert (ref.repo_id, ref.subfolder) == ("path:many", "dates")
    assert ref.revision == pin_folder(tmp_path / "many" / "dates").revision
    asked = Candidate("a", str(tmp_path / "many"), "dates")
    again, folder_of = resolve(work, asked)
    assert again == ref
    assert folder_of() == tmp_path / "many" / "dates"
    with pytest.raises(SourceError, match="many/sums: there is no such folder"):
        pin_folder(tmp_path / "many", "sums")


def test_a_file_whose_name_is_no_text_is_counted_like_others(tmp_path: Path) -> None:
    def pinned(name: bytes) -> str:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / os.fsdecode(name)).touch()
        return pin_folder(folder).revision

    assert len({pinned(name) for name in (b"\xff.txt", b"\xfe.txt", b"x.txt")}) == 3
    assert pinned("é.txt".encode()) == f"sha256:{canonical_sha256(['é.txt'])}"


@pytest.mark.parametrize("name", ["my\u00a0base", "tab\t", "b\\c", "zero\u200bwidth"])
def test_a_base_that_no_checkpoint_can_name_is_refused_when_it_is_resolved(
    name: str, world: World, tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(world.base)
    work = of_recipe(tmp_path, f"path:{name}", {"name": "a", "adapter": "path:a"})
    with pytest.raises(SourceError, match="the folder of its base, and cannot name this one"):
        resolve_base(work)


@pytest.mark.parametrize("name", ["a`b", "a|b", "a\nb"])
def test_a_folder_that_no_checkpoint_can_name_is_refused_when_it_is_pinned(
    world: World, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(world.adapters["q_and_v"], tmp_path / name)
    with pytest.raises(SourceError, match="cannot name this one; rename it to letters"):
        pin_folder(folder)
    spaced = shutil.copytree(folder, tmp_path / "my adapter (2)")
    assert pin_folder(spaced).repo_id == "path:my adapter (2)"
