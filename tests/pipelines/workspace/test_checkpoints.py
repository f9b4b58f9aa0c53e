"""The files of models in a home: what deleting one frees, and what makes it again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meteora.artifacts import MeteoraError
from meteora.checkpoint.manifest import EXPERTS, GATES, STATISTICS, read_manifest
from pipelines.cli import store
from pipelines.workspace.context import RunContext
from store.errors import UnknownError
from tests.pipelines.conftest import finished, run

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
    plan, other = finished(first), finished(second)
    assert plan
    assert other
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
    assert not free(plan.router.id)
    assert not first.ledger.verify().findings
    assert (others / EXPERTS).stat().st_nlink == 2
    assert finished(second)
    assert not finished(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.evaluate.evaluate_task", None)  # nothing is asked again
        run(workplace(benchmark=FEW))
    assert finished(first)
    assert read_manifest(folder).files == files
    assert first.ledger.query("SELECT * FROM scores ORDER BY id").rows == scores

    copied = folder.rename(folder.parent.parent / "elsewhere")
    for name, reason in (
        (copied, "does not lie in the store"),
        (plan.fused.id, "is no router; give the id of one"),
        ("nosuch", "no artifact's id begins with 'nosuch'"),
        (Path("README.md").parent, "meteora.json"),
    ):
        with pytest.raises((UnknownError, MeteoraError), match=reason):
            free(name, yes=True)
