"""A device that one run at a time has: what blocks is a limit on a real server."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.pipelines.flows.test_local_server import kill, wait_until

DEVICES = ("gpu-of-the-tests", "gpu-beside-it")
RUN = """
import sys, time
from pathlib import Path
from pipelines.stages.worker_client import StageProcess
from pipelines.flows import flow

recipe, home, log, seconds = sys.argv[1:]
call = StageProcess.call

def on_a_device(self, stage, *rest, **more):
    '''As if there were a GPU; and written down is when it is used.'''
    if stage == "slots":
        return ["gpu-of-the-tests", "gpu-beside-it"]
    if stage != "fit_gates":
        return call(self, stage, *rest, **more)
    began = time.monotonic()
    answer = call(self, stage, *rest, **more)
    time.sleep(float(seconds))
    with Path(log).open("a") as file:
        print(began, time.monotonic(), file=file)
    return answer

StageProcess.call = on_a_device
print(flow.fuse_adapters(recipe, home, "gates"))
"""


@pytest.mark.slow
def test_two_runs_on_one_device_use_it_one_after_the_other(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    env = os.environ | {"PREFECT_API_URL": prefect_server}
    recipe, log = recipe_folder / "recipe.yaml", tmp_path / "used"
    command = [sys.executable, "-c", RUN, str(recipe)]
    runs = [
        subprocess.Popen([*command, str(tmp_path / name), str(log), "1.0"], env=env)
        for name in "ab"
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    (_, end), (begin, _) = sorted(
        tuple(map(float, line.split())) for line in log.read_text().splitlines()
    )
    assert begin >= end


@pytest.mark.slow
def test_a_killed_run_gives_its_devices_back_when_its_lease_is_over(
    prefect_server: str, recipe_folder: Path, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.exceptions import ObjectNotFound  # noqa: PLC0415

    env = os.environ | {"PREFECT_API_URL": prefect_server}
    command = [sys.executable, "-c", RUN, str(recipe_folder / "recipe.yaml")]
    log = str(tmp_path / "used")

    def held() -> bool:
        with get_client(sync_client=True) as client, suppress(ObjectNotFound):
            slots = map(client.read_global_concurrency_limit_by_name, DEVICES)
            return all(slot.active_slots == 1 for slot in slots)
        return False

    holder = subprocess.Popen([*command, str(tmp_path / "a"), log, "600"], env=env)
    wait_until(held, seconds=300)
    kill(holder)
    next_one = [*command, str(tmp_path / "b"), log, "0"]
    assert subprocess.run(next_one, env=env, check=False, timeout=300).returncode == 0


@pytest.mark.usefixtures("prefect_server")
def test_a_limit_that_was_raised_is_left_alone_and_no_server_blocks_nobody() -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate  # noqa: PLC0415
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415

    from pipelines.flows import device_lock  # noqa: PLC0415

    with get_client(sync_client=True) as client:
        shared = GlobalConcurrencyLimitCreate(name="gpu-shared", limit=2)
        client.create_global_concurrency_limit(shared)
        with device_lock.held("gpu-shared"), device_lock.held("gpu-shared"):
            there = client.read_global_concurrency_limit_by_name("gpu-shared")
            assert (there.limit, there.active_slots) == (2, 2)
        assert client.read_global_concurrency_limit_by_name("gpu-shared").active_slots == 0
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        device_lock.held("gpu-alone"),
    ):
        pass  # a warning, and no more


@pytest.mark.usefixtures("prefect_server")
def test_who_stops_waiting_for_a_device_gives_back_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C kept the first one until its lease ended."""
    from pipelines.flows import device_lock  # noqa: PLC0415

    given_back = []

    @contextmanager
    def concurrency(slot: str, **_how: object) -> Generator[None]:
        if slot == "second":
            raise KeyboardInterrupt
        try:
            yield
        finally:
            given_back.append(slot)

    monkeypatch.setattr(device_lock, "concurrency", concurrency)
    monkeypatch.setattr(device_lock, "_make_limit", lambda _slot: True)
    with pytest.raises(KeyboardInterrupt) as stopped, device_lock.held("first", "second"):
        pass
    assert given_back == ["first"]
    del stopped  # until here its traceback held what was taken
