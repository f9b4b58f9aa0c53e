"""The script for a rented GPU, as uv starts it, with a server that speaks S3."""

import os
import signal
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from uv import find_uv_bin

import meteora
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from store.sharing import connect
from tests.pages import ROOT
from tests.pipelines.cli.command_line import done
from tests.pipelines.flows.test_local_server import wait_until
from tests.store import test_sharing

server, url = test_sharing.server, test_sharing.url
SCRIPT = ROOT / "pipelines" / "docs" / "rented_gpu.py"
METADATA = f"""\
Metadata-Version: 2.1
Name: meteora-pipelines
Version: {meteora.__version__}
Provides-Extra: shared
"""


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a wheel of this package that leads to the source and to what is installed."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    name = f"meteora_pipelines-{meteora.__version__}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        paths = (
            str(ROOT),
            sysconfig.get_path("purelib"),
            *os.environ.get("PYTHONPATH", "").split(":"),
        )
        wheel.writestr("meteora_here.pth", "\n".join(paths))
        wheel.writestr(f"{name}.dist-info/METADATA", METADATA)
        wheel.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return folder


def start(wheels: Path, *words: object) -> subprocess.Popen[str]:
    command = [
        find_uv_bin(), "run", "--offline", "--no-index", "--find-links", str(wheels),
        "--no-config", "--python", sys.executable, str(SCRIPT), *map(str, words),
    ]  # fmt: skip
    environment = os.environ | {"UV_CACHE_DIR": str(wheels.parent / "cache")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_what_one_machine_began_the_next_one_finishes_and_a_third_has_it(
    url: str, wheels: Path, tmp_path: Path, workplace: Callable[..., RunContext]
) -> None:
    """The first machine is taken away between two stages."""
    one, two = tmp_path / "one", tmp_path / "two"
    work = workplace(benchmark={"limit": 2, "compare": ["base"], "max_new_tokens": 1})
    first = start(wheels, url, work.path, "--cpu", "--home", one)
    wait_until(lambda: one.is_dir() and has(Ledger(one), "router"), seconds=300)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode != 0

    second = start(wheels, url, work.path, "--cpu", "--home", two)
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "scores" in out
    assert "fitting the gates" not in err  # they came with the store
    first_router = Ledger(one).query("SELECT id FROM routers WHERE router = 'gate'").rows
    assert Ledger(two).query("SELECT id FROM routers WHERE router = 'gate'").rows == first_router
    third = tmp_path / "home"  # where the test's own recipe works
    connect(third, url)
    said = done("run", work.path, "--home", third)
    assert "fitting the gates" not in said.stderr
    assert said.stdout.split("times:")[0] == out.split("times:")[0]
    ledger = Ledger(third)
    assert ledger.query("SELECT count(*) FROM scores").rows == [(4,)]
    outcomes = "SELECT outcome FROM runs ORDER BY started_at"
    assert ledger.query(outcomes).rows == [("stopped",), ("ok",), ("ok",)]
    assert not ledger.verify().findings


def has(ledger: Ledger, kind: str) -> bool:
    return any(record.body["kind"] == kind for record in ledger._lookup.find("artifact"))


def test_without_a_gpu_or_a_store_it_says_so(wheels: Path, tmp_path: Path) -> None:
    for words, sentence in (
        ((), "torch sees no GPU here"),
        (("--cpu",), "cannot be used as shared storage"),
    ):
        said = start(wheels, "nothing://here", "quickstart", "--home", tmp_path / "home", *words)
        _, err = said.communicate()
        assert said.returncode == 1, err
        assert err.strip().splitlines()[-1].startswith("error: ")
        assert sentence in err
    assert not (tmp_path / "home").exists()


def test_its_header_asks_for_this_package_and_an_extra_that_it_has() -> None:
    lines = SCRIPT.read_text().splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    header = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines[start + 1 : end]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    assert header["dependencies"] == [f"{project['name']}[shared]"]
    assert "shared" in project["optional-dependencies"]
