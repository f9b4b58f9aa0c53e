"""Several recipes on a local Dask cluster of two workers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from store.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_two_workers_share_the_recipes_and_one_that_fails_stops_no_other(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    broken = [{**body["experts"][0], "adapter": "path:nowhere"}, body["experts"][1]]
    recipes = {}
    for name, change in (
        ("first", {}),
        ("second", {"gates": {"examples_per_expert": 4}}),
        ("broken", {"experts": broken}),
    ):
        recipes[name] = recipe_folder / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump(body | change))
    said = subprocess.run(
        [
            sys.executable, "-m", "pipelines.cli", "run", *map(str, recipes.values()),
            "--dask", "2", "--until", "gates", "--home", str(tmp_path / "home"),
        ],
        env=os.environ | {"PREFECT_API_URL": prefect_server},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 1, said.stderr
    assert "error: broken-" in said.stderr
    assert "nowhere" in said.stderr
    ledger = Ledger(tmp_path / "home")
    rows = ledger.query("SELECT split_part(recipe_name, '-', 1), outcome FROM runs ORDER BY 1").rows
    assert [row for row in rows if row[1] == "ok"] == [("first", "ok"), ("second", "ok")]
    together = ledger.query(  # a run's name begins with its time
        "SELECT max(run_id) < strftime(min(ended_at), '%Y%m%dT%H%M%S') FROM runs"
        " WHERE outcome = 'ok'"
    )
    assert together.rows == [(True,)]
    assert ledger.query("SELECT count(*) FROM artifacts WHERE kind = 'fused'").rows == [(1,)]


def test_without_dask_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.flows import dask  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(dask.NoDaskError, match=r"pip install 'meteora-pipelines\[dask\]'"):
        dask._task_runner("2")
