"""Who may know whom: what import contracts cannot see, since it happens when modules load."""

import ast
import re
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(
    folder.parent.relative_to(ROOT).as_posix()
    for package in ("meteora", "pipelines")
    for folder in (ROOT / package).glob("*/__init__.py")
)


LIGHT = {
    "the command line": {
        "meteora.artifacts": {"torch", "duckdb", "prefect"},
        "meteora": {"torch", "transformers"},
        "meteora.adapters.reader": {"torch", "peft", "numpy"},
        "pipelines.cli": {"torch", "prefect", "duckdb", "pydantic", "jinja2"},
        "store.ledger": {"torch", "transformers", "prefect"},
        "pipelines.cli.score_table": {"torch", "prefect", "jinja2", "matplotlib"},
        "pipelines.flows.up_to_date": {"torch", "prefect", "transformers", "lm_eval"},
        "pipelines.publishing.publish": {"torch", "transformers"},
        "pipelines.flows.flow": {"torch", "transformers", "lm_eval"},
    },
    "stages": {
        "meteora.routing.layer": {"duckdb", "prefect", "transformers"},
        "pipelines.stages.worker": {
            "peft", "datasets", "lm_eval.tasks", "lm_eval.evaluator", "scipy.stats", "prefect",
        },
    },
}  # fmt: skip
"""What importing a module must not bring, nor those that are imported before it in one process."""


@pytest.mark.parametrize("process", LIGHT)
def test_importing_stays_light(process: str) -> None:
    code = "".join(f"import sys, {module}; print(*sys.modules)\n" for module in LIGHT[process])
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [set(line.split()) for line in said.stdout.splitlines()]
    brought = zip(LIGHT[process].items(), loaded, strict=True)
    assert {
        module: heavy & modules for (module, heavy), modules in brought if heavy & modules
    } == {}


def test_the_top_level_holds_what_it_may_and_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pipelines", "meteora", "store", "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_no_module_of_the_model_reads_the_environment() -> None:
    for path in (ROOT / "meteora").rglob("*.py"):
        text = path.read_text()
        assert "os.environ" not in text, path
        assert "getenv" not in text, path


def test_files_of_text_are_utf_8_in_every_locale() -> None:
    """A call without an encoding reads and writes as the user's locale says."""
    before_it = {"read_text": 0, "write_text": 1}  # the arguments before the encoding
    found = []
    packages = (ROOT / name for name in ("meteora", "pipelines", "store"))
    for path in chain.from_iterable(package.rglob("*.py") for package in packages):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and "encoding" not in {one.arg for one in call.keywords}:
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                words = {one.value for one in call.args if isinstance(one, ast.Constant)}
                opens = name == "open" and words & {"r", "w", "a", "x", "r+"}
                if opens or len(call.args) <= before_it.get(name, -1):
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found == []


def test_modules_are_short_enough_to_read_at_one_sitting() -> None:
    for package in ("meteora", "store", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_at_most_twelve_files_and_its_docstring_names_each(room: str) -> None:
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    source = (ROOT / room / "__init__.py").read_text()
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    named = re.findall(r"^ *(\w+)  +\S", docstring, re.MULTILINE)
    assert set(named) == files
    assert len(named) == len(files) <= 12


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_tests_in_a_folder_of_its_name(room: str) -> None:
    assert list((ROOT / "tests" / room).glob("test_*.py"))


@cache
def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph("meteora", "pipelines", "store", cache_dir=None)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_at_most_five_levels(room: str) -> None:
    """Imports for type checkers count, too."""
    graph, package = import_graph(), room.replace("/", ".")
    modules = graph.find_children(package)

    @cache
    def level(module: str) -> int:
        below = graph.find_modules_directly_imported_by(module) & modules
        return 1 + max(map(level, below), default=0)

    assert max(map(level, modules)) <= 5
