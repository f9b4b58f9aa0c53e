"""The table of faults names tests that exist, and every error of ours is raised in a test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")
LAST_ROW = 153
HELD_BY_MESSAGE = {
    "BenchmarkRequestError": "pipelines/stages/test_benchmark.py"
    "::test_new_rows_a_recipe_and_other_systems_can_be_given",
    "NewerLedgerError": "store/test_index.py::test_a_newer_ledger_is_left_alone",
    "NoExpertsError": "pipelines/admission/test_discover.py"
    "::test_where_nothing_is_found_or_usable_there_is_nothing_to_stack",
    "NotHereError": "pipelines/admission/test_discover.py"
    "::test_a_dry_run_resolves_and_downloads_nothing",
    "NotInstalledError": "pipelines/cli/test_app.py"
    "::test_a_bad_recipe_a_missing_one_and_a_missing_base_get_one_sentence",
    "OrderError": "meteora/routing/test_routers.py"
    "::test_a_follower_repeats_what_its_gate_decided_and_refuses_other_tokens",
    "TransientHubError": "pipelines/hub/test_upload.py::test_what_passes_is_tried_again",
}
"""Errors that no test names: those that only have subclasses, or are known by their message."""


def exists(file: str, test: str) -> bool:
    path = TESTS / file
    return path.is_file() and f"def {test}(" in path.read_text(encoding="utf-8")


def rows() -> list[tuple[int, str]]:
    """The number of each row, and what holds it."""
    table = (TESTS / "faults.md").read_text(encoding="utf-8")
    return [(int(number), held) for number, _, _, held in ROW.findall(table)]


def test_every_row_is_held_by_tests_that_exist_or_says_why_not() -> None:
    held = rows()
    assert sorted(number for number, _ in held) == list(range(1, LAST_ROW + 1))
    wrong = {
        number: cell
        for number, cell in held
        if not cell.startswith("open: ")
        and not ((named := NAMED.findall(cell)) and all(exists(*one) for one in named))
    }
    assert wrong == {}


def _errors() -> set[str]:
    """The names of `MeteoraError` and of all that descends from it."""
    bases: dict[str, set[str]] = {}
    for room in ("meteora", "pipelines", "store"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    names = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    bases.setdefault(node.name, set()).update(names)
    found: set[str] = set()
    more = {"MeteoraError"}
    while more:
        found |= more
        more = {name for name, own in bases.items() if own & found} - found
    return found


def test_every_error_is_raised_in_a_test() -> None:
    this = Path(__file__).name
    named: set[str] = set()
    for path in TESTS.rglob("*.py"):
        if path.name != this:
            named.update(re.findall(r"\w+Error\b", path.read_text(encoding="utf-8")))
    assert _errors() - named == set(HELD_BY_MESSAGE)
    assert all(exists(*held.split("::")) for held in HELD_BY_MESSAGE.values())
