"""The lines on the page about benchmarks that write scores to MLflow: it reads them back."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.pages import ROOT, fences
from tests.pipelines.conftest import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.workspace.context import RunContext

pytestmark = pytest.mark.usefixtures("prefect_server")


def write_scores(work: RunContext, folder: Path) -> None:
    """Run the page's lines as they stand, but for the home."""
    (code,) = fences(ROOT / "pipelines/docs/benchmarks.md", "python")
    command = [
        sys.executable,
        "-W",
        "error::SyntaxWarning",
        "-c",
        code.replace("~/.meteora", str(work.home)),
    ]
    where = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        command, cwd=folder, env=os.environ | where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17, SQLAlchemy 2.1
def test_mlflow_reads_every_score_back(
    workplace: Callable[..., RunContext], tmp_path: Path
) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415  (a second, and for one test)

    work = workplace(benchmark={"limit": 4, "compare": ["base", "oracle"], "max_new_tokens": 2})
    run(work)
    write_scores(work, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")

    def found() -> list[Any]:
        experiment = client.get_experiment_by_name("meteora")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    metrics: dict[tuple[str, str], float] = {}
    for one in found():
        assert one.info.status == "FINISHED"
        assert one.data.params["router"] == "gate"
        assert (
            one.info.run_name == f"{one.data.params['system']} of {one.data.tags['router_id'][:19]}"
        )
        metrics |= {(one.data.params["system"], key): x for key, x in one.data.metrics.items()}
    expected = {}
    for system, task, metric, value, low, high in work.ledger.query(
        "SELECT system, task, metric, value, low, high FROM standings"
        " JOIN routers ON id = router_id WHERE router = 'gate' AND system <> 'alone'"
    ).rows:
        key = f"{task}/{metric}"
        ends = {f"{key}/low": low, f"{key}/high": high}
        expected |= {(system, name): x for name, x in {key: value, **ends}.items()}
    assert metrics == expected
    assert {system for system, _ in metrics} == {"fused", "base", "oracle"}

    write_scores(work, tmp_path)
    assert len(found()) == 3  # what is there is not written again
