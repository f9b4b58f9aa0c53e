"""The files of models in a home: what deleting one frees, and what makes it again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meteora.artifacts import MeteoraError
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, STATISTICS, read_manifest
from pipelines.cli import store
from pipelines.publishing.signing import SIGNATURE
from pipelines.reports.summary import summarise
from pipelines.workspace.checkpoints import checkpoint_folder
from pipelines.workspace.context import RunContext
from store.errors import UnknownError
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.conftest import finished, result_of, run

FEW = {"limit": 1, "max_new_tokens": 1, "compare": []}


@pytest.mark.usefixtures("prefect_server")
def test_a_model_is_deleted_without_what_others_need_and_made_again_without_a_benchmark(
    workplace: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    def free(*names: object, yes: bool = False) -> dict[str, int]:
        capsys.readouterr()
        store.free([*map(str, names)], yes, first.home, as_json=True)
        return {one["name"]: one["num_bytes"] for one in json.loads(capsys.readouterr().out)}

    first = workplace(benchmark=FEW)
    run(first)
    second = workplace(benchmark=FEW, router={"share": "layer"})
    run(second)
    (plan, _), (other, _) = map(result_of, (first, second))
    folder, others = (
        first.checkpoint_folder(plan.router.id),
        second.checkpoint_folder(other.router.id),
    )
    files = read_manifest(folder).files
    gates = {files[name] for name in (GATES, STATISTICS)}
    scores = first.ledger.query("SELECT * FROM scores ORDER BY id").rows

    found = free(plan.router.id)
    assert found.keys() == {*gates, str(folder)}
    assert found == free(folder)
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*")}
    assert found[files[GATES]] == sizes[GATES]
    assert found[str(folder)] == sum(sizes.values()) - sum(sizes[name] for name in files)
    both = free(folder, others)
    assert files[EXPERTS] in both, "no other model has them"
    assert folder.is_dir()

    assert free(plan.router.id, yes=True) == found
    assert not folder.exists()
    summary = summarise(first.ledger, plan, None)
    assert summary is not None, "the scores are here"
    assert summary.sizes.keys() == {"experts"}
    with pytest.raises(UnknownError, match="if its folder was deleted, run its recipe again"):
        checkpoint_folder(plan.router.id, first.home)
    assert not free(plan.router.id)
    assert not first.ledger.verify().findings
    assert (others / EXPERTS).stat().st_nlink == 2
    assert finished(second)
    away = others.rename(first.home / "away")
    assert files[EXPERTS] not in free(plan.router.id), "the other is made again of them"
    away.rename(others)
    assert not finished(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.evaluate.evaluate_task", None)  # nothing is asked again
        run(workplace(benchmark=FEW))
    assert finished(first)
    assert read_manifest(folder).files == files
    assert first.ledger.query("SELECT * FROM scores ORDER BY id").rows == scores

    copied = folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(copied)
    assert str(folder) in free(plan.router.id, yes=True)
    assert not folder.is_symlink()
    assert (copied / GATES).is_file()
    for name, reason in (
        (copied, "does not lie in the store"),
        (plan.fused.id, "is no router; give the id of one"),
        ("nosuchid", "no artifact's id begins with 'nosuchid'"),
        (plan.router.id[:14], "too short for what is to be deleted; give 8 digits or more"),
        (Path("README.md").parent, "meteora.json"),
    ):
        with pytest.raises((UnknownError, MeteoraError), match=reason):
            free(name, yes=True)


@pytest.mark.usefixtures("prefect_server")
def test_gates_that_a_model_without_a_folder_shares_stay(
    workplace: Callable[..., RunContext], capsys: pytest.CaptureFixture[str]
) -> None:
    first = workplace(benchmark=FEW)
    run(first)
    twin = workplace(benchmark=FEW, router={"margin": 0.5})
    run(twin)
    router_id, waiting = (result_of(work)[0].router.id for work in (first, twin))
    gates = set(first.ledger.blobs_of(router_id))
    assert gates == set(twin.ledger.blobs_of(waiting)), "they are the same bytes"
    shutil.rmtree(twin.checkpoint_folder(waiting))
    capsys.readouterr()
    store.free([router_id], True, first.home, as_json=True)
    names = {one["name"] for one in json.loads(capsys.readouterr().out)}
    assert names == {str(first.checkpoint_folder(router_id))}
    assert all(sha256 in twin.ledger.blobs for sha256 in gates)


def test_a_checkpoint_that_is_not_recorded_is_deleted_by_its_name(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `add` to a stranger's checkpoint leaves it."""
    home = tmp_path / "home"
    Ledger(home).ingest()
    folder = home / "checkpoints" / "0123456789abcdef"
    shutil.copytree(world.checkpoint, folder)
    manifest = replace(world.manifest, router_id=f"router:{folder.name}{'0' * 48}")
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / SIGNATURE).write_text("{}")
    (folder.parent / "damaged").mkdir()
    (folder.parent / "damaged" / EXPERTS).symlink_to("nowhere")
    size = sum(path.stat().st_size for path in folder.iterdir())
    store.free([folder.name], True, home)
    out, err = capsys.readouterr()
    assert out == f"{size}\t{folder}\n"
    assert "is signed; if it is made again, it has no signature" in err
    assert not folder.exists()
    assert (folder.parent / "damaged").is_dir()
