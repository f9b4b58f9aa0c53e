"""What the README and its pages say is true: commands exist, and the first recipe is shipped."""

import io
import re

import pytest
from rich.console import Console

from tests.pages import PAGES, ROOT
from tests.pipelines.cli.command_line import ask

README = (ROOT / "README.md").read_text()
NAME = re.compile(r"\bmeteora ((?:(?:store|recipe) )?[a-z]+(?:-[a-z]+)?)\b(?= |$|`)", re.MULTILINE)
COMMANDS = sorted(set(NAME.findall("\n".join(page.read_text() for page in PAGES))))


def test_the_pages_name_commands() -> None:
    assert {"run", "check", "generate", "sql", "verify"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_pages_exists(command: str) -> None:
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


def test_the_tables_of_scores_are_in_today_s_form_and_fit_into_80_columns() -> None:
    from pipelines.cli import score_table  # noqa: PLC0415

    tables = re.findall(
        r"^((?:task|conversation-3) .+)\n─+\n((?:\w.*\n|\n(?=mean))+)", README, re.M
    )
    assert len(tables) == 2
    for heading, body in tables:
        lines = [heading, *filter(None, body.split("\n"))]
        headings, *rows = [re.split(r" {2,}", line) for line in lines]
        rows = [[row[0], "", *row[1:]] if row[0].startswith("mean") else row for row in rows]
        terminal = Console(width=80, file=io.StringIO())
        with terminal.capture() as shown:
            terminal.print(score_table._table(headings, rows))
        printed = map(str.strip, shown.get().splitlines())
        assert [line for line in printed if line and "─" not in line] == lines
