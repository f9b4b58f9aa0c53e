"""The lines on the page about benchmarks that write scores to MLflow: it reads them back."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.pages import ROOT, fences
from tests.store.conftest import Shelf, fill


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17, SQLAlchemy 2.1
def test_mlflow_reads_every_score_back(tmp_path: Path) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415  (a second, and for one test)

    shelf = Shelf(tmp_path / "home")
    fill(shelf)
    shelf.ledger.ingest()
    (page,) = fences(ROOT / "pipelines/docs/benchmarks.md", "python")
    code = compile(page.replace("~/.meteora", str(shelf.home)), "benchmarks.md", "exec")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {"MLFLOW_TRACKING_URI": database, "MLFLOW_DISABLE_TELEMETRY": "true"}

    def found() -> list[Any]:
        """What MLflow has when the page's lines were run, as they stand but for the home."""
        with patch.dict(os.environ, settings):
            exec(code, {})  # noqa: S102
        client = MlflowClient(database)
        experiment = client.get_experiment_by_name("meteora")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    metrics: dict[tuple[str, str], float] = {}
    for one in found():
        assert one.info.status == "FINISHED"
        name = f"{one.data.params['system']} of {one.data.tags['router_id'][:19]}"
        assert one.info.run_name == name
        metrics |= {(name, key): x for key, x in one.data.metrics.items()}
    expected: dict[tuple[str, str], float] = {}
    for router_id, system, task, metric, value, low, high in shelf.ledger.query(
        "SELECT router_id, system, task, metric, value, low, high FROM latest_standings"
        " WHERE system <> 'alone'"
    ).rows:
        name, key = f"{system} of {router_id[:19]}", f"{task}/{metric}"
        expected |= {(name, key): value, (name, f"{key}/low"): low, (name, f"{key}/high"): high}
    assert metrics == expected
    assert {name.split()[0] for name, _ in metrics} >= {"fused", "base"}
    assert len(found()) == len({name for name, _ in expected})  # what is there is not written again
