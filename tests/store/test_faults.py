"""Every act of the store, struck at every call that changes or secures a file, DuckDB's among them.

`faults.c` stands between the program and the C library, so that it sees both; `faulty` strikes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.faulty import ACTS

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("faults.c")


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts calls of Linux's C library")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    assert compiler, "faults are made by a C compiler's help; install one, such as gcc"
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("kind", "first", "stride"),
    [
        pytest.param("k", 3, 47, id="some kills"),
        pytest.param("k", 1, 1, id="every kill", marks=pytest.mark.slow),
        pytest.param("f", 2, 4, id="the disk is full", marks=pytest.mark.slow),
        pytest.param("e", 3, 4, id="the disk fails once", marks=pytest.mark.slow),
    ],
)
def test_a_strike_breaks_no_promise(
    faults: Path, tmp_path: Path, act: str, kind: str, first: int, stride: int
) -> None:
    """Nothing promised is lost, no record lacks its blob, and whoever comes next goes on.

    A call that fails is a refusal in one sentence, or an ingest that tells why it waits.
    """
    command = [sys.executable, "-m", "tests.store.faulty", tmp_path, act, kind, first, stride]
    struck = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(faults)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert "broken" not in struck, struck
    assert struck.count("survived") >= 1 + 15 // stride  # to pack again is 18 calls, the fewest
