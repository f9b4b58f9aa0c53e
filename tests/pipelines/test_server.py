from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest

from pipelines import server

if TYPE_CHECKING:
    from pathlib import Path

KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.environment import prepare
from pipelines.server import start_server

home = Path(sys.argv[1])
prepare(home)
start_server(home)
print(os.environ["PREFECT_API_URL"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
            return True
    except OSError:
        return False


def test_the_server_is_gone_when_its_run_is_killed(tmp_path: Path) -> None:
    removed = {name for name in os.environ if name.startswith("PREFECT")}
    clean = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        check=False, capture_output=True, text=True, env=clean,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    url = done.stdout.strip()
    assert url.startswith("http://127.0.0.1:")
    deadline = time.monotonic() + 10
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


def test_a_server_that_does_not_start_is_said_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.sys, "executable", "/bin/false")
    with pytest.raises(server.ServerError, match=r"server\.log says why"):
        server.start_server(tmp_path)
    assert "PREFECT_API_URL" not in os.environ
