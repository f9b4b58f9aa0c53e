"""Who may know whom: what import contracts cannot see, since it happens when modules load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        pytest.param("store.ledger", {"torch", "transformers", "prefect"}, id="store"),
        pytest.param("meteora", {"torch", "transformers"}, id="package"),
        pytest.param("meteora.artifacts", {"torch", "duckdb", "prefect"}, id="nouns"),
        pytest.param("meteora.adapters", {"torch", "peft", "numpy"}, id="adapters"),
        pytest.param("meteora.layer", {"duckdb", "prefect", "transformers"}, id="layer"),
        pytest.param(
            "pipelines.cli", {"torch", "prefect", "duckdb", "pydantic", "jinja2"}, id="command line"
        ),
        pytest.param("pipelines.flows", {"torch", "transformers", "lm_eval"}, id="flows"),
        pytest.param("pipelines.publication", {"torch", "transformers"}, id="publishing"),
        pytest.param(
            "pipelines.finished", {"torch", "prefect", "transformers", "lm_eval"}, id="finished run"
        ),
        pytest.param(
            "pipelines.stage_worker",
            {"peft", "datasets", "lm_eval.tasks", "lm_eval.evaluator", "scipy.stats", "prefect"},
            id="stages",
        ),
    ],
)
def test_importing_stays_light(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not heavy & set(loaded.stdout.split())


def test_the_top_level_holds_what_it_may_and_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pipelines", "meteora", "store", "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_no_module_of_the_model_reads_the_environment() -> None:
    for path in (ROOT / "meteora").glob("*.py"):
        text = path.read_text()
        assert "os.environ" not in text, path
        assert "getenv" not in text, path


def test_modules_are_short_enough_to_read_at_one_sitting() -> None:
    for package in ("meteora", "store", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 320, path
