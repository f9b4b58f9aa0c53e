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
    from collections.abc import Generator
    from pathlib import Path

USER = """
import os, sys
from pathlib import Path
from pipelines.environment import prepare
from pipelines.server import use_local_server

home = Path(sys.argv[1])
prepare(home)
started = use_local_server(home)
print(started, os.environ["PREFECT_API_URL"], flush=True)
sys.stdin.read()
"""


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
            return True
    except OSError:
        return False


def without_prefect() -> dict[str, str]:
    removed = {name for name in os.environ if name.startswith("PREFECT")}
    return {name: value for name, value in os.environ.items() if name not in removed}


@pytest.fixture
def home(tmp_path: Path) -> Generator[Path]:
    """A home whose server is gone before the folder is."""
    yield tmp_path
    deadline = time.monotonic() + 10
    while (tmp_path / "prefect" / "address").exists() and time.monotonic() < deadline:
        if not answers((tmp_path / "prefect" / "address").read_text()):
            return
        time.sleep(0.1)


def user(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=without_prefect(),
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def told(process: subprocess.Popen[str]) -> tuple[bool, str]:
    assert process.stdout is not None
    started, url = process.stdout.readline().split()
    return started == "True", url


def test_all_users_of_a_home_share_its_server_and_the_last_ends_it(home: Path) -> None:
    """Two that come at once get one server, which outlives the one that started it."""
    both = [user(home), user(home)]
    (first, url), (second, its) = map(told, both)
    assert url == its
    assert url.startswith("http://127.0.0.1:")
    assert first != second
    starter, other = both if first else reversed(both)

    kill(starter)
    time.sleep(1.0)
    assert answers(url)

    kill(other)
    deadline = time.monotonic() + 10
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


def test_a_server_that_does_not_start_is_said_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.sys, "executable", "/bin/false")
    with pytest.raises(server.ServerError, match=r"server\.log says why"):
        server.use_local_server(tmp_path)
    assert "PREFECT_API_URL" not in os.environ
