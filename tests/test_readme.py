"""What the README says is true: its commands exist, and its recipe is shipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pipelines.cli.command_line import ask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"\bmeteora ((?:store )?[a-z]+)\b(?= |$|`)", README)))


def test_the_readme_names_commands() -> None:
    assert {"run", "check", "generate", "sql", "verify"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_exists(command: str) -> None:
    assert ask(*command.split(), "--help").returncode == 0


def test_ci_runs_the_very_command_that_the_readme_gives() -> None:
    lines = [line for line in README.splitlines() if line.endswith("bin/pytest")]
    assert len(lines) == 1
    assert "grep -m1 'bin/pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_first_command_runs_a_recipe_that_ships() -> None:
    from pipelines.recipe.recipe import shipped  # noqa: PLC0415

    (name,) = re.findall(r"bin/meteora run (\w+)$", README, re.MULTILINE)
    assert name in shipped()


def test_every_expert_of_the_quickstart_stands_in_the_table_of_scores() -> None:
    from pipelines.recipe.recipe import Recipe, locate  # noqa: PLC0415

    for expert in Recipe.load(locate("quickstart")).experts:
        assert f"\n{expert.name} " in README
