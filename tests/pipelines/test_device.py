"""A device that one run at a time has: what blocks is a limit on a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

RUN = """
import sys, time
from pathlib import Path
from pipelines.child import Child
from pipelines import flows

recipe, home, log = sys.argv[1:]
call = Child.call

def on_a_device(self, stage, *rest, **more):
    '''As if there were a GPU; and written down is when it is used.'''
    if stage == "slots":
        return ["gpu-of-the-tests", "gpu-beside-it"]
    if stage != "fit_gates":
        return call(self, stage, *rest, **more)
    began = time.monotonic()
    answer = call(self, stage, *rest, **more)
    time.sleep(1.0)
    with Path(log).open("a") as file:
        print(began, time.monotonic(), file=file)
    return answer

Child.call = on_a_device
print(flows.fuse_adapters(recipe, home, "gates"))
"""


def test_two_runs_on_one_device_use_it_one_after_the_other(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    env = os.environ | {"PREFECT_API_URL": prefect_server}
    recipe, log = recipe_folder / "recipe.yaml", tmp_path / "used"
    command = [sys.executable, "-c", RUN, str(recipe)]
    runs = [subprocess.Popen([*command, str(tmp_path / name), str(log)], env=env) for name in "ab"]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    (_, end), (begin, _) = sorted(
        tuple(map(float, line.split())) for line in log.read_text().splitlines()
    )
    assert begin >= end


@pytest.mark.usefixtures("prefect_server")
def test_a_limit_that_was_raised_is_left_alone_and_no_server_blocks_nobody() -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate  # noqa: PLC0415
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415

    from pipelines import device  # noqa: PLC0415

    with get_client(sync_client=True) as client:
        shared = GlobalConcurrencyLimitCreate(name="gpu-shared", limit=2)
        client.create_global_concurrency_limit(shared)
        with device.held("gpu-shared"), device.held("gpu-shared"):
            there = client.read_global_concurrency_limit_by_name("gpu-shared")
            assert (there.limit, there.active_slots) == (2, 2)
        assert client.read_global_concurrency_limit_by_name("gpu-shared").active_slots == 0
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}), device.held("gpu-alone"):
        pass  # a warning, and no more
