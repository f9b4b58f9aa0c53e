"""A webhook is told of runs that fail or fall silent, by the server's own automations."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from meteora.artifacts import MeteoraError
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.pipelines.conftest import run
from tests.pipelines.flows.test_local_server import wait_until
from tests.pipelines.flows.test_serve import start as serve
from tests.pipelines.flows.test_serve import stop


@contextmanager
def listening() -> Generator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """An address that can be called, and what it was called with."""
    calls: queue.Queue[dict[str, Any]] = queue.Queue()

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # ty: ignore[incompatible-method-override]
            """Not into the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/failed", calls
        server.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_whoever_asked_is_told_once_of_a_run_that_failed(
    workplace: Callable[..., RunContext],
) -> None:
    from pipelines.flows import failure_webhook  # noqa: PLC0415

    with listening() as (url, calls):
        failure_webhook.call_on_failure(url)
        failure_webhook.call_on_failure(url)  # again: one address, told once
        with pytest.raises(MeteoraError, match="nowhere"):
            run(workplace(base="path:nowhere"))
        told = calls.get(timeout=300)
        with pytest.raises(queue.Empty):
            calls.get(timeout=5)
    assert told["text"].startswith("meteora: changed ")
    assert "Failed" in told["text"]
    assert "nowhere" in told["text"]
    assert "/runs/flow-run/" in told["page"]


ENDS_AFTER_ITS_BASE = """
import os, signal, sys, time
from pipelines.flows import flow

recipe, home, how = sys.argv[1:]
step = flow.build_base

def last_step(*args):
    step(*args)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(how))

flow.build_base = last_step
flow.fuse_adapters(recipe, home, "base")
"""


def start(recipe_folder: Path, home: Path, how: str) -> subprocess.Popen[bytes]:
    """A run that comes to its base and there is killed, or works on for so many seconds."""
    asked = [str(recipe_folder / "recipe.yaml"), str(home), how]
    return subprocess.Popen(
        [sys.executable, "-c", ENDS_AFTER_ITS_BASE, *asked],
        env=os.environ | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"},  # Prefect's shortest
    )


@pytest.fixture
def no_automations() -> Generator[None]:
    """As before: those of a test are not left to others on the same server."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415

    yield
    with get_client(sync_client=True) as client:
        for one in client.read_automations():
            client.delete_automation(one.id)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "no_automations")
def test_a_run_that_fell_silent_is_closed_and_told_of_and_one_that_works_is_left(
    recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.filters import (  # noqa: PLC0415
        FlowRunFilter,
        FlowRunFilterName,
    )

    from pipelines.flows import failure_webhook  # noqa: PLC0415

    monkeypatch.setattr(failure_webhook, "SILENCE", timedelta(seconds=45))
    with listening() as (url, calls):
        failure_webhook.call_on_failure(url)
        alive = start(recipe_folder, tmp_path / "alive", "600")
        killed = start(recipe_folder, tmp_path / "killed", "killed")
        assert killed.wait(timeout=300) == -signal.SIGKILL
        told = calls.get(timeout=300)
        (silent,), (works,) = (Ledger(tmp_path / one).unended_runs() for one in ("killed", "alive"))
        with get_client(sync_client=True) as client:
            (run,) = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=works.run_id))
            )
        alive.kill()
        alive.wait()
    assert silent.run_id in told["text"]
    assert "Crashed. it has sent no heartbeat" in told["text"]
    assert run.state is not None
    assert run.state.is_running()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "no_automations")
def test_a_run_that_was_asleep_so_long_goes_on_and_ends_as_it_ends(
    recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken for crashed, and told of; nothing of its work is lost."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.filters import (  # noqa: PLC0415
        FlowRunFilter,
        FlowRunFilterName,
    )

    from pipelines.flows import failure_webhook  # noqa: PLC0415

    ledger = Ledger(tmp_path / "home")
    monkeypatch.setattr(failure_webhook, "SILENCE", timedelta(seconds=45))
    with listening() as (url, calls):
        failure_webhook.call_on_failure(url)
        sleeper = start(recipe_folder, tmp_path / "home", "5")
        wait_until(lambda: bool(ledger.unended_runs()), seconds=300)
        sleeper.send_signal(signal.SIGSTOP)
        (asleep,) = ledger.unended_runs()
        assert f"{asleep.run_id} Crashed" in calls.get(timeout=300)["text"]
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(timeout=300) == 0
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=asleep.run_id))
        )
    assert run.state is not None
    assert run.state.is_completed()
    assert ledger.query("SELECT outcome FROM runs").rows == [("ok",)]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "no_automations")
def test_whoever_asked_is_told_at_once_of_a_scheduled_run_that_failed(
    recipe_folder: Path, tmp_path: Path
) -> None:
    """Prefect's scheduler sends no event, and those that follow would wait for it."""
    folder = tmp_path / "letters"
    shutil.copytree(recipe_folder, folder, symlinks=True)
    (folder / "none").mkdir(exist_ok=True)
    with listening() as (url, calls):
        asked = ("--cron", "* * * * * */10", "--on-failure", url)
        process, log = serve(folder, tmp_path / "home", *asked)
        try:
            wait_until(lambda: "runs at" in log.read_text(), seconds=60)
            with (folder / "recipe.yaml").open("a") as recipe:
                recipe.write("bogus: 1\n")
            told = calls.get(timeout=120)
        finally:
            stop(process)
    assert "Failed" in told["text"]
    assert "unknown key bogus" in told["text"]
    assert "error: letters: " in log.read_text()
