"""What is found out about an expert after it was accepted reaches the ledger and the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from pipelines import judge, plan, sources, stages
from pipelines.opening import opened

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from pipelines.workplace import Workplace
    from tests.conftest import World


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
    workplace: Callable[..., Workplace],
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
    base = sources.resolve_base(work.recipe, work.folder)
    built = stages.build_base(work, base)
    found = judge.find_experts(
        work, built, resolve=sources.resolve_adapter, fetch=sources.fetch_adapter
    )
    judge.check(work, built, found)
    planned = plan.make_plan(work.recipe, work.folder, base, found)
    stages.stack(work, planned)
    with opened(work, planned, built, None) as (model, tokenizer):
        judge.probe(work, planned, model, tokenizer)

    rows = work.ledger.query("SELECT name, codes FROM adapters").rows
    codes = {name: set(found) - {"base_local_path"} for name, found in rows}
    assert codes["whisper"] == {"no_effect"}
    assert "large_update" in codes["shout"]
    assert "no_effect" not in codes["plain"] | codes["shout"]
    said = capsys.readouterr().err
    assert "note: whisper: forced on a probe prompt it changes no logit" in said
    assert "note: shout: what it adds to" in said
    assert codes.keys() == times.keys()
