"""The deployments that ship for work pools, on a real server and with a real worker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipelines
from pipelines.workspace import environment
from pipelines.workspace.context import RunContext

SHIPPED = Path(pipelines.__file__).parent / "flows" / "prefect.yaml"
POOLS = {"recipes": "process", "recipes-docker": "docker", "recipes-kubernetes": "kubernetes"}


def shipped() -> dict[str, Any]:
    return yaml.safe_load(SHIPPED.read_text())


def test_a_worker_is_told_what_a_run_of_ours_sets_itself() -> None:
    """But for what only a server reads, which here is the user's."""
    expected = {k: v for k, v in environment.SETTINGS.items() if "PREFECT_SERVER" not in k}
    deployments = shipped()["deployments"]
    assert {one["work_pool"]["name"] for one in deployments} == set(POOLS)
    for one in deployments:
        assert one["work_pool"]["job_variables"]["env"] == expected


def pool_template(kind: str) -> dict[str, Any]:
    """What a pool of a kind makes jobs of, as Prefect's server brings it for all workers."""
    import prefect  # noqa: PLC0415

    views = Path(prefect.__file__).parent / "server" / "api" / "collections_data" / "views"
    kinds = json.loads((views / "aggregate-worker-metadata.json").read_text()).values()
    return next(one[kind] for one in kinds if kind in one)["default_base_job_configuration"]


def test_what_a_deployment_asks_for_arrives_in_its_pool_s_job() -> None:
    """A variable that a pool does not know would be dropped without a word."""
    from prefect.utilities.templating import apply_values  # noqa: PLC0415

    jobs = {}
    for one in shipped()["deployments"]:
        kind = POOLS[one["work_pool"]["name"]]
        template, asked = pool_template(kind), one["work_pool"]["job_variables"]
        known = template["variables"]["properties"]
        assert set(asked) <= set(known)
        defaults = {name: about["default"] for name, about in known.items() if "default" in about}
        jobs[kind] = apply_values(template["job_configuration"], defaults | asked)
        assert jobs[kind]["env"] == asked["env"]
    assert jobs["docker"]["image"] == "your-registry/meteora-pipelines:0.2.0"
    assert jobs["docker"]["volumes"] == ["meteora-home:/home/meteora"]
    (container,) = jobs["kubernetes"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == jobs["docker"]["image"]
    assert container["env"] == jobs["docker"]["env"]
    assert container["resources"]["limits"] == {"memory": "8Gi"}


def prefect(*words: str, folder: Path) -> str:
    said = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


@pytest.mark.slow
def test_every_pool_takes_its_deployment_and_a_worker_does_one(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    """The user's pools, workers and recipe; Docker's and Kubernetes' workers are not tried here."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415

    assert os.environ["PREFECT_API_URL"] == prefect_server
    work = RunContext.open(str(recipe_folder / "recipe.yaml"), tmp_path / "home")
    asked = {"recipe": str(work.path), "home": str(work.home), "until": "stack"}
    deployments = [one | {"parameters": asked} for one in shipped()["deployments"]]
    body = shipped() | {"deployments": deployments}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    for name, kind in POOLS.items():
        prefect("work-pool", "create", name, "--type", kind, folder=tmp_path)
    prefect("--no-prompt", "deploy", "--prefect-file", "prefect.yaml", "--all", folder=tmp_path)
    with get_client(sync_client=True) as client:
        for one in deployments:
            there = client.read_deployment_by_name(f"meteora/{one['name']}")
            assert there.work_pool_name == one["work_pool"]["name"]
            assert "0 3 * * *" in str(there.schedules[0].schedule)
        first = client.read_deployment_by_name("meteora/quickstart")
        run_id = client.create_flow_run_from_deployment(first.id).id
        prefect("worker", "start", "--pool", "recipes", "--run-once", folder=tmp_path)
        ended = client.read_flow_run(run_id)
    assert ended.state is not None
    assert ended.state.is_completed(), ended.state.message
    assert ended.name.startswith(f"{work.name} ")
    assert work.ledger.query("SELECT outcome FROM runs").rows == [("ok",)]
